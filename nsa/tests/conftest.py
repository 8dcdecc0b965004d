"""What tests of optional backends share: a skip that gives routing's own reasons, and proof that a kernel ran."""

from contextlib import contextmanager

import pytest
import torch

from nsa import routing


@pytest.fixture
def needs():
    """needs("selected", "triton") skips the test unless that backend runs here, saying what is missing."""

    def check(op, backend, dtype=torch.bfloat16):
        x = torch.zeros(1, 64, 2, 64, dtype=dtype, device="cuda" if torch.cuda.is_available() else "cpu")
        try:
            routing.choose(op, x, x, x, backend=backend)
        except routing.Unsupported as error:
            pytest.skip(str(error))

    return check


@pytest.fixture
def launched():
    """`with launched("selected", "triton")` fails unless that kernel was launched inside: a fallback is no parity."""

    @contextmanager
    def watch(op, backend):
        before = routing.launches[op, backend]
        yield
        assert routing.launches[op, backend] > before, f"{op}: no {backend} launch, only {dict(routing.launches)}"

    return watch
