"""The list of selected blocks: ascending, unique, padded at the end, forced blocks once, ties to the lower block."""

import pytest
import torch

from nsa import NSAConfig, compressed_attention, select_blocks, selected_attention
from nsa.testing import (
    assert_low_regret,
    assert_same,
    check_blocks,
    fixed_selection,
    inputs,
    oracle,
    regrets,
    shapes,
)

PATTERNS = [pytest.param(cfg, id=name) for name, cfg in shapes.PATTERNS.items()]
SELECTED_BACKENDS = ("reference", "torch")


def _select(q, k_cmp, cfg, S):
    """The choice; that of a single query must be the last one's of two equal ones, which goes another way."""
    lse = compressed_attention(q, k_cmp, k_cmp, cfg, seq_len=S)[1]
    chosen = select_blocks(q, k_cmp, lse, cfg, seq_len=S)
    if q.shape[1] == 1 < S:
        twice = select_blocks(q.repeat(1, 2, 1, 1), k_cmp, lse.repeat(1, 2, 1), cfg, seq_len=S)
        assert torch.equal(twice[:, 1:], chosen)
    return chosen


def _wish(weights):
    """q [1,1,1,C] and orthonormal compressed keys [1,C,1,C] whose probabilities are proportional to `weights`."""
    C = len(weights)
    q = torch.tensor(weights, dtype=torch.float64).log().view(1, 1, 1, C) * C**0.5
    return q, torch.eye(C, dtype=torch.float64).view(1, C, 1, C)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cfg", PATTERNS)
def test_every_list_is_well_formed(cfg, dtype):
    for S, T in ((1, 1), (cfg.l, cfg.l), (65, 65), (111, 1), (400, 77)):
        q, k, _ = inputs(2, T, len(oracle.compressed_spans(S, cfg)), R=3, dtype=dtype)
        assert check_blocks(_select(q, k, cfg, S), S, T, cfg) == [], (S, T)


@pytest.mark.parametrize(
    "broken",
    [
        [0, 2, 2, 3],  # a block twice
        [0, 3, 2, -1],  # descending
        [0, -1, 2, 3],  # padding inside
        [0, 2, 3, 4],  # the future
        [1, 2, 3, -1],  # block 0 missing
        [0, 1, 3, -1],  # the local block before the own one missing
        [0, 2, 3, -1],  # fewer than there are candidates
        [0, 2, 3, -2],
    ],
)
def test_the_checker_of_lists_sees_each_fault(broken):
    cfg = NSAConfig(l=4, d=4, l_sel=4, n_sel=4, w=4)
    assert check_blocks(torch.tensor(broken, dtype=torch.int32).view(1, 1, 1, 4), 16, 1, cfg) != []
    assert check_blocks(torch.tensor([0, 1, 2, 3], dtype=torch.int32).view(1, 1, 1, 4), 16, 1, cfg) == []


def test_forced_blocks_are_the_first_the_own_and_the_one_before():
    """They are what is wanted least; n = 4 leaves one free slot, for block 5."""
    cfg = NSAConfig(l=4, d=4, l_sel=4, n_sel=4, w=4)
    q, k = _wish([1e-9] + [1e-6] * 4 + [1] + [1e-6] * 2 + [1e-9] * 2)
    assert _select(q, k, cfg, 40).tolist() == [[[[0, 5, 8, 9]]]]


@pytest.mark.parametrize("wanted", [0, 8, 9])
def test_a_forced_block_that_also_scores_best_is_listed_once_and_leaves_the_slot_to_another(wanted):
    cfg = NSAConfig(l=4, d=4, l_sel=4, n_sel=5, w=4)
    weights = [1e-3] * 10
    weights[wanted], weights[4], weights[6] = 1, 0.5, 0.4
    q, k = _wish(weights)
    assert _select(q, k, cfg, 40).tolist() == [[[[0, 4, 6, 8, 9]]]]


@pytest.mark.parametrize(
    ("init", "local", "t_block", "expected"),
    [
        (1, 2, 0, [0]),
        (1, 2, 1, [0, 1]),
        (1, 2, 2, [0, 1, 2]),
        (3, 2, 1, [0, 1]),
        (3, 2, 3, [0, 1, 2, 3]),
        (0, 1, 4, [1, 2, 3, 4]),
        (2, 3, 5, [0, 1, 3, 4, 5]),
    ],
)
def test_forced_blocks_are_clipped_to_what_exists_and_counted_once(init, local, t_block, expected):
    n = max(init + local, 4 if init == 0 else 0)
    cfg = NSAConfig(l=4, d=4, l_sel=4, n_sel=n, w=4, init_blocks=init, local_blocks=local)
    S = 4 * (t_block + 1)
    weights = [2.0**j for j in range(t_block + 1)]
    q, k = _wish(weights)
    listed = _select(q, k, cfg, S)[0, 0, 0].tolist()
    assert listed == expected + [-1] * (n - len(expected))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_equal_scores_go_to_the_lower_block(dtype):
    cfg = NSAConfig(l=4, d=4, l_sel=4, n_sel=6, w=4)
    for C in (12, 33, 257):
        q = torch.zeros(1, 3, 6, 64, dtype=dtype)
        k = inputs(1, 1, C, Dk=64, dtype=dtype).k  # any keys: a zero query likes them all the same
        listed = _select(q, k, cfg, 4 * C)
        assert listed.tolist() == [[[[0, 1, 2, 3, C - 2, C - 1]] * 2] * 3], C


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_ties_among_the_best_and_the_rest_are_each_broken_downwards(dtype):
    cfg = NSAConfig(l=4, d=4, l_sel=4, n_sel=6, w=4)
    weights = [1.0] * 20
    for j in (7, 11, 15):
        weights[j] = 8.0
    q, k = _wish(weights)
    assert _select(q.to(dtype), k.to(dtype), cfg, 80).tolist() == [[[[0, 7, 11, 15, 18, 19]]]]
    weights[3] = weights[5] = weights[9] = 8.0
    q, k = _wish(weights)
    assert _select(q.to(dtype), k.to(dtype), cfg, 80).tolist() == [[[[0, 3, 5, 7, 18, 19]]]]


def test_a_query_that_sees_no_compressed_block_takes_the_lowest_candidates():
    cfg = NSAConfig(l=32, d=4, l_sel=4, n_sel=5, w=4)
    q, k, _ = inputs(1, 1, 0)
    assert _select(q, k, cfg, 31)[0, 0].tolist() == [[0, 1, 2, 6, 7]] * 2


def test_a_far_block_still_counts_at_tiny_probability():
    """Scores 1e-12 and 2e-12: half precision would flush both to zero, a tie, and pick the lower one."""
    cfg = NSAConfig(l=4, d=4, l_sel=4, n_sel=4, w=4)
    weights = [1.0] + [1e-14] * 15
    weights[4], weights[9] = 1e-12, 2e-12
    q, k = _wish(weights)
    for dtype in (torch.float64, torch.float32):
        assert _select(q.to(dtype), k.to(dtype), cfg, 64).tolist() == [[[[0, 9, 14, 15]]]]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (7, 2),  # j = 4m-1 with m = 2: block 7 ends in selection block 2 and begins in 1; shared half and half
        (8, 2),
        (9, 2),
        (10, 2),
    ],
)
def test_equation_9_shares_a_compressed_block_among_those_it_overlaps(wanted, expected):
    """32/16/64: compressed blocks 8, 9, 10 lie in selection block 2; block 7 and 11 lie astride."""
    cfg = NSAConfig(n_sel=4)
    weights = [1e-3] * 35
    weights[wanted] = 1.0
    if wanted == 7:
        weights[11] = 0.9  # lifts block 2 over block 1, with which it shares block 7
    q, k = _wish(weights)
    assert _select(q, k, cfg, 576).tolist() == [[[[0, expected, 7, 8]]]]


def test_the_outer_taps_have_half_the_weight_of_the_inner_ones():
    """Selection block 2 has p on its two outer taps (weight 1 each), block 5 on one inner tap (weight 2)."""
    cfg = NSAConfig(n_sel=4)
    for inner, expected in ((0.9, 2), (1.1, 5)):
        weights = [1e-6] * 43
        weights[7] = weights[11] = 1.0
        weights[21] = inner
        q, k = _wish(weights)
        # blocks 1, 3 share one outer tap each: below both
        assert _select(q, k, cfg, 704).tolist() == [[[[0, expected, 9, 10]]]], inner


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("R", [1, 6])
def test_scores_one_percent_apart_give_the_oracles_indices(dtype, R):
    """Keys are orthogonal powers of two, so inputs are exact in every dtype; rows where fp64 has two candidate scores
    nearer than 1% are left out, and most rows stay."""
    cfg = NSAConfig(l=8, d=4, l_sel=16, n_sel=5, w=4)
    S = 256
    C = len(oracle.compressed_spans(S, cfg))
    q, k, _ = inputs(1, S, C, G=2, R=R, Dk=64, dtype=dtype, seed=R)
    q, k = q * 4, k
    scores = oracle.selection_scores(q, k, cfg, seq_len=S)
    ordered = scores.sort(-1, descending=True).values
    gap = (ordered[..., :-1] - ordered[..., 1:]) / ordered[..., :-1]
    clear = torch.where(ordered[..., 1:] > -torch.inf, gap >= 0.01, torch.ones_like(gap, dtype=torch.bool)).all(-1)
    clear &= (ordered > 0).any(-1)
    assert clear.sum() > 100
    got, want = _select(q, k, cfg, S), oracle.choose_blocks(scores, cfg, seq_len=S)
    assert torch.equal(got[clear], want[clear])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_scores_differ_by_near_ties_only(dtype):
    cfg = NSAConfig(l=8, d=4, l_sel=16, n_sel=5, w=4)
    S = 512
    q, k, _ = inputs(2, S, len(oracle.compressed_spans(S, cfg)), R=3, Dk=64, dtype=dtype)
    scores = oracle.selection_scores(q, k, cfg, seq_len=S)
    assert_low_regret(_select(q, k, cfg, S), scores, oracle.choose_blocks(scores, cfg, seq_len=S))


def test_the_measure_of_regret_sees_a_bad_choice():
    scores = torch.tensor([1.0, 0.5, 0.4999, 0.1], dtype=torch.float64).view(1, 1, 1, 4)
    best, near, bad = (torch.tensor(row).view(1, 1, 1, 2) for row in ([0, 1], [0, 2], [0, 3]))
    assert regrets(best, scores, best) == (0.0, 0.0)
    assert regrets(near, scores, best) == (1.0, pytest.approx(2e-4, rel=1e-3))
    assert regrets(bad, scores, best)[1] == pytest.approx(0.8)
    scores[..., 2] = 0.5 * (1 - 6e-9)  # a tie but for rounding
    assert regrets(near, scores, best) == (0.0, pytest.approx(6e-9, rel=1e-3))
    with pytest.raises(AssertionError, match="displaced"):
        assert_low_regret(bad, scores, best)


def test_no_gradient_flows_through_the_choice():
    cfg, S = shapes.PATTERNS["small"], 65
    q, k, v = inputs(1, S, len(oracle.compressed_spans(S, cfg)))
    q.requires_grad_(), k.requires_grad_()
    lse = compressed_attention(q, k, v, cfg, seq_len=S)[1]
    chosen = select_blocks(q, k, lse, cfg, seq_len=S)
    assert chosen.dtype == torch.int32
    assert not chosen.requires_grad


# Reading a list


@pytest.mark.parametrize("backend", SELECTED_BACKENDS)
@pytest.mark.parametrize("slot", [0, 1, 2, 3])
def test_an_empty_slot_is_skipped_wherever_it_stands(slot, backend):
    """Not read as block 0 or as the last block, and not the end of the list."""
    cfg, S, T = shapes.PATTERNS["small"], 111, 13
    q, k, v = inputs(2, T, S)
    chosen = fixed_selection(2, T, 2, S, cfg)
    assert (chosen >= 0).all()
    chosen[..., slot] = -1
    assert_same(
        lambda q, k, v: selected_attention(q, k, v, chosen, cfg, backend=backend),
        lambda q, k, v: oracle.selected_attention(q, k, v, chosen, cfg),
        q,
        k,
        v,
    )


@pytest.mark.parametrize("backend", SELECTED_BACKENDS)
def test_a_query_with_no_block_at_all_gets_zero_and_finite_gradients(backend):
    cfg, S = shapes.PATTERNS["small"], 49
    for T in (9, 3):
        q, k, v = inputs(1, T, S)
        chosen = fixed_selection(1, T, 2, S, cfg)
        chosen[:, T // 3], chosen[:, 2 * T // 3, 1] = -1, -1
        assert_same(
            lambda q, k, v, chosen=chosen: selected_attention(q, k, v, chosen, cfg, backend=backend),
            lambda q, k, v, chosen=chosen: oracle.selected_attention(q, k, v, chosen, cfg),
            q,
            k,
            v,
        )


@pytest.mark.parametrize("T", [9, 3])
def test_the_logsumexp_of_a_query_with_no_block_is_that_of_nothing(T):
    cfg, S = shapes.PATTERNS["small"], 49
    chosen = fixed_selection(1, T, 2, S, cfg)
    chosen[:, T // 3], chosen[:, 2 * T // 3, 1] = -1, -1
    lse = torch.ops.nsa.selected_attention(*inputs(1, T, S), chosen, list(cfg.pattern), S, None, False, "torch")[1]
    assert torch.equal(lse.isneginf(), (chosen < 0).all(-1).repeat_interleave(2, -1))


@pytest.mark.parametrize("backend", SELECTED_BACKENDS)
def test_equal_runs_are_equal_bit_for_bit(backend):
    """Repeated indices in the backward of a gather add in a racing order on CPU."""
    cfg, S = shapes.PATTERNS["small"], 300
    leaves = [x.requires_grad_() for x in inputs(2, S, S, R=4, Dk=64, Dv=64, dtype=torch.float32)]
    chosen = fixed_selection(2, S, 2, S, cfg)

    def gradients():
        out = selected_attention(*leaves, chosen, cfg, backend=backend)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    first = gradients()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(gradients(), first, strict=True))
