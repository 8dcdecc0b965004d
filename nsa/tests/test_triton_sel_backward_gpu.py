"""Triton, backward, against fp64: gradients of the selected branch on given blocks."""

import pytest
import torch

from nsa import NSAConfig, selected_attention
from nsa.testing import allowed_mask, assert_within_budget, fixed_selection, inputs, oracle, shapes
from nsa.tests import selected_cases

CFG = NSAConfig(n_sel=4, w=64)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _case(shape, dtype, **more):
    B, T, S, G, R, Dk, Dv = shape
    chosen = fixed_selection(B, T, G, S, CFG, device="cuda")
    mask = allowed_mask(oracle.seen_selected(chosen, CFG, S), S, R, "cuda")
    return inputs(B, T, S, G=G, R=R, Dk=Dk, Dv=Dv, dtype=dtype, device="cuda", **more), chosen, mask


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("shape", shapes.KERNEL_SHAPES, ids=lambda s: "-".join(map(str, s)))
def test_every_gradient_is_within_the_budget_of_eager_attention(needs, launched, shape, contiguous, dtype):
    needs("selected", "triton", dtype)
    (q, k, v), chosen, mask = _case(shape, dtype, contiguous=contiguous)
    with launched("selected", "triton"), launched("selected_backward", "triton"):
        assert_within_budget(lambda q, k, v: selected_attention(q, k, v, chosen, CFG, backend="triton"), q, k, v, mask)


@pytest.mark.parametrize("slot", range(4))
def test_an_empty_slot_gets_no_gradient_and_takes_none(needs, launched, slot):
    needs("selected", "triton")
    (q, k, v), chosen, _ = _case((2, 33, 500, 2, 6, 64, 64), torch.bfloat16)
    chosen[..., slot] = -1
    mask = allowed_mask(oracle.seen_selected(chosen, CFG, 500), 500, 6, "cuda")
    with launched("selected_backward", "triton"):
        assert_within_budget(lambda q, k, v: selected_attention(q, k, v, chosen, CFG, backend="triton"), q, k, v, mask)


def test_an_index_out_of_range_gets_no_gradient_and_takes_none(needs, launched):
    needs("selected", "triton")
    (q, k, v), chosen, _ = _case((2, 33, 500, 2, 6, 64, 64), torch.bfloat16)
    chosen = chosen.cpu()
    selected_cases.out_of_range(500, CFG.l_sel)(chosen)
    own = torch.arange(500 - 33, 500)[:, None, None] // CFG.l_sel
    legal = chosen.masked_fill((chosen < 0) | (chosen > own), -1)
    mask = allowed_mask(oracle.seen_selected(legal, CFG, 500), 500, 6, "cuda")
    chosen = chosen.cuda()
    with launched("selected_backward", "triton"):
        assert_within_budget(lambda q, k, v: selected_attention(q, k, v, chosen, CFG, backend="triton"), q, k, v, mask)


def test_equal_runs_have_equal_gradients_bit_for_bit(needs, launched):
    needs("selected", "triton")
    (q, k, v), chosen, _ = _case((1, 257, 2049, 2, 6, 64, 64), torch.bfloat16)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def gradients():
        out = selected_attention(*leaves, chosen, CFG, backend="triton")
        return torch.autograd.grad(out.float().square().sum(), leaves)

    with launched("selected_backward", "triton"):
        first = gradients()
    for _ in range(4):
        assert all(torch.equal(a, b) for a, b in zip(gradients(), first, strict=True))
