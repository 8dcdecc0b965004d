"""The Triton choice of blocks, interpreted on a CPU, against the specification: well formed, exact on ties and on
scores that are apart, near-ties elsewhere. Checks run in a process of their own, which returns their complaints."""

import pytest
import torch

from nsa import NSAConfig, compressed_attention
from nsa.blocks import n_compressed
from nsa.ops.selection import block_scores_reference, select_blocks_reference
from nsa.testing import check_blocks, inputs, regrets, shapes

PAPER = NSAConfig()
FEW = NSAConfig(n_sel=4, w=64)


def _select(q, k, lse, cfg, S):
    from nsa.kernels.selection import select

    return select(q, k, lse, cfg.pattern, S)


def _compare(cfg, shape, dtype, contiguous=True, workspace=None, scale=1.0):
    """Complaints of one choice on random inputs of (B, T, S, G, R, Dk)."""
    from nsa.kernels import selection

    selection._WORKSPACE = workspace or 256 << 20
    B, T, S, G, R, D = shape
    q, k, _ = inputs(B, T, n_compressed(S, cfg) + 3, G=G, R=R, Dk=D, dtype=dtype, contiguous=contiguous)
    q = q * scale
    lse = compressed_attention(q, k, k, cfg, seq_len=S)[1]
    k[:, n_compressed(S, cfg) :] = torch.nan  # a buffer's rest: keys that are not whole yet
    got = _select(q, k, lse, cfg, S)
    exact = [x.double() for x in (q, k, lse)]
    scores = block_scores_reference(*exact, cfg, seq_len=S)
    return check_blocks(got, S, T, cfg), regrets(got, scores, select_blocks_reference(*exact, cfg, seq_len=S))


def _fine(found):
    complaints, (share, worst) = found
    assert complaints == []
    # A row of so few may be one near-tie; a wrong rule changes most rows, and by far more.
    assert worst <= 1e-3
    assert share <= 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("R", [1, 3, 6, 16])
def test_random_inputs_differ_by_near_ties_only(interpreted, R, dtype):
    _fine(interpreted(_compare, FEW, (1, 4, 1100, 2, R, 32), dtype))


@pytest.mark.parametrize("D", [64, 128, 192, 80])
def test_head_dims(interpreted, D):
    _fine(interpreted(_compare, FEW, (1, 3, 700, 1, 2, D), torch.bfloat16))


@pytest.mark.parametrize("cfg", [pytest.param(c, id=n) for n, c in shapes.PATTERNS.items()])
@pytest.mark.parametrize("T", [1, 9])
def test_every_pattern_of_lengths(interpreted, cfg, T):
    """Taps that reach several selection blocks back, one key a block, no forced block at the start."""
    _fine(interpreted(_compare, cfg, (2, T, 111, 2, 3, 16), torch.float32))


@pytest.mark.parametrize("S", [1, 31, 32, 65])
def test_a_whole_sequence_from_its_first_token(interpreted, S):
    """The first l - 1 queries see no compressed block; n_sel is above the number of candidates."""
    _fine(interpreted(_compare, PAPER, (1, S, S, 1, 2, 16), torch.float32))


def test_more_heads_than_one_tile_holds(interpreted):
    _fine(interpreted(_compare, FEW, (1, 3, 400, 1, 24, 32), torch.float32))


def test_strided_inputs_and_batches(interpreted):
    _fine(interpreted(_compare, FEW, (2, 5, 500, 2, 3, 32), torch.bfloat16, False))


def test_queries_walked_in_chunks_choose_the_same(interpreted):
    _fine(interpreted(_compare, FEW, (1, 40, 300, 1, 4, 16), torch.float32, True, 1024))


@pytest.mark.parametrize("scale", [30.0, 1e-3])
def test_huge_and_tiny_scores(interpreted, scale):
    _fine(interpreted(_compare, FEW, (1, 4, 900, 1, 2, 32), torch.float32, True, None, scale))


def _choose(cfg, S, weights):
    """The choice of one query whose compressed keys have probabilities proportional to `weights`."""
    C = len(weights)
    q = (torch.tensor(weights, dtype=torch.float64).log() * C**0.5).view(1, 1, 1, C).float()
    k = torch.eye(C).view(1, C, 1, C)
    lse = compressed_attention(q, k, k, cfg, seq_len=S)[1]
    return _select(q, k, lse, cfg, S).flatten().tolist()


def test_equal_scores_go_to_the_lower_block(interpreted):
    cfg = NSAConfig(l=4, d=4, l_sel=4, n_sel=6, w=4)
    weights = [1.0] * 70
    assert interpreted(_choose, cfg, 280, weights) == [0, 1, 2, 3, 68, 69]
    for j in (7, 33, 65):
        weights[j] = 8.0
    assert interpreted(_choose, cfg, 280, weights) == [0, 7, 33, 65, 68, 69]
    weights[3] = weights[5] = weights[40] = 8.0
    assert interpreted(_choose, cfg, 280, weights) == [0, 3, 5, 7, 68, 69]


@pytest.mark.parametrize("wanted", [0, 68, 69])
def test_a_forced_block_that_scores_best_is_listed_once(interpreted, wanted):
    cfg = NSAConfig(l=4, d=4, l_sel=4, n_sel=5, w=4)
    weights = [1e-3] * 70
    weights[0] = weights[68] = weights[69] = 1e-6  # chosen because they are forced, not by their score
    weights[wanted], weights[4], weights[60] = 1, 0.5, 0.4
    assert interpreted(_choose, cfg, 280, weights) == [0, 4, 60, 68, 69]


def test_the_outer_taps_have_half_the_weight_of_the_inner_ones(interpreted):
    for inner, expected in ((0.9, 2), (1.1, 5)):
        weights = [1e-6] * 43
        weights[7] = weights[11] = 1.0
        weights[21] = inner
        assert interpreted(_choose, NSAConfig(n_sel=4), 704, weights) == [0, expected, 9, 10], inner


@pytest.mark.parametrize("tiny", [1e-12, 1e-50])
def test_a_far_block_still_counts_at_tiny_probability(interpreted, tiny):
    """1e-50 is below what fp32 can hold: the kernel scales probabilities up."""
    cfg = NSAConfig(l=4, d=4, l_sel=4, n_sel=4, w=4)
    weights = [1.0] + [tiny / 100] * 15
    weights[4], weights[9] = tiny, 2 * tiny
    assert interpreted(_choose, cfg, 64, weights) == [0, 9, 14, 15]


def _not_a_number(cfg, S):
    q, k, _ = inputs(1, 3, n_compressed(S, cfg), G=1, R=2, Dk=16, dtype=torch.float32)
    q[:, 1] = torch.nan
    return check_blocks(_select(q, k, torch.zeros(1, 3, 2), cfg, S), S, 3, cfg)


def test_scores_that_are_no_numbers_still_give_a_list_of_real_blocks(interpreted):
    assert interpreted(_not_a_number, FEW, 900) == []


def _reasons():
    from nsa.kernels.selection import unsupported

    def of(D=64, C=10, dtype=torch.bfloat16):
        return unsupported("triton", torch.empty(1, 1, 2, D, dtype=dtype), torch.empty(1, C, 1, D, dtype=dtype))

    return of(), of(D=512), of(C=65_537), of(dtype=torch.float64)


def test_inputs_that_the_kernel_cannot_take_are_refused_with_a_reason(interpreted):
    fine, dim, keys, dtype = interpreted(_reasons)
    assert fine == []
    assert "512" in dim[0]
    assert "65537" in keys[0]
    assert "float64" in dtype[0]
