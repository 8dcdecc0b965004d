"""On a GPU: what routing picks there, against fp64 on the same rounded inputs, and against the CPU."""

import dataclasses

import pytest
import torch

from nsa import (
    KVCache,
    NSAConfig,
    Transformer,
    blocks,
    compressed_attention,
    select_blocks,
    selected_attention,
    sliding_window_attention,
)
from nsa.config import ModelConfig
from nsa.testing import allowed_mask, assert_low_regret, assert_within_budget, fixed_selection, inputs, oracle, shapes

CFG = NSAConfig(n_sel=4, w=64)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def _cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")


@pytest.mark.parametrize("op", ["compressed", "selected", "selected-reference", "window"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", shapes.KERNEL_SHAPES, ids=lambda s: "-".join(map(str, s)))
def test_every_branch_is_within_the_budget(op, shape, dtype):
    B, T, S, G, R, Dk, Dv = shape
    keys = len(oracle.compressed_spans(S, CFG)) if op == "compressed" else S
    q, k, v = inputs(B, T, keys, G=G, R=R, Dk=Dk, Dv=Dv, dtype=dtype, device="cuda", contiguous=False)
    chosen = fixed_selection(B, T, G, S, CFG, device="cuda")
    seen = {
        "compressed": lambda: oracle.seen_compressed(T, B, G, CFG, S),
        "window": lambda: oracle.seen_window(T, B, G, CFG, S),
    }.get(op, lambda: oracle.seen_selected(chosen, CFG, S))()

    def run(q, k, v):
        if op == "compressed":
            return compressed_attention(q, k, v, CFG, seq_len=S)[0]
        if op == "window":
            return sliding_window_attention(q, k, v, CFG)
        backend = "reference" if op.endswith("reference") else None
        return selected_attention(q, k, v, chosen, CFG, backend=backend)

    assert_within_budget(run, q, k, v, allowed_mask(seen, keys, R, "cuda"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_choice_swaps_near_ties_only(dtype):
    S = 2049
    q, k, _ = inputs(1, 300, len(oracle.compressed_spans(S, CFG)), R=3, Dk=64, dtype=dtype, device="cuda")
    lse = compressed_attention(q, k, k, CFG, seq_len=S)[1]
    scores = oracle.selection_scores(q.cpu(), k.cpu(), CFG, seq_len=S)
    chosen = select_blocks(q, k, lse, CFG, seq_len=S).cpu()
    assert_low_regret(chosen, scores, oracle.choose_blocks(scores, CFG, seq_len=S))


def _model(**changes):
    torch.manual_seed(0)
    nsa = dataclasses.replace(shapes.PATTERNS["small"], **changes)
    cfg = ModelConfig(vocab_size=31, dim=32, n_layers=2, n_heads=6, n_kv_groups=2, d_k=16, d_v=16, nsa=nsa)
    return Transformer(cfg)


@pytest.mark.parametrize("phi", ["avg", "linear", "mlp"])
def test_the_model_is_the_same_as_on_the_cpu_in_fp64(phi):
    model = _model(phi=phi).double()
    ids = torch.randint(31, (2, 300), generator=torch.Generator().manual_seed(0))
    model.loss(ids, ids.roll(1, 1)).backward()
    want = [p.grad.clone() for p in model.parameters()]
    logits = model(ids).detach()
    model.zero_grad()
    model.cuda()
    ids = ids.cuda()
    torch.testing.assert_close(model(ids).detach().cpu(), logits, rtol=1e-10, atol=1e-10)
    model.loss(ids, ids.roll(1, 1)).backward()
    for p, grad in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad.cpu(), grad, rtol=1e-9, atol=1e-10)


@torch.no_grad()
def test_tiles_and_decode_equal_the_whole_and_count_their_reads():
    model = _model().double().cuda()
    ids = torch.randint(31, (2, 150), generator=torch.Generator().manual_seed(0)).cuda()
    cache, outs, start = KVCache(model.cfg, 2, 150, device="cuda", dtype=torch.float64), [], 0
    for tile in (70, 1, 16, 60, 1, 1, 1):
        outs.append(model(ids[:, start : start + tile], cache))
        start += tile
    torch.testing.assert_close(torch.cat(outs, 1), model(ids), rtol=1e-10, atol=1e-10)
    assert tuple(cache.reads()) == tuple(blocks.reads_range(0, 150, model.cfg.nsa))


def test_equal_training_steps_are_equal_bit_for_bit():
    model = _model(phi="mlp").cuda()
    ids = torch.randint(31, (2, 300), generator=torch.Generator().manual_seed(0)).cuda()

    def gradients():
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            model.loss(ids, ids.roll(1, 1)).backward()
        return [p.grad.clone() for name, p in model.named_parameters() if "embed" not in name]

    first = gradients()
    assert all(torch.equal(a, b) for a, b in zip(gradients(), first, strict=True))


def test_nothing_is_computed_on_the_cpu_by_the_way():
    """Every tensor of a step, gradients and counters included, stays on the GPU."""
    model = _model().cuda()
    ids = torch.randint(31, (1, 100), device="cuda")
    cache = KVCache(model.cfg, 1, 100, device="cuda", dtype=torch.float32)
    with torch.no_grad():
        assert model(ids, cache).is_cuda
    assert all(layer.reads.is_cuda for layer in cache.layers)
