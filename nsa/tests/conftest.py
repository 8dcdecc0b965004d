"""What tests of optional backends share: a skip that gives routing's own reasons, and proof that a kernel ran."""

import os
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from multiprocessing import get_context

import pytest
import torch

from nsa import routing
from nsa.testing import interpreter


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


def _interpret():
    # Triton reads it when a kernel is defined, so one process either interprets or compiles.
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    interpreter.install()


@pytest.fixture(scope="session")
def interpreted():
    """interpreted(check, *args): what `check`, a function of a test module, returns in a process whose Triton
    interprets kernels on CPU tensors."""
    if find_spec("triton") is None:
        pytest.skip("needs Triton")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(_interpret).result()
        yield lambda check, *args: pool.submit(check, *args).result()
