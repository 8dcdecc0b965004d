"""Triton, backward, against fp64: gradients of the selected branch on given blocks."""

from importlib.util import find_spec

import pytest
import torch

from nsa import NSAConfig, selected_attention
from nsa.testing import allowed_mask, assert_within_budget, fixed_selection, inputs, oracle, shapes
from nsa.tests import selected_cases

CFG = NSAConfig(n_sel=4, w=64)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
pytestmark = pytest.mark.usefixtures("form")


@pytest.fixture(params=["block", "union"])
def form(request, monkeypatch):
    """Each form of the forward in turn, whatever the length."""
    if find_spec("triton") is not None:
        from nsa.kernels import selected

        monkeypatch.setattr(selected, "_UNION", 1 << 20 if request.param == "union" else 0)


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


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gated_sum_and_the_gradients_behind_a_gate(needs, dtype, softmax):
    needs("selected", "triton", dtype)
    pattern = {"l": 32, "d": 16, "l_sel": 64, "n_sel": 4, "w": 64}
    for union, shape in ((0, (2, 90, 500, 2, 6, 64, 64)), (4096, (2, 90, 500, 2, 6, 64, 32))):
        more = {"softmax": softmax, "device": "cuda", "longer": 77, "_UNION": union}
        assert selected_cases.excess(selected_cases.summed(shape, pattern, dtype, **more), dtype, 2.0) == {}


def test_chunks_of_queries_change_no_bit_of_output_and_dq(needs):
    needs("selected", "triton")
    small = {"_PARTIAL_BYTES": 25_000, "_WORDS_BYTES": 170, "_PIECE_ROWS": {"forward": 24, "backward": 24}}
    case = ((2, 68, 80, 1, 2, 16, 16), selected_cases.SMALL, torch.bfloat16)
    whole, parts = (selected_cases.run(*case, device="cuda", **bounds)[1] for bounds in ({}, small))
    assert all(torch.equal(a, b) for a, b in zip(whole[:2], parts[:2], strict=True))


@pytest.mark.parametrize("length", [1000, 64])
def test_every_block_chosen_is_the_window_of_the_whole_past(needs, length):
    needs("selected", "triton")
    needs("window", "triton")
    from nsa.kernels import selected

    cfg = NSAConfig()
    q, k, v = inputs(2, length, length, G=2, R=6, Dk=64, Dv=64, dtype=torch.bfloat16, device="cuda")
    dout, blocks = torch.randn_like(q), fixed_selection(2, length, 2, length, cfg, device="cuda")
    assert selected.takes_all("triton", q, k, v, cfg.pattern, length)
    found = []
    for chosen in (None, blocks):
        out, lse, _ = selected.forward(q, k, v, chosen, cfg.pattern, length, False, "triton")
        past = (dout, q, k, v, chosen, out, lse, cfg.pattern, length, "triton", None, None)
        found.append((out, *selected.backward(*past, plus=(q, q))))
    for a, b in zip(*found, strict=True):
        assert float((a - b).norm() / b.norm()) <= selected_cases.TOLERANCE[torch.bfloat16]
