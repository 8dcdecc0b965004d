"""The fused routes of the compressed and the window branch on a GPU, against fp64 on the same inputs."""

import pytest
import torch

from nsa import NSAConfig, compressed_attention, routing, sliding_window_attention
from nsa.kernels.flash import compressed, operators, window
from nsa.testing import allowed_mask, assert_within_budget, eager, inputs, oracle, shapes, within_budget

CFG = NSAConfig(n_sel=4, w=64)
HALF = (torch.bfloat16, torch.float16)
ROUTES = [(backend, dtype) for backend in ("flash", "sdpa") for dtype in HALF]
WHOLE = (1, 4111, 4111, 2, 3, 64, 64)
every_shape = pytest.mark.parametrize("shape", shapes.KERNEL_SHAPES, ids=lambda s: "-".join(map(str, s)))
every_route = pytest.mark.parametrize(("backend", "dtype"), ROUTES, ids=lambda x: str(x).removeprefix("torch."))


@pytest.fixture
def flag():
    """flag(use_fa2=False) sets a flag for the test."""
    yield routing.override
    routing._overrides.clear()
    routing.flags.cache_clear()


@pytest.fixture
def short_cudnn(monkeypatch):
    """Lets cuDNN take sequences that are too short to pay."""
    monkeypatch.setattr(compressed, "_CUDNN_ELEMENTS", 1)


@pytest.fixture
def cuda():
    """Skips where there is no GPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")


def _window(shape, dtype, **more):
    B, T, S, G, R, Dk, Dv = shape
    mask = allowed_mask(oracle.seen_window(T, B, G, CFG, S), S, R, "cuda")
    return inputs(B, T, S, G=G, R=R, Dk=Dk, Dv=Dv, dtype=dtype, device="cuda", **more), mask


def _compressed(shape, dtype, **more):
    B, T, S, G, R, Dk, Dv = shape
    C = len(oracle.compressed_spans(S, CFG))
    mask = allowed_mask(oracle.seen_compressed(T, B, G, CFG, S), C, R, "cuda")
    return inputs(B, T, C, G=G, R=R, Dk=Dk, Dv=Dv, dtype=dtype, device="cuda", **more), mask


@every_route
@pytest.mark.parametrize("contiguous", [True, False])
@every_shape
def test_window_is_within_the_budget(cuda, needs, launched, shape, contiguous, backend, dtype):
    needs("window", backend, dtype)
    (q, k, v), mask = _window(shape, dtype, contiguous=contiguous)
    with launched("window", backend), launched("window_backward", backend):
        assert_within_budget(lambda q, k, v: sliding_window_attention(q, k, v, CFG, backend=backend), q, k, v, mask)


@every_route
@pytest.mark.parametrize("contiguous", [True, False])
@every_shape
def test_compressed_is_within_the_budget(cuda, needs, launched, shape, contiguous, backend, dtype):
    needs("compressed", backend, dtype)
    (q, k, v), mask = _compressed(shape, dtype, contiguous=contiguous)

    def run(q, k, v):
        return compressed_attention(q, k, v, CFG, seq_len=shape[2], backend=backend)[0]

    with launched("compressed", backend), launched("compressed_backward", backend):
        assert_within_budget(run, q, k, v, mask)


@pytest.mark.parametrize("backend", ["cudnn", "flash", "sdpa"])
@pytest.mark.parametrize("dtype", HALF)
def test_whole_sequences_are_within_the_budget_on_every_backend(cuda, short_cudnn, launched, backend, dtype):
    (q, k, v), mask = _compressed(WHOLE, dtype)
    try:
        routing.choose("compressed", q, k, v, backend=backend)
    except routing.Unsupported as error:
        pytest.skip(str(error))

    def run(q, k, v):
        return compressed_attention(q, k, v, CFG, seq_len=WHOLE[2], backend=backend)[0]

    with launched("compressed", backend), launched("compressed_backward", backend):
        assert_within_budget(run, q, k, v, mask)


@pytest.mark.parametrize("backend", ["cudnn", "flash", "sdpa"])
@pytest.mark.parametrize("T", [4111, 333, 1])
def test_lse_is_the_natural_logsumexp_and_minus_infinity_where_nothing_is_seen(cuda, short_cudnn, backend, T):
    S = 4111
    q, k, v = inputs(1, T, 260, G=2, R=3, Dk=64, Dv=64, dtype=torch.bfloat16, device="cuda")
    try:
        lse = compressed_attention(q, k, v, CFG, seq_len=S, backend=backend)[1]
    except routing.Unsupported as error:
        pytest.skip(str(error))
    q, k = q.double(), k.double()[:, : len(oracle.compressed_spans(S, CFG))].repeat_interleave(3, 2)
    scores = torch.einsum("bthd,bchd->bthc", q, k) / 8
    ends = torch.arange(k.shape[1], device="cuda") * CFG.d + CFG.l - 1
    hidden = ends > torch.arange(S - T, S, device="cuda")[:, None]
    expected = scores.masked_fill(hidden[None, :, None], -torch.inf).logsumexp(-1)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), expected, rtol=0, atol=1e-4)


@every_route
def test_reads_are_counted_and_keys_past_the_end_are_not_read(cuda, needs, backend, dtype):
    needs("window", backend, dtype)
    q, k, v = inputs(2, 33, 500, G=2, R=3, Dk=64, Dv=64, dtype=dtype, device="cuda")
    spoilt = [torch.cat([x, torch.full_like(x[:, :9], torch.nan)], 1).requires_grad_() for x in (k, v)]
    reads = torch.zeros(2, 2, dtype=torch.int64, device="cuda")
    win = sliding_window_attention(q, *spoilt, CFG, seq_len=500, reads=reads, backend=backend)
    assert torch.equal(reads.cpu(), oracle.count(oracle.seen_window(33, 2, 2, CFG, 500)))
    cmp_reads = torch.zeros_like(reads)
    # 500 blocks and 9 more of which the first 100 or so exist.
    spoilt_cmp = [x.detach().clone() for x in spoilt]
    for x in spoilt_cmp:
        x[:, len(oracle.compressed_spans(500, CFG)) :] = torch.nan
        x.requires_grad_()
    cmp, _ = compressed_attention(q, *spoilt_cmp, CFG, seq_len=500, reads=cmp_reads, backend=backend)
    assert torch.equal(cmp_reads.cpu(), oracle.count(oracle.seen_compressed(33, 2, 2, CFG, 500)))
    for out, leaves in ((win, spoilt), (cmp, spoilt_cmp)):
        assert out.isfinite().all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("backend", ["cudnn", "flash", "sdpa"])
@pytest.mark.parametrize("op", ["window", "compressed"])
def test_equal_runs_have_equal_gradients_bit_for_bit(cuda, short_cudnn, op, backend):
    if (op, backend) == ("window", "cudnn"):
        pytest.skip("window has no cudnn backend")
    C = 4300 if op == "window" else 267
    q, k, v = inputs(1, 4300, C, G=2, R=3, Dk=64, Dv=64, dtype=torch.bfloat16, device="cuda")
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def gradients():
        if op == "window":
            out = sliding_window_attention(*leaves, CFG, backend=backend)
        else:
            out = compressed_attention(*leaves, CFG, seq_len=4300, backend=backend)[0]
        return torch.autograd.grad(out.float().square().sum(), leaves)

    try:
        first = gradients()
    except routing.Unsupported as error:
        pytest.skip(str(error))
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(gradients(), first, strict=True))


@pytest.mark.parametrize("op", ["window", "compressed"])
def test_many_bounded_calls_compute_what_one_does(cuda, needs, monkeypatch, op):
    needs(op, "flash")
    monkeypatch.setattr(operators, "CALL_ELEMENTS", 140 * 6 * 64)
    monkeypatch.setattr(window, "_PROBLEM_QUERIES", 70)
    monkeypatch.setattr(window, "_PROBLEM_WINDOWS", 1)
    shape = (1, 700, 777, 2, 3, 64, 64)
    (q, k, v), mask = (_window if op == "window" else _compressed)(shape, torch.bfloat16)

    def run(q, k, v):
        if op == "window":
            return sliding_window_attention(q, k, v, CFG, backend="flash")
        return compressed_attention(q, k, v, CFG, seq_len=777, backend="flash")[0]

    assert_within_budget(run, q, k, v, mask)


def test_unset_flags_take_the_best_measured_route(cuda, flag, launched):
    flag(use_fa2=None)
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs sm_80 or newer")
    q, k, v = inputs(1, 8192, 511, G=4, R=16, Dk=64, Dv=64, dtype=torch.bfloat16, device="cuda")
    rejected = routing.choose("compressed", q, k, v).rejected
    with launched("compressed", next(name for name in ("triton", "cudnn", "flash") if name not in rejected)):
        compressed_attention(q, k, v, CFG, seq_len=8192)
    for few in (q[:, -1:], q[:, -4096:]):
        with launched("compressed", "flash" if "triton" in rejected else "triton"):
            compressed_attention(few, k, v, CFG, seq_len=8192)
    best = "flash" if "triton" in routing.choose("window", q, q, q).rejected else "triton"
    with launched("window", best):
        sliding_window_attention(q, q[:, :, :4], q[:, :, :4], CFG)


def test_forbidding_fa2_runs_no_flash_at_all(cuda, flag):
    flag(use_fa2=False)
    before = dict(routing.launches)
    (q, k, v), _ = _compressed(WHOLE, torch.bfloat16)
    for T in (WHOLE[1], 100, 1):
        compressed_attention(q[:, -T:], k, v, CFG, seq_len=WHOLE[2])
        sliding_window_attention(q[:, -T:], q[:, :, :2], q[:, :, :2], CFG)
    ran = {key for key, n in routing.launches.items() if n > before.get(key, 0)}
    assert ran
    assert not {key for key in ran if key[1] == "flash"}


def test_the_own_block_and_past_blocks_of_selected_use_the_fused_operator(cuda):
    from nsa.kernels.plain import dense

    q, k, v = (
        x.transpose(1, 2) for x in inputs(7, 64, 64, G=1, R=6, Dk=64, Dv=32, dtype=torch.bfloat16, device="cuda")
    )
    out, lse = dense.forward(q, k, v, 0.125, causal=True)
    mask = torch.ones(64, 64, dtype=torch.bool, device="cuda").tril()
    by_token = [x.transpose(1, 2) for x in (q, k, v)]
    exact = eager(*(x.double() for x in by_token), mask)
    assert within_budget(out.transpose(1, 2), eager(*by_token, mask), exact, "out") == []
    scores = (q.double() @ k.double().transpose(-1, -2) / 8).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=0, atol=1e-4)
