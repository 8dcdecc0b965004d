"""Sliding-window attention: each query attends to the w tokens that end at itself."""

import torch
import torch.nn.functional as F

from nsa import routing
from nsa.config import NSAConfig
from nsa.ops import dense
from nsa.ops.checks import check_qkv, check_seq_len, each_row, longest, pad_front
from nsa.ops.combine import apply_gate


def _visible(t: torch.Tensor, s: torch.Tensor, w: int) -> torch.Tensor:
    """[rows, keys] bool: exactly the tokens t-w+1 .. t."""
    return (s <= t[:, None]) & (s > t[:, None] - w)


def sliding_window_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cfg: NSAConfig, *, seq_len: int
) -> torch.Tensor:
    """The specification, in plain differentiable torch. Shapes as `sliding_window_attention`; seq_len an int."""
    T, H, D = q.shape[1:]
    G = k.shape[2]
    first, k, v = _held(k, v, seq_len)
    dtype = torch.promote_types(q.dtype, torch.float32)
    t = torch.arange(seq_len - T, seq_len, device=q.device)
    visible = _visible(t, torch.arange(first, seq_len, device=q.device), cfg.w)[None, :, None, None]
    scores = torch.einsum("btgrd,bsgd->btgrs", q.to(dtype).unflatten(2, (G, H // G)), k.to(dtype)) * D**-0.5
    p = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("btgrs,bsgd->btgrd", p, v.to(dtype)).flatten(2, 3).to(q.dtype)


def _reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cfg: NSAConfig, S: int, rows: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference's output and the tokens read; ragged rows one by one."""
    T = q.shape[1]
    if rows is None:
        t = torch.arange(S - T, S, device=q.device)
        s = torch.arange(max(S - k.shape[1], 0), S, device=q.device)
        count = _visible(t, s, cfg.w).sum().expand(q.shape[0], k.shape[2])
        return sliding_window_attention_reference(q, k, v, cfg, seq_len=S), count

    def one(b: int, S: int, t: int) -> tuple[torch.Tensor, ...]:
        row = slice(b, b + 1)
        out, count = _reference(q[row, T - t :], k[row], v[row], cfg, S, None)
        return pad_front(out, T, 0.0), count

    out, count = each_row(one, T, rows)
    return out, count


def sliding_window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cfg: NSAConfig,
    *,
    seq_len: int | torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    reads: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Attend to exactly the last w tokens, the query's own included.

    q [B,T,H,Dk], the last T of `seq_len` positions (an int, int32 [B] for ragged rows, or k's length); k [B,K,G,Dk],
    v [B,K,G,Dv]. With K >= seq_len row s of k is position s; a shorter k holds the last K positions, and K must be at
    least min(seq_len, w + T - 1). gate [B,T,H] scales the output; reads, int64 [B,G], gains the tokens read.
    Returns [B,T,H,Dv] in q.dtype. Differentiable in q, k, v, gate. Raises ValueError for inputs that do not fit.
    """
    check_qkv("sliding_window_attention", q, k, v)
    T = q.shape[1]
    S, rows = check_seq_len("sliding_window_attention", q, k.shape[1] if seq_len is None else seq_len)
    needed = min(longest(S, rows), cfg.w + T - 1)
    if k.shape[1] < needed:
        raise ValueError(f"sliding_window_attention: {k.shape[1]} keys, but {T} queries with w = {cfg.w} need {needed}")
    if backend == "reference":
        out, count = _reference(q, k, v, cfg, S, rows)
    else:
        out, _, count = _attend(q, k, v, cfg.w, S, rows, reads is not None, backend)
    if reads is not None:
        reads += count
    return apply_gate(out, gate)


@torch.library.custom_op("nsa::sliding_window_attention", mutates_args=())
def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    w: int,
    seq_len: int,
    rows: torch.Tensor | None,
    count: bool,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    route = routing.choose("window", q, k, v, backend=backend)
    routing.launches["window", route.backend] += 1
    if rows is None:
        return _forward(route.backend, q, k, v, w, seq_len, count)
    T = q.shape[1]

    def one(b: int, S: int, t: int) -> tuple[torch.Tensor, ...]:
        row = slice(b, b + 1)
        out, lse, n = _forward(route.backend, q[row, T - t :], k[row], v[row], w, S, count)
        return pad_front(out, T, 0.0), pad_front(lse, T, float("-inf")), n

    out, lse, n = each_row(one, T, rows)
    return out, lse, n


@_attend.register_fake
def _(q, k, v, w, seq_len, rows, count, backend):
    B, T, H, _ = q.shape
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return (
        q.new_empty(B, T, H, v.shape[3]),
        q.new_empty(B, T, H, dtype=lse_dtype),
        q.new_empty(B, k.shape[2], dtype=torch.int64),
    )


@torch.library.custom_op("nsa::sliding_window_attention_backward", mutates_args=())
def _attend_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    w: int,
    seq_len: int,
    rows: torch.Tensor | None,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    route = routing.choose("window", q, k, v, backend=backend, training=True)
    routing.launches["window_backward", route.backend] += 1
    if rows is None:
        return _backward(route.backend, dout, q, k, v, out, lse, w, seq_len)
    T = q.shape[1]

    def one(b: int, S: int, t: int) -> tuple[torch.Tensor, ...]:
        row, last = slice(b, b + 1), slice(T - t, T)
        past = (q[row, last], k[row], v[row], out[row, last], lse[row, last])
        dq, dk, dv = _backward(route.backend, dout[row, last], *past, w, S)
        return pad_front(dq, T, 0.0), dk, dv

    dq, dk, dv = each_row(one, T, rows)
    return dq, dk, dv


@_attend_backward.register_fake
def _(dout, q, k, v, out, lse, w, seq_len, rows, backend):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx, inputs, output):
    q, k, v, ctx.w, ctx.seq_len, rows, _, ctx.backend = inputs
    out, lse, count = output
    ctx.mark_non_differentiable(lse, count)
    ctx.save_for_backward(q, k, v, out, lse, rows)


def _autograd(ctx, dout, _dlse, _dcount):
    q, k, v, out, lse, rows = ctx.saved_tensors
    grads = _attend_backward(dout, q, k, v, out, lse, ctx.w, ctx.seq_len, rows, ctx.backend)
    return *grads, None, None, None, None, None


_attend.register_autograd(_autograd, setup_context=_setup)


def _held(k: torch.Tensor, v: torch.Tensor, S: int) -> tuple[int, torch.Tensor, torch.Tensor]:
    """(position of the first held row, k, v cut to position S - 1)."""
    first = max(S - k.shape[1], 0)
    return first, k[:, : S - first], v[:, : S - first]


def _all_rows(grad: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The gradient of `_held` rows, zero in those past them."""
    return F.pad(grad, (0, 0, 0, 0, 0, like.shape[1] - grad.shape[1])) if grad.shape != like.shape else grad


def _tiles(T: int, S: int, first: int, w: int, device: torch.device):
    """Yield (query slice, key slice, [rows, keys] visibility) of banded tiles; None where every key is visible.

    A tile of w/4 rows wastes a fifth of its scores on the band's two corners; below 64 rows calls cost more than that.
    """
    step = min(max(w // 4, 64), 512)
    t0 = S - T
    if T == 1:
        yield slice(0, 1), slice(max(S - w - first, 0), S - first), None
        return
    for start in range(0, T, step):
        stop = min(start + step, T)
        low = max(t0 + start - w + 1, first)
        t = torch.arange(t0 + start, t0 + stop, device=device)
        s = torch.arange(low, t0 + stop, device=device)
        yield slice(start, stop), slice(low - first, t0 + stop - first), _visible(t, s, w)


def _forward(
    backend: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, w: int, S: int, count: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    B, T, H, D = q.shape
    first, k, v = _held(k, v, S)
    if backend == "triton" or dense.fused(backend, q):
        from nsa.kernels import window as kernel

        out, lse, read = kernel.forward(backend, q, k, v, w)
        return out, lse, q.new_full((B, k.shape[2]), read if count else 0, dtype=torch.int64)
    out = q.new_empty(B, T, H, v.shape[3])
    lse = q.new_empty(B, T, H, dtype=torch.promote_types(q.dtype, torch.float32))
    n = 0
    for rows, keys, visible in _tiles(T, S, first, w, q.device):
        tile, tile_lse = dense.forward(
            q[:, rows].transpose(1, 2),
            k[:, keys].transpose(1, 2),
            v[:, keys].transpose(1, 2),
            D**-0.5,
            mask=None if visible is None else dense.additive(visible, q.dtype),
        )
        out[:, rows], lse[:, rows] = tile.transpose(1, 2), tile_lse.transpose(1, 2)
        if count:
            n += keys.stop - keys.start if visible is None else int(visible.sum())
    return out, lse, q.new_full((B, k.shape[2]), n, dtype=torch.int64)


def _backward(
    backend: str,
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    w: int,
    S: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    first, k_held, v_held = _held(k, v, S)
    if backend == "triton" or dense.fused(backend, q):
        from nsa.kernels import window as kernel

        dq, dk, dv = kernel.backward(backend, dout, q, k_held, v_held, out, lse, w)
        return dq, _all_rows(dk, k), _all_rows(dv, v)
    dq = q.new_empty(q.shape)
    accumulator = torch.promote_types(q.dtype, torch.float32)
    dk, dv = k.new_zeros(k.shape, dtype=accumulator), v.new_zeros(v.shape, dtype=accumulator)
    for rows, keys, visible in _tiles(q.shape[1], S, first, w, q.device):
        tile_dq, tile_dk, tile_dv = dense.backward(
            dout[:, rows].transpose(1, 2),
            q[:, rows].transpose(1, 2),
            k_held[:, keys].transpose(1, 2),
            v_held[:, keys].transpose(1, 2),
            out[:, rows].transpose(1, 2),
            lse[:, rows].transpose(1, 2),
            q.shape[-1] ** -0.5,
            mask=None if visible is None else dense.additive(visible, q.dtype),
        )
        dq[:, rows] = tile_dq.transpose(1, 2)
        dk[:, keys] += tile_dk.transpose(1, 2)
        dv[:, keys] += tile_dv.transpose(1, 2)
    return dq, dk.to(k.dtype), dv.to(v.dtype)
