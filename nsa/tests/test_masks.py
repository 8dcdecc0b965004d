"""Who may see whom: causality bit for bit, visibility to the token, the window's width, queries that see nothing."""

import pytest
import torch

from nsa import compress, compressed_attention, select_blocks, selected_attention, sliding_window_attention
from nsa.ops.compress import make_phi
from nsa.testing import fixed_selection, inputs, oracle, shapes

PATTERNS = [pytest.param(cfg, id=name) for name, cfg in shapes.PATTERNS.items()]
SELECTED_BACKENDS = ("reference", "torch")


def _branches(q, k, v, cfg, backend):
    """Outputs of all branches and the selection, from un-rotated keys, queries at the last T positions."""
    S = k.shape[1]
    phi = make_phi(cfg, k.shape[-1]).to(k)
    k_cmp, v_cmp = compress(k, phi, cfg), compress(v, phi, cfg)
    cmp, lse = compressed_attention(q, k_cmp, v_cmp, cfg, seq_len=S)
    chosen = select_blocks(q, k_cmp, lse, cfg, seq_len=S)
    sel = selected_attention(q, k, v, chosen, cfg, backend=backend)
    win = sliding_window_attention(q, k, v, cfg)
    return {"cmp": cmp, "lse": lse, "blocks": chosen, "sel": sel, "win": win}


@pytest.mark.parametrize("backend", SELECTED_BACKENDS)
@pytest.mark.parametrize("cfg", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("huge", [1e4, -3e18])
def test_the_future_changes_nothing_bit_for_bit(cfg, backend, dtype, huge):
    S = 65
    q, k, v = inputs(1, S, S, dtype=dtype)
    before = _branches(q, k, v, cfg, backend)
    for s in (1, 8, 16, 31, 40, 64):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, s:] = huge
        after = _branches(*changed, cfg, backend)
        for name, value in after.items():
            assert torch.equal(value[:, :s], before[name][:, :s]), f"token {s} changed {name} before it"


@pytest.mark.parametrize("cfg", PATTERNS)
def test_a_token_in_the_querys_own_block_but_after_it_stays_unseen(cfg):
    S = 3 * cfg.l_sel
    q, k, v = inputs(1, S, S)
    k.requires_grad_()
    chosen = fixed_selection(1, S, 2, S, cfg)
    for backend in SELECTED_BACKENDS:
        out = selected_attention(q, k, v, chosen, cfg, backend=backend)
        for t in range(2 * cfg.l_sel, S):
            (grad,) = torch.autograd.grad(out[:, t].sum(), k, retain_graph=True)
            assert not grad[:, t + 1 :].any(), (backend, t)


def _influences(out, t, k):
    """Indices of k that move the output of query t."""
    (grad,) = torch.autograd.grad(out[:, t].square().sum(), k, retain_graph=True)
    return grad.abs().sum((0, 2, 3)).nonzero().flatten().tolist()


@pytest.mark.parametrize("cfg", PATTERNS)
def test_a_compressed_block_is_seen_from_its_last_token_on(cfg):
    S = 4 * cfg.l + 3
    spans = oracle.compressed_spans(S, cfg)
    q, k, v = inputs(1, S, len(spans))
    v.requires_grad_()
    out, _ = compressed_attention(q, k, v, cfg, seq_len=S)
    for t in range(S):
        assert _influences(out, t, v) == [j for j, span in enumerate(spans) if max(span) <= t], t


@pytest.mark.parametrize("T", [1, 7, 60])
@pytest.mark.parametrize("cfg", PATTERNS)
def test_the_window_is_exactly_w_tokens(cfg, T):
    S = 60
    q, k, v = inputs(1, T, S)
    v.requires_grad_()
    out = sliding_window_attention(q, k, v, cfg)
    for i in range(T):
        t = S - T + i
        assert _influences(out, i, v) == list(range(max(0, t - cfg.w + 1), t + 1)), t


@pytest.mark.parametrize("backend", SELECTED_BACKENDS)
@pytest.mark.parametrize("T", [1, 7, 60])
@pytest.mark.parametrize("cfg", PATTERNS)
def test_selected_tokens_are_those_of_the_blocks_up_to_the_query(cfg, T, backend):
    S = 60
    q, k, v = inputs(1, T, S, G=1)
    v.requires_grad_()
    chosen = fixed_selection(1, T, 1, S, cfg)
    out = selected_attention(q, k, v, chosen, cfg, backend=backend)
    for i in range(T):
        listed = chosen[0, i, 0].tolist()
        assert _influences(out, i, v) == [s for s in range(S - T + i + 1) if s // cfg.l_sel in listed], i


@pytest.mark.parametrize("op", ["compressed", "selected-reference", "selected-torch", "window"])
def test_one_query_at_the_end_is_the_last_row_of_many(op):
    """A mask aligned to the top left would let a single query see only the first key."""
    cfg, S = shapes.PATTERNS["small"], 77
    q, k, v = inputs(2, S, S)
    C = len(oracle.compressed_spans(S, cfg))
    chosen = fixed_selection(2, S, 2, S, cfg)

    def run(T):
        tail = q[:, S - T :]
        if op == "compressed":
            return compressed_attention(tail, k[:, :C], v[:, :C], cfg, seq_len=S)[0]
        if op == "window":
            return sliding_window_attention(tail, k, v, cfg)
        return selected_attention(tail, k, v, chosen[:, S - T :], cfg, backend=op.split("-")[1])

    torch.testing.assert_close(run(1), run(S)[:, -1:], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(run(6), run(S)[:, -6:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cfg", PATTERNS)
def test_queries_before_the_first_whole_block_get_zero_and_minus_infinity(cfg, dtype):
    S = 2 * cfg.l + 1
    q, k, v = inputs(2, S, len(oracle.compressed_spans(S, cfg)), dtype=dtype)
    for x in (q, k, v):
        x.requires_grad_()
    out, lse = compressed_attention(q, k, v, cfg, seq_len=S)
    assert not out[:, : cfg.l - 1].any()
    assert (lse[:, : cfg.l - 1] == -torch.inf).all()
    assert lse[:, cfg.l - 1 :].isfinite().all()
    gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert all(grad.isfinite().all() for grad in gradients)
    assert not gradients[0][:, : cfg.l - 1].any()


@pytest.mark.parametrize("T", [1, 7])
@pytest.mark.parametrize("cfg", [shapes.PATTERNS["small"], shapes.PATTERNS["paper"]], ids=["small", "paper"])
def test_a_sequence_without_a_whole_block_is_empty_not_nan(cfg, T):
    q, k, v = inputs(2, T, 0)
    for x in (q, k, v):
        x.requires_grad_()
    out, lse = compressed_attention(q, k, v, cfg, seq_len=7)
    assert out.shape == q.shape
    assert not out.any()
    assert (lse == -torch.inf).all()
    gradients = torch.autograd.grad(out.sum(), (q, k, v), allow_unused=False)
    assert [g.shape for g in gradients] == [q.shape, k.shape, v.shape]
    assert not gradients[0].any()
    chosen = select_blocks(q, k, lse, cfg, seq_len=7)
    assert chosen[..., 0].eq(0).all()
    assert chosen[..., 1:].eq(-1).all()


def test_a_tile_that_sees_nothing_before_one_that_does_is_finite():
    """Rows 0..62 see no block, far more than one tile of any kernel; keys are huge, so a running max that is not
    guarded shows."""
    cfg = type(shapes.PATTERNS["small"])(l=64, d=32, l_sel=64, n_sel=3, w=8)
    q, k, v = inputs(1, 200, len(oracle.compressed_spans(200, cfg)))
    k = (k * 200).requires_grad_()
    out, lse = compressed_attention(q, k, v, cfg, seq_len=200)
    want, want_lse = oracle.compressed_attention(q, k, v, cfg, seq_len=200)
    torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lse, want_lse, rtol=1e-10, atol=1e-10)
    (grad,) = torch.autograd.grad(out.sum(), k)
    assert grad.isfinite().all()


@pytest.mark.parametrize("backend", SELECTED_BACKENDS)
def test_scores_of_any_size_do_not_overflow(backend):
    cfg, S = shapes.PATTERNS["small"], 65
    q, k, v = inputs(1, S, S, dtype=torch.float32)
    outs = _branches(q * 1e3, k * 1e3, v, cfg, backend)
    assert all(outs[name].isfinite().all() for name in ("cmp", "sel", "win"))
