"""The compressed branch in Triton on a GPU: output and gradients within the budget of eager attention, against fp64."""

import pytest
import torch

from nsa import NSAConfig, compressed_attention, routing
from nsa.blocks import n_compressed
from nsa.testing import allowed_mask, assert_within_budget, inputs, oracle, shapes
from nsa.tests import compressed_cases as cases
from nsa.tests.compressed_cases import PAPER, SMALL

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HALF = torch.bfloat16
SHAPES = [shape for shape in shapes.KERNEL_SHAPES if max(shape[5:]) <= 128]


def _within_budget(launched, shape, cfg, dtype, **more):
    B, T, S, G, R, Dk, Dv = shape
    C = n_compressed(S, cfg)
    q, k, v = inputs(B, T, C, G=G, R=R, Dk=Dk, Dv=Dv, dtype=dtype, device="cuda", **more)
    mask = allowed_mask(oracle.seen_compressed(T, B, G, cfg, S), C, R, "cuda")

    def run(q, k, v):
        return compressed_attention(q, k, v, cfg, seq_len=S, backend="triton")[0]

    with launched("compressed", "triton"), launched("compressed_backward", "triton"):
        assert_within_budget(run, q, k, v, mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s)))
def test_output_and_gradients_are_within_the_budget(needs, launched, shape, dtype):
    """Strided; a block every few tokens, so that some hundreds of tokens have many tiles of keys, whole and cut."""
    needs("compressed", "triton", dtype)
    _within_budget(launched, shape, SMALL, dtype, contiguous=False)


@pytest.mark.parametrize("name", shapes.PATTERNS)
def test_every_pattern(needs, launched, name):
    needs("compressed", "triton")
    _within_budget(launched, (1, 700, 900, 2, 6, 64, 64), shapes.PATTERNS[name], HALF)


def test_many_pieces_and_every_row_from_the_first_on(needs, launched):
    needs("compressed", "triton")
    _within_budget(launched, (2, 2100, 2100, 2, 6, 64, 64), PAPER, HALF)
    _within_budget(launched, (1, 1500, 1500, 1, 16, 128, 128), PAPER, HALF)


@pytest.mark.parametrize("contiguous", [True, False])
def test_head_dims_off_the_tile(needs, launched, contiguous):
    needs("compressed", "triton")
    for shape in ((1, 300, 700, 1, 70, 32, 24), (1, 90, 130, 2, 4, 41, 7)):
        _within_budget(launched, shape, SMALL, HALF, contiguous=contiguous)


@pytest.mark.parametrize("gated", [False, True])
def test_lse_gates_reads_and_rows_that_see_nothing(needs, gated):
    needs("compressed", "triton")
    for shape in ((1, 600, 600, 2, 4, 128, 128), (2, 1, 900, 2, 16, 64, 64), (1, 20, 20, 1, 6, 64, 64)):
        assert cases.excess(shape, PAPER, HALF, gated=gated, device="cuda") == {}


@pytest.mark.parametrize("gated", [False, True])
def test_ragged_rows_are_the_rows_alone(needs, gated):
    needs("compressed", "triton")
    lengths = [3000, 0, 5, 301, 32]
    assert cases.excess((5, 300, 3000, 2, 6, 64, 64), PAPER, HALF, gated=gated, lengths=lengths, device="cuda") == {}


def test_ragged_rows_by_the_public_function(needs, launched):
    needs("compressed", "triton")
    lengths = [500, 9, 133]
    q, k, v = inputs(3, 9, n_compressed(500, PAPER), G=2, R=6, Dk=64, Dv=64, dtype=HALF, device="cuda")
    mask = allowed_mask(oracle.seen_compressed(9, 3, 2, PAPER, lengths), k.shape[1], 6, "cuda")
    seq_len = torch.tensor(lengths, dtype=torch.int32, device="cuda")

    def run(q, k, v):
        return compressed_attention(q, k, v, PAPER, seq_len=seq_len, backend="triton")[0]

    with launched("compressed", "triton"), launched("compressed_backward", "triton"):
        assert_within_budget(run, q, k, v, mask)


def test_reads_are_counted_and_keys_past_the_end_are_not_read(needs, launched):
    needs("compressed", "triton")
    C = n_compressed(500, PAPER)
    q, k, v = inputs(2, 33, C, G=2, R=3, Dk=64, Dv=64, dtype=HALF, device="cuda")
    leaves = [torch.cat([x, torch.full_like(x[:, :9], torch.nan)], 1).requires_grad_() for x in (k, v)]
    reads = torch.zeros(2, 2, dtype=torch.int64, device="cuda")
    with launched("compressed", "triton"):
        out, _ = compressed_attention(q, *leaves, PAPER, seq_len=500, reads=reads, backend="triton")
    assert torch.equal(reads.cpu(), oracle.count(oracle.seen_compressed(33, 2, 2, PAPER, 500)))
    assert out.isfinite().all()
    for gradient in torch.autograd.grad(out.sum(), leaves):
        assert gradient.isfinite().all()
        assert not gradient[:, C:].any()


def test_wide_heads_are_refused(needs):
    needs("compressed", "triton")
    q, k, v = inputs(1, 130, 200, R=4, Dk=192, Dv=128, dtype=HALF, device="cuda")
    with pytest.raises(routing.Unsupported, match="head dims up to 128, not 192"):
        compressed_attention(q, k, v, PAPER, seq_len=200, backend="triton")


def test_equal_runs_are_equal_bit_for_bit(needs, launched):
    needs("compressed", "triton")
    cfg, S = NSAConfig(), 4300
    made = inputs(1, S, n_compressed(S, cfg), R=3, Dk=64, Dv=64, dtype=HALF, device="cuda")
    q, k, v = (x.requires_grad_() for x in made)

    def gradients():
        out, lse = compressed_attention(q, k, v, cfg, seq_len=S, backend="triton")
        return out, lse, *torch.autograd.grad(out.float().square().sum(), (q, k, v))

    with launched("compressed_backward", "triton"):
        first = gradients()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(gradients(), first, strict=True))


def test_the_workspace_is_bounded(needs):
    """Beyond the results: the pieces of dk and dv, and two numbers a row."""
    needs("compressed", "triton")
    from nsa.kernels import compressed

    cfg, S = NSAConfig(), 16_384
    given = cases.case((1, S, S, 2, 8, 64, 64), cfg, HALF, True, "cuda")
    q, k, v, dout, _ = given
    out, lse, _ = compressed.forward(q, k, v, None, cfg.pattern, S, False, "triton")
    delta = torch.ones_like(lse)
    for most in (compressed._PIECES_BYTES, 20 << 20):
        with cases.settings(_PIECES_BYTES=most):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            grads = compressed.backward(dout, q, k, v, None, out, lse, cfg.pattern, S, "triton", None, delta)
            results = sum(x.numel() * x.element_size() for x in grads)
            assert torch.cuda.max_memory_allocated() - before <= results + most + 2 * 4 * lse.numel() + (1 << 20)
            del grads


def test_a_compiled_model_breaks_no_graph(needs, launched):
    needs("compressed", "triton")
    made = inputs(1, 200, n_compressed(200, PAPER), R=3, Dk=64, Dv=64, dtype=HALF, device="cuda")
    q, k, v = (x.requires_grad_() for x in made)

    def run(q, k, v):
        return compressed_attention(q, k, v, PAPER, seq_len=200, backend="triton")[0]

    with launched("compressed", "triton"):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v)
    assert torch.equal(compiled, run(q, k, v))
