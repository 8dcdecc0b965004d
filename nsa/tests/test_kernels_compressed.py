"""The Triton kernels of the compressed branch, interpreted on a CPU: output, lse, gradients and reads against the
specification.

Every case runs with uninitialised memory poisoned and every address of a load or store checked against the tensors.
"""

import pytest
import torch

from nsa.blocks import n_compressed
from nsa.testing import shapes
from nsa.tests import compressed_cases as cases
from nsa.tests.compressed_cases import PAPER, SMALL
from nsa.tests.test_kernels_selected import _bounds_checked

DTYPES = FP32, _, BF16 = (torch.float32, torch.float16, torch.bfloat16)


def _small_tiles(kernel, sm, dim, itemsize):
    from nsa.kernels import compressed

    return compressed.Launch(32, 16, 4, 1)


# Tiles in which a few dozen tokens have tiles of every kind, and several pieces of rows.
TINY = {"launch": _small_tiles, "_PROGRAMS": 40, "_LEAST_ROWS": 64}


def _excess(shape, cfg=SMALL, dtype=FP32, **more):
    with cases.settings(**TINY):
        return cases.excess(shape, cfg, dtype, guard=_bounds_checked, **more)


def _gated(*args):
    return _excess(*args, gated=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("R", [1, 3, 6, 16])
def test_every_group_size_and_type(interpreted, R, dtype):
    T = 70 if R == 1 else 43 if R < 16 else 21
    assert interpreted(_gated if R % 2 else _excess, (1, T, 49 + T, 1, R, 32, 16), SMALL, dtype) == {}


@pytest.mark.parametrize("name", shapes.PATTERNS)
def test_every_pattern_from_the_first_token_on(interpreted, name):
    """The first rows see nothing, the last ones several tiles of keys, the first of them whole."""
    S = 150 if name == "paper" else 85
    assert interpreted(_excess, (1, S, S, 1, 2, 16, 16), shapes.PATTERNS[name]) == {}


FEW = ((2, 1, 161, 2, 6), (1, 1, 1, 1, 1), (1, 2, 90, 1, 70), (1, 9, 9, 1, 3), (1, 7, 7, 2, 2), (1, 4, 8, 1, 2))


@pytest.mark.parametrize("shape", [(*shape, 16, 16) for shape in FEW])
def test_few_queries_and_few_blocks(interpreted, shape):
    assert interpreted(_excess, shape) == {}
    assert interpreted(_gated, shape) == {}


def _strided(shape):
    return _excess(shape, contiguous=False)


@pytest.mark.parametrize("shape", [(2, 20, 67, 2, 3, 24, 16), (1, 65, 65, 2, 2, 16, 40)])
def test_strided_inputs_and_head_dims_off_the_tile(interpreted, shape):
    assert interpreted(_strided, shape) == {}


def _tables():
    """The launch table's own tiles, and its pieces where there are several."""
    return [
        cases.excess((1, 300, 420, 1, 3, D, D), PAPER, d, gated=True, guard=_bounds_checked)
        for D, d in ((32, FP32), (64, BF16))
    ]


def test_the_tiles_of_the_launch_table(interpreted):
    assert interpreted(_tables) == [{}, {}]


def _launched(programs, least):
    """Names of the kernels of a backward, and dk and dv, cut into pieces or not."""
    from triton.runtime import interpreter

    names, stock = [], interpreter.GridExecutor.__call__

    def launch(self, *args, **kwargs):
        names.append(self.fn.__name__)
        return stock(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = launch
    given = cases.case((2, 85, 85, 1, 3, 16, 32), SMALL, FP32, False, "cpu")
    try:
        with cases.settings(launch=_small_tiles, _PROGRAMS=programs, _LEAST_ROWS=least):
            _, _, dk, dv, _, _ = cases.run(given, SMALL, 85)
    finally:
        interpreter.GridExecutor.__call__ = stock
    return names, dk, dv


def test_pieces_sum_up_to_the_whole_in_one_launch_more(interpreted):
    names, dk, dv = interpreted(_launched, 1, 1)
    assert names == ["forward", "backward_dq", "backward_dkv"]
    more, dk_cut, dv_cut = interpreted(_launched, 50, 32)
    assert more == [*names, "sum_pieces"]
    torch.testing.assert_close(dk_cut, dk, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dv_cut, dv, rtol=1e-5, atol=1e-6)
    assert not torch.equal(dk_cut, dk)  # summed in another order: they were pieces


def _cuts():
    from nsa.kernels.compressed import _PIECES_BYTES, _pieces

    def of(B, S, R, G, D):
        C = n_compressed(S, PAPER)
        tiles = -(-C // 64)
        size = B * G * tiles * 64 * 2 * D * 4
        return (*_pieces(S * R, 64, B * G * tiles, size), size, S * R)

    return [of(*x) for x in ((8, 4096, 6, 2, 64), (1, 65536, 16, 4, 128), (64, 65536, 6, 2, 64), (1, 40, 6, 2, 64))], (
        _PIECES_BYTES
    )


def test_pieces_cover_every_row_within_the_workspace(interpreted):
    cut, most = interpreted(_cuts)
    for pieces, piece, size, rows in cut:
        assert (pieces - 1) * piece * 64 < rows <= pieces * piece * 64
        assert pieces == 1 or pieces * size <= most
    assert [pieces for pieces, *_ in cut][2:] == [1, 1]
    assert min(pieces for pieces, *_ in cut[:2]) > 1


LENGTHS = [85, 0, 5, 30, 8]  # longer than the queries, empty, blind, shorter than the queries, one block


def _ragged(gated, dtype):
    return _excess((5, 40, 85, 2, 3, 16, 16), SMALL, dtype, gated=gated, lengths=LENGTHS)


@pytest.mark.parametrize(("gated", "dtype"), [(False, FP32), (True, BF16)])
def test_ragged_rows_are_the_rows_alone(interpreted, gated, dtype):
    assert interpreted(_ragged, gated, dtype) == {}


def _poisoned(gated):
    """Results of ragged rows where all that no row may look at is NaN, less those where it is 0."""
    given = cases.case((5, 40, 85, 2, 3, 16, 16), SMALL, FP32, gated, "cpu")
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    foul = [x.clone() for x in given[:4]]
    for b, S in enumerate(LENGTHS):
        blind = max(0, 40 - max(0, S - (SMALL.l - 1)))
        for x, at in zip(foul, (slice(blind), *[slice(n_compressed(S, SMALL), None)] * 2, slice(blind)), strict=True):
            x[b, at] = torch.nan
    got = []
    for tensors in (foul, [x.nan_to_num() for x in foul]):
        q, k, v, dout = tensors
        with cases.settings(**TINY):
            # delta is the caller's, of rows that the forward gave 0 for: 0, unless dout is NaN itself.
            out, _, _ = _forward(q, k, v, lengths)
            delta = None if given.gate is None else (dout * out).sum(-1).nan_to_num()
            got.append((out, *_backward(dout, q, k, v, out, given.gate, delta, lengths)))
    return [torch.equal(a, b) for a, b in zip(*got, strict=True)], all(x.isfinite().all() for x in got[0])


def _forward(q, k, v, lengths):
    from nsa.kernels import compressed

    return compressed.forward(q, k, v, None, SMALL.pattern, 0, False, "triton", lengths=lengths)


def _backward(dout, q, k, v, out, gate, delta, lengths):
    from nsa.kernels import compressed

    lse = _forward(q, k, v, lengths)[1]
    lse = lse if gate is None else lse - gate.log()
    past = (None, out, lse, SMALL.pattern, 0, "triton", None, delta)
    return compressed.backward(dout, q, k, v, *past, lengths=lengths)


@pytest.mark.parametrize("gated", [False, True])
def test_what_no_row_may_look_at_reaches_no_result(interpreted, gated):
    """NaN in keys past a row's own and in the queries and gradients of rows that see nothing."""
    assert interpreted(_poisoned, gated) == ([True] * 4, True)


def _lengths_beyond_the_keys():
    """A row that claims more positions than k has blocks for reads those that are there."""
    given = cases.case((1, 20, 85, 1, 2, 16, 16), SMALL, FP32, False, "cpu")
    held = n_compressed(85, SMALL)
    with cases.settings(**TINY), _bounds_checked():
        out, lse, _ = _forward(*given[:3], torch.tensor([400], dtype=torch.int32))
        s = torch.einsum("bthd,bcd->bthc", given.q, given.k[:, :, 0]) / 4
    return lse.shape, held, float((lse - s.logsumexp(-1)).abs().max()), bool(out.isfinite().all())


def test_no_key_is_read_past_the_end(interpreted):
    _, held, error, finite = interpreted(_lengths_beyond_the_keys)
    assert held == 20
    assert error < 1e-5
    assert finite


def _surplus(programs):
    """dk and dv of compressed keys that a whole row has no block for, which are NaN; in so many programs or more."""
    given = cases.case((2, 85, 85, 2, 3, 16, 16), SMALL, FP32, True, "cpu")
    wide = [torch.cat([x, torch.full_like(x[:, :25], torch.nan)], 1) for x in (given.k, given.v)]
    with cases.settings(**{**TINY, "_PROGRAMS": programs}):
        _, dq, dk, dv, _, _ = cases.run(given._replace(k=wide[0], v=wide[1]), SMALL, 85, None, _bounds_checked)
        _, dq_want, dk_want, dv_want, _, _ = cases.run(given, SMALL, 85)
    fine = torch.equal(dq, dq_want) and torch.equal(dk[:, :20], dk_want) and torch.equal(dv[:, :20], dv_want)
    return fine, float(dk[:, 20:].abs().sum() + dv[:, 20:].abs().sum())


@pytest.mark.parametrize("programs", [1, 100])
def test_keys_past_the_last_block_take_no_part(interpreted, programs):
    assert interpreted(_surplus, programs) == (True, 0.0)


def _repeated():
    given = cases.case((1, 85, 85, 1, 6, 32, 32), SMALL, BF16, True, "cpu")
    with cases.settings(**TINY):
        runs = [cases.run(given, SMALL, 85) for _ in range(2)]
    return all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_equal_runs_are_equal(interpreted):
    assert interpreted(_repeated)


def _large():
    """Scores of tens of thousands, of either sign, in the first block or in the last."""
    given = cases.case((1, 40, 85, 1, 2, 16, 16), SMALL, FP32, False, "cpu")
    k = given.k.clone()
    k[:, 0], k[:, -3:] = -3e4, 3e4
    got = cases.run(given._replace(k=k), SMALL, 85)
    want = cases.wanted(given._replace(k=k), SMALL, [85])
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(got[:1], want[:1], strict=True)], all(
        x.isfinite().all() for x in got[:5]
    )


def test_huge_scores_stay_finite(interpreted):
    (error,), finite = interpreted(_large)
    assert error < 1e-5
    assert finite


def _reasons():
    from nsa.kernels import compressed

    def of(dtype, dim):
        return compressed.unsupported("triton", *[torch.zeros(1, 1, 1, dim, dtype=dtype)] * 3)

    return of(torch.bfloat16, 96), of(torch.float64, 64), of(torch.float16, 192)


def test_what_cannot_run_is_refused_with_its_reason(interpreted):
    fine, double, wide = interpreted(_reasons)
    assert fine == []
    assert len(double) == 1
    assert "float64" in double[0]
    assert len(wide) == 1
    assert "192" in wide[0]


def _shut():
    """Gradients under gates of 0, 1e-38 and 1, less those of the specification; rows of the first two by themselves."""
    given = cases.case((1, 60, 85, 1, 3, 16, 16), SMALL, FP32, True, "cpu")
    gate = torch.ones_like(given.gate)
    gate[:, :20], gate[:, 20:40] = 0.0, 1e-38
    given = given._replace(gate=gate)
    with cases.settings(**TINY):
        _, dq, dk, dv, _, _ = cases.run(given, SMALL, 85)
    _, *want, _ = cases.wanted(given, SMALL, [85])
    return [float((a - b).norm() / b.norm()) for a, b in zip((dq, dk, dv), want, strict=True)], bool(dq[:, :40].any())


def test_a_gate_that_is_shut_leaves_no_gradient_and_no_nan(interpreted):
    errors, left = interpreted(_shut)
    assert max(errors) < 1e-6
    assert not left
