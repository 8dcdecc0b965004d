"""Triton, forward, against fp64: the selected branch on given blocks, and the choice of blocks."""

from importlib.util import find_spec

import pytest
import torch

from nsa import NSAConfig, compressed_attention, select_blocks, selected_attention
from nsa.testing import (
    allowed_mask,
    assert_low_regret,
    check_blocks,
    eager,
    fixed_selection,
    inputs,
    oracle,
    shapes,
    within_budget,
)
from nsa.tests import selected_cases

CFG = NSAConfig(n_sel=4, w=64)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
every_shape = pytest.mark.parametrize(
    "shape", [*shapes.KERNEL_SHAPES, shapes.ONE_TOKEN], ids=lambda s: "-".join(map(str, s))
)


@pytest.fixture(params=["block", "union"])
def form(request, monkeypatch):
    """Each form of the forward in turn, whatever the length."""
    if find_spec("triton") is not None:
        from nsa.kernels import selected

        monkeypatch.setattr(selected, "_UNION", 1 << 20 if request.param == "union" else 0)


def _inputs(shape, dtype, **more):
    B, T, S, G, R, Dk, Dv = shape
    return inputs(B, T, S, G=G, R=R, Dk=Dk, Dv=Dv, dtype=dtype, device="cuda", **more)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("contiguous", [True, False])
@every_shape
def test_selected_forward_is_within_the_budget_of_eager_attention(needs, launched, shape, contiguous, dtype):
    needs("selected", "triton", dtype)
    q, k, v = _inputs(shape, dtype, contiguous=contiguous)
    B, T, S, G, R, _, _ = shape
    chosen = fixed_selection(B, T, G, S, CFG, device="cuda")
    mask = allowed_mask(oracle.seen_selected(chosen, CFG, S), S, R, "cuda")
    with launched("selected", "triton"):
        got = selected_attention(q, k, v, chosen, CFG, backend="triton")
    exact = eager(q.double(), k.double(), v.double(), mask)
    assert within_budget(got, eager(q, k, v, mask), exact, "out") == []


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("slot", range(4))
def test_an_empty_slot_is_skipped_wherever_it_stands(needs, launched, slot):
    needs("selected", "triton")
    q, k, v = _inputs((2, 33, 500, 2, 6, 64, 64), torch.bfloat16)
    chosen = fixed_selection(2, 33, 2, 500, CFG, device="cuda")
    chosen[..., slot] = -1
    mask = allowed_mask(oracle.seen_selected(chosen, CFG, 500), 500, 6, "cuda")
    with launched("selected", "triton"):
        got = selected_attention(q, k, v, chosen, CFG, backend="triton")
    exact = eager(q.double(), k.double(), v.double(), mask)
    assert within_budget(got, eager(q, k, v, mask), exact, "out") == []


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("T", [33, 3])
def test_an_index_out_of_range_is_masked_like_an_empty_slot(needs, launched, T):
    """Past any sequence, below -1, and of the query's future."""
    needs("selected", "triton")
    q, k, v = _inputs((2, T, 500, 2, 6, 64, 64), torch.bfloat16)
    chosen = fixed_selection(2, T, 2, 500, CFG)
    selected_cases.out_of_range(500, CFG.l_sel)(chosen)
    own = torch.arange(500 - T, 500)[:, None, None] // CFG.l_sel
    legal = chosen.masked_fill((chosen < 0) | (chosen > own), -1)
    mask = allowed_mask(oracle.seen_selected(legal, CFG, 500), 500, 6, "cuda")
    with launched("selected", "triton"):
        got = selected_attention(q, k, v, chosen.cuda(), CFG, backend="triton")
    exact = eager(q.double(), k.double(), v.double(), mask)
    assert within_budget(got, eager(q, k, v, mask), exact, "out") == []


@pytest.mark.usefixtures("form")
def test_ragged_rows_see_their_own_length_only(needs, launched):
    needs("selected", "triton")
    q, k, v = _inputs((3, 9, 500, 2, 6, 64, 64), torch.bfloat16)
    lengths = [500, 9, 133]
    chosen = torch.cat([fixed_selection(1, 9, 2, S, CFG, device="cuda") for S in lengths])
    for row, S in enumerate(lengths):
        k[row, S:], v[row, S:] = 1e3, -1e3
    mask = allowed_mask(oracle.seen_selected(chosen, CFG, lengths), 500, 6, "cuda")
    seq_len = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    with launched("selected", "triton"):
        got = selected_attention(q, k, v, chosen, CFG, seq_len=seq_len, backend="triton")
    exact = eager(q.double(), k.double(), v.double(), mask)
    assert within_budget(got, eager(q, k, v, mask), exact, "out") == []


@pytest.mark.usefixtures("form")
def test_reads_are_counted_by_the_kernel_that_loads(needs, launched):
    needs("selected", "triton")
    q, k, v = _inputs((2, 33, 500, 2, 6, 64, 64), torch.bfloat16)
    chosen = fixed_selection(2, 33, 2, 500, CFG, device="cuda")
    chosen[0, 5, 1, 2] = -1
    reads = torch.zeros(2, 2, dtype=torch.int64, device="cuda")
    with launched("selected", "triton"):
        selected_attention(q, k, v, chosen, CFG, reads=reads, backend="triton")
    assert torch.equal(reads.cpu(), oracle.count(oracle.seen_selected(chosen, CFG, 500)))


def _choice(shape, dtype, backend, scale=1.0):
    B, T, S, G, R, Dk, _ = shape
    q, k, _ = inputs(B, T, len(oracle.compressed_spans(S, CFG)), G=G, R=R, Dk=Dk, dtype=dtype, device="cuda")
    q = q * scale
    lse = compressed_attention(q, k, k, CFG, seq_len=S)[1]
    return q, k, select_blocks(q, k, lse, CFG, seq_len=S, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@every_shape
def test_the_choice_swaps_near_ties_only(needs, launched, shape, dtype):
    needs("selection", "triton", dtype)
    with launched("selection", "triton"):
        q, k, chosen = _choice(shape, dtype, "triton")
    assert check_blocks(chosen, shape[2], shape[1], CFG) == []
    scores = oracle.selection_scores(q.cpu(), k.cpu(), CFG, seq_len=shape[2])
    assert_low_regret(chosen.cpu(), scores, oracle.choose_blocks(scores, CFG, seq_len=shape[2]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_ties_go_to_the_lower_block(needs, launched, dtype):
    needs("selection", "triton", dtype)
    shape = (1, 65, 2049, 2, 6, 64, 64)
    with launched("selection", "triton"):
        _, _, chosen = _choice(shape, dtype, "triton", scale=0.0)
    own = torch.arange(2049 - 65, 2049) // 64
    assert torch.equal(chosen[0, :, 0].cpu().long(), torch.stack([0 * own, 0 * own + 1, own - 1, own], 1))
