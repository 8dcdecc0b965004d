"""The sliding window on dense products: banded tiles of w/4 rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from nsa.blocks import Pattern
from nsa.kernels.plain import dense


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: None, p: Pattern, S: int, count: bool, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out [B,T,H,Dv], lse [B,T,H], tokens read [B,G] or []; q [B,T,H,Dk], k [B,K,G,Dk], v [B,K,G,Dv]."""
    B, T, H, D = q.shape
    first, k, v = held(k, v, S)
    out = q.new_empty(B, T, H, v.shape[3])
    lse = q.new_empty(B, T, H, dtype=torch.promote_types(q.dtype, torch.float32))
    n = 0
    for rows, keys, visible in _tiles(T, S, first, p.w, q.device):
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
    return out, lse, q.new_full((B, k.shape[2]) if count else (0,), n, dtype=torch.int64)


def backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: None, out: torch.Tensor,
    lse: torch.Tensor, p: Pattern, S: int, backend: str, gate: torch.Tensor | None, delta: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """dq, dk, dv of `forward`'s out."""
    first, k_held, v_held = held(k, v, S)
    dout = dense.gated(dout, gate)
    dq = q.new_empty(q.shape)
    accumulator = torch.promote_types(q.dtype, torch.float32)
    dk, dv = k.new_zeros(k.shape, dtype=accumulator), v.new_zeros(v.shape, dtype=accumulator)
    for rows, keys, visible in _tiles(q.shape[1], S, first, p.w, q.device):
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


def held(k: torch.Tensor, v: torch.Tensor, S: int) -> tuple[int, torch.Tensor, torch.Tensor]:
    """(position of the first held row, k, v cut to position S - 1)."""
    first = max(S - k.shape[1], 0)
    return first, k[:, : S - first], v[:, : S - first]


def all_rows(grad: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The gradient of `_held` rows, zero in those past them."""
    return F.pad(grad, (0, 0, 0, 0, 0, like.shape[1] - grad.shape[1])) if grad.shape != like.shape else grad


def _tiles(
    T: int, S: int, first: int, w: int, device: torch.device
) -> Iterator[tuple[slice, slice, torch.Tensor | None]]:
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
        yield slice(start, stop), slice(low - first, t0 + stop - first), (s <= t[:, None]) & (s > t[:, None] - w)
