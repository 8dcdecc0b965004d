"""Heads of a group share keys, values and the choice of blocks; groups share nothing."""

import pytest
import torch

from nsa import compressed_attention, select_blocks, selected_attention, sliding_window_attention
from nsa.testing import fixed_selection, inputs, oracle, shapes

CFG = shapes.PATTERNS["small"]
OPS = ("compressed", "selected-reference", "selected-torch", "window")


def _run(op, q, k, v, chosen, S):
    C = len(oracle.compressed_spans(S, CFG))
    if op == "compressed":
        return compressed_attention(q, k[:, :C], v[:, :C], CFG, seq_len=S)[0]
    if op == "window":
        return sliding_window_attention(q, k, v, CFG)
    return selected_attention(q, k, v, chosen, CFG, backend=op.split("-")[1])


def _choice(q, k, S):
    k_cmp = k[:, : len(oracle.compressed_spans(S, CFG))]
    lse = compressed_attention(q, k_cmp, k_cmp, CFG, seq_len=S)[1]
    return select_blocks(q, k_cmp, lse, CFG, seq_len=S)


def _newest(q, k_cmp, cfg, S):
    """The blocks of a single query, which are the last one's of two equal ones: that goes another way."""
    lse = compressed_attention(q, k_cmp, k_cmp, cfg, seq_len=S)[1]
    alone = select_blocks(q, k_cmp, lse, cfg, seq_len=S)
    twice = select_blocks(q.repeat(1, 2, 1, 1), k_cmp, lse.repeat(1, 2, 1), cfg, seq_len=S)
    assert torch.equal(twice[:, 1:], alone)
    return alone.tolist()


@pytest.mark.parametrize("R", shapes.HEADS_PER_GROUP)
def test_a_choice_is_made_once_a_group(R):
    S, G = 111, 2
    q, k, _ = inputs(2, S, S, G=G, R=R)
    assert _choice(q, k, S).shape == (2, S, G, CFG.n_sel)


@pytest.mark.parametrize("R", shapes.HEADS_PER_GROUP)
def test_the_order_of_heads_in_a_group_changes_no_choice_and_follows_through_the_outputs(R):
    S, G = 111, 2
    q, k, v = inputs(1, S, S, G=G, R=R)
    generator = torch.Generator().manual_seed(R)
    order = torch.cat([g * R + torch.randperm(R, generator=generator) for g in range(G)])
    chosen = _choice(q, k, S)
    assert torch.equal(_choice(q[:, :, order], k, S), chosen)
    for op in OPS:
        out, shuffled = _run(op, q, k, v, chosen, S), _run(op, q[:, :, order], k, v, chosen, S)
        torch.testing.assert_close(shuffled, out[:, :, order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("R", [3, 6])
def test_heads_read_the_keys_of_their_own_group(op, R):
    """Grouped attention is attention with the group's keys repeated for each of its heads: h belongs to h // R."""
    S, G = 65, 2
    q, k, v = inputs(2, 20, S, G=G, R=R)
    chosen = fixed_selection(2, 20, G, S, CFG)
    repeated = [x.repeat_interleave(R, dim=2) for x in (k, v, chosen)]
    torch.testing.assert_close(_run(op, q, k, v, chosen, S), _run(op, q, *repeated, S), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", OPS)
def test_a_group_does_not_see_another_groups_keys(op):
    S = 65
    q, k, v = inputs(1, 20, S, R=3)
    chosen = fixed_selection(1, 20, 2, S, CFG)
    before = _run(op, q, k, v, chosen, S)
    k[:, :, 1], v[:, :, 1] = 1e3, -1e3
    after = _run(op, q, k, v, chosen, S)
    assert torch.equal(after[:, :, :3], before[:, :, :3])
    assert not torch.equal(after[:, :, 3:], before[:, :, 3:])


def test_a_groups_choice_ignores_the_other_groups():
    S = 111
    q, k, _ = inputs(1, S, S, R=3)
    before = _choice(q, k, S)
    q[:, :, 3:], k[:, :, 1] = -q[:, :, 3:], 3 * k[:, :, 1]
    after = _choice(q, k, S)
    assert torch.equal(after[:, :, 0], before[:, :, 0])
    assert not torch.equal(after[:, :, 1], before[:, :, 1])


def test_importance_is_the_sum_of_softmaxes_not_the_softmax_of_a_sum():
    """Eq. 10. Two heads want block 2 a little, one wants block 3 very much: summed logits (and a maximum) say 3,
    summed probabilities say 2."""
    cfg = type(CFG)(l=4, d=4, l_sel=4, n_sel=2, w=4, init_blocks=0, local_blocks=1)
    S, C = 24, 6
    k_cmp = torch.eye(C, dtype=torch.float64).view(1, C, 1, C)
    wish = torch.zeros(1, 1, 3, C, dtype=torch.float64)
    wish[0, 0, 0, 2], wish[0, 0, 1, 2], wish[0, 0, 2, 3] = 6, 6, 30
    q = wish * C**0.5  # the scale takes it back
    assert (wish.sum(2).argmax(), wish.amax(2).argmax()) == (3, 3)
    assert _newest(q, k_cmp, cfg, S) == [[[[2, 5]]]]


def test_every_head_of_the_group_has_the_same_say():
    cfg = type(CFG)(l=4, d=4, l_sel=4, n_sel=2, w=4, init_blocks=0, local_blocks=1)
    k_cmp = torch.eye(6, dtype=torch.float64).view(1, 6, 1, 6)
    for head in range(3):
        q = torch.zeros(1, 1, 3, 6, dtype=torch.float64)
        q[0, 0, head, 4] = 9
        assert _newest(q, k_cmp, cfg, 24) == [[[[4, 5]]]], head


def test_each_head_is_normalised_by_its_own_sum():
    """One head is sure of block 2; the other has far larger scores, all but equal. Its size must not count."""
    cfg = type(CFG)(l=4, d=4, l_sel=4, n_sel=2, w=4, init_blocks=0, local_blocks=1)
    k_cmp = torch.eye(6, dtype=torch.float64).view(1, 6, 1, 6)
    logits = torch.tensor([[0, 0, 3, 0, 0, 0], [20, 20, 20, 20.5, 20, 20]], dtype=torch.float64)
    for heads in (logits, logits.flip(0)):
        q = heads.view(1, 1, 2, 6) * 6**0.5
        assert _newest(q, k_cmp, cfg, 24) == [[[[2, 5]]]]


@pytest.mark.parametrize("H", [5, 7])
def test_heads_that_do_not_divide_into_groups_are_refused(H):
    q, k, v = inputs(1, 4, 40, G=1, R=H)
    k, v = k.expand(-1, -1, 2, -1), v.expand(-1, -1, 2, -1)
    with pytest.raises(ValueError, match=f"{H}.*2|2.*{H}"):
        sliding_window_attention(q, k, v, CFG)
