"""The Triton kernels of the sliding window, interpreted on a CPU: output, lse and gradients against the specification.

Every case runs with uninitialised memory poisoned and every address of a load or store checked against the tensors.
"""

import pytest
import torch

from nsa import NSAConfig
from nsa.testing import inputs
from nsa.tests import window_cases as cases
from nsa.tests.test_kernels_selected import _bounds_checked

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _small_tiles(kernel, sm, dim, itemsize):
    from nsa.kernels import window

    return window.Launch(32, 16, 4, 1)


def _excess(shape, w, dtype=torch.float32, **more):
    """In tiles of 32 rows and 16 keys, so that a few dozen tokens have tiles of every kind."""
    from nsa.kernels import window

    stock, window.launch = window.launch, _small_tiles
    window._sizes.cache_clear()
    try:
        return cases.excess(shape, w, dtype, guard=_bounds_checked, **more)
    finally:
        window.launch = stock
        window._sizes.cache_clear()


def _gated(*case):
    return _excess(*case, gated=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("R", [1, 3, 6, 16])
def test_every_group_size_and_type(interpreted, R, dtype):
    T = 70 if R == 1 else 43 if R < 16 else 21
    assert interpreted(_excess, (1, T, 49 + T, 1, R, 32, 16), 37, dtype) == {}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "w"),
    [((2, 43, 61, 2, 6, 32, 16), 37), ((1, 53, 53, 1, 2, 16, 24), 500), ((1, 1, 40, 1, 3, 16, 16), 9)],
)
def test_a_gate_of_each_row_scales_the_gradient_of_its_output(interpreted, shape, w, dtype):
    """The output itself is then not read: it is NaN there."""
    assert interpreted(_gated, shape, w, dtype) == {}


@pytest.mark.parametrize("w", [1, 2, 16, 17, 48, 500])
def test_any_window_whole_or_cut_off_by_the_start(interpreted, w):
    assert interpreted(_excess, (1, 53, 53, 1, 2, 16, 16), w) == {}


@pytest.mark.parametrize("shape", [(2, 1, 61, 2, 6, 16, 16), (1, 1, 1, 1, 1, 16, 16), (1, 2, 40, 1, 70, 16, 16)])
def test_few_queries(interpreted, shape):
    assert interpreted(_excess, shape, 33) == {}


def _off_the_tile():
    return [
        _excess(shape, 20, contiguous=False, gated=gated)
        for shape in ((2, 20, 37, 2, 3, 24, 16), (1, 35, 35, 2, 2, 16, 40))
        for gated in (False, True)
    ]


def test_strided_inputs_and_head_dims_off_the_tile(interpreted):
    assert interpreted(_off_the_tile) == [{}] * 4


def _tables():
    """The launch table's own tiles."""
    return [
        cases.excess((1, 70, 130, 1, 3, D, D), 65, d, guard=_bounds_checked)
        for D, d in ((32, DTYPES[0]), (64, DTYPES[2]))
    ]


def test_the_tiles_of_the_launch_table(interpreted):
    assert interpreted(_tables) == [{}, {}]


def _unseen():
    """dk and dv of the keys before every window."""
    _, (_, _, dk, dv), _ = cases.run((1, 3, 90, 2, 2, 16, 16), 20, torch.bfloat16)
    return float(dk[:, :68].abs().sum() + dv[:, :68].abs().sum()), bool((dv[:, 68:] != 0).all())


def test_keys_before_every_window_take_no_gradient(interpreted):
    assert interpreted(_unseen) == (0.0, True)


def _past_the_end():
    """Gradients for 9 keys past the sequence's end, NaN all of them, and those of the keys it holds."""
    from nsa.kernels import window

    p = NSAConfig(w=20).pattern
    q, k, v = inputs(1, 30, 50, G=2, R=3, Dk=16, Dv=16, dtype=torch.float32)
    longer = [torch.cat([x, torch.full_like(x[:, :9], torch.nan)], 1) for x in (k, v)]
    results = []
    for held in ((k, v), longer):
        out, lse, _ = window.forward(q, *held, None, p, 50, False, "triton")
        results.append(window.backward(q, q, *held, None, out, lse, p, 50, "triton", None, None)[1:])
    return [bool((b[:, 50:] == 0).all() and torch.equal(a, b[:, :50])) for a, b in zip(*results, strict=True)]


def test_keys_past_the_end_are_not_read_and_take_no_gradient(interpreted):
    assert interpreted(_past_the_end) == [True, True]


def _reasons():
    from nsa.kernels import window

    def of(dtype, dim):
        return window.unsupported("triton", *[torch.zeros(1, 1, 1, dim, dtype=dtype)] * 3)

    return of(torch.bfloat16, 96), of(torch.float64, 64), of(torch.float16, 512)


def test_what_cannot_run_is_refused_with_its_reason(interpreted):
    fine, double, wide = interpreted(_reasons)
    assert fine == []
    assert len(double) == 1
    assert "float64" in double[0]
    assert len(wide) == 1
    assert "512" in wide[0]
