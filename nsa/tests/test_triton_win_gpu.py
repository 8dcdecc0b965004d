"""The sliding window in Triton on a GPU: output and gradients within the budget of eager attention, against fp64."""

import pytest
import torch

from nsa import NSAConfig, routing, sliding_window_attention
from nsa.testing import allowed_mask, assert_within_budget, inputs, oracle, shapes
from nsa.tests import window_cases as cases

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HALF = torch.bfloat16
SHAPES = [shape for shape in shapes.KERNEL_SHAPES if max(shape[5:]) <= 128]


def _within_budget(launched, shape, w, dtype, **more):
    B, T, S, G, R, Dk, Dv = shape
    cfg = NSAConfig(w=w)
    q, k, v = inputs(B, T, S, G=G, R=R, Dk=Dk, Dv=Dv, dtype=dtype, device="cuda", **more)
    mask = allowed_mask(oracle.seen_window(T, B, G, cfg, S), S, R, "cuda")
    with launched("window", "triton"), launched("window_backward", "triton"):
        assert_within_budget(lambda q, k, v: sliding_window_attention(q, k, v, cfg, backend="triton"), q, k, v, mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s)))
def test_output_and_gradients_are_within_the_budget(needs, launched, shape, dtype):
    """Strided; a window of a few tiles and one key more, that cuts tiles at both edges of the band."""
    needs("window", "triton", dtype)
    _within_budget(launched, shape, 65, dtype, contiguous=False)


@pytest.mark.parametrize("contiguous", [True, False])
def test_head_dims_off_the_tile_and_windows_below_it(needs, launched, contiguous):
    needs("window", "triton")
    for shape, w in (
        ((2, 33, 79, 2, 3, 64, 64), 20),
        ((1, 300, 700, 1, 70, 32, 24), 129),
        ((1, 90, 130, 2, 4, 41, 7), 50),
    ):
        _within_budget(launched, shape, w, HALF, contiguous=contiguous)


def test_wide_heads_are_refused(needs):
    needs("window", "triton")
    q, k, v = inputs(1, 130, 200, R=4, Dk=192, Dv=128, dtype=HALF, device="cuda")
    with pytest.raises(routing.Unsupported, match="head dims up to 128, not 192"):
        sliding_window_attention(q, k, v, NSAConfig(w=64), backend="triton")


@pytest.mark.parametrize("w", [2, 128, 512, 5000])
def test_any_window(needs, launched, w):
    needs("window", "triton")
    _within_budget(launched, (1, 900, 1100, 2, 6, 64, 64), w, HALF)


def test_lse_and_keys_before_every_window(needs, launched):
    needs("window", "triton")
    for shape, w in (((1, 200, 900, 2, 4, 128, 128), 100), ((2, 1, 900, 2, 16, 64, 64), 512)):
        assert cases.excess(shape, w, HALF, device="cuda") == {}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gate_of_each_row_scales_the_gradient_of_its_output(needs, dtype):
    needs("window", "triton", dtype)
    for shape, w in (((2, 333, 700, 2, 6, 64, 64), 129), ((1, 200, 200, 1, 16, 128, 128), 100)):
        for contiguous in (True, False):
            assert cases.excess(shape, w, dtype, device="cuda", contiguous=contiguous, gated=True) == {}, shape


def test_ragged_rows_see_their_own_length_only(needs, launched):
    needs("window", "triton")
    cfg, lengths = NSAConfig(w=64), [500, 9, 133]
    q, k, v = inputs(3, 9, 500, G=2, R=6, Dk=64, Dv=64, dtype=HALF, device="cuda")
    mask = allowed_mask(oracle.seen_window(9, 3, 2, cfg, lengths), 500, 6, "cuda")
    seq_len = torch.tensor(lengths, dtype=torch.int32, device="cuda")

    def run(q, k, v):
        return sliding_window_attention(q, k, v, cfg, seq_len=seq_len, backend="triton")

    with launched("window", "triton"), launched("window_backward", "triton"):
        assert_within_budget(run, q, k, v, mask)


def test_reads_are_counted_and_keys_past_the_end_are_not_read(needs, launched):
    needs("window", "triton")
    cfg = NSAConfig(w=64)
    q, k, v = inputs(2, 33, 500, G=2, R=3, Dk=64, Dv=64, dtype=HALF, device="cuda")
    leaves = [torch.cat([x, torch.full_like(x[:, :9], torch.nan)], 1).requires_grad_() for x in (k, v)]
    reads = torch.zeros(2, 2, dtype=torch.int64, device="cuda")
    with launched("window", "triton"):
        out = sliding_window_attention(q, *leaves, cfg, seq_len=500, reads=reads, backend="triton")
    assert torch.equal(reads.cpu(), oracle.count(oracle.seen_window(33, 2, 2, cfg, 500)))
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), leaves))


def test_equal_runs_are_equal_bit_for_bit(needs, launched):
    needs("window", "triton")
    q, k, v = (x.requires_grad_() for x in inputs(1, 4300, 4300, R=3, Dk=64, Dv=64, dtype=HALF, device="cuda"))

    def gradients():
        out = sliding_window_attention(q, k, v, NSAConfig(w=512), backend="triton")
        return out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))

    with launched("window_backward", "triton"):
        first = gradients()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(gradients(), first, strict=True))


def test_no_tensor_of_an_outputs_size_is_made_besides_the_results(needs):
    needs("window", "triton")
    q, k, v = (x.requires_grad_() for x in inputs(1, 4096, 4096, R=8, Dk=64, Dv=64, dtype=HALF, device="cuda"))
    out = sliding_window_attention(q, k, v, NSAConfig(w=512), backend="triton")
    dout = torch.ones_like(out)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = torch.autograd.grad(out, (q, k, v), dout)
    results = sum(x.numel() * x.element_size() for x in grads)
    assert torch.cuda.max_memory_allocated() - before < results + out.numel() * out.element_size() // 4


def test_a_compiled_model_breaks_no_graph(needs, launched):
    needs("window", "triton")
    cfg = NSAConfig(w=64)
    q, k, v = (x.requires_grad_() for x in inputs(1, 200, 200, R=3, Dk=64, Dv=64, dtype=HALF, device="cuda"))

    def run(q, k, v):
        return sliding_window_attention(q, k, v, cfg, backend="triton")

    with launched("window", "triton"):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v)
    assert torch.equal(compiled, run(q, k, v))
    assert routing.choose("window", q, k, v, backend="triton").backend == "triton"
