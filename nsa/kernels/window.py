"""The sliding window by torch's fused operators, which skip the keys outside the band."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from nsa.kernels import fused


def unsupported(backend: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[str]:
    """Reasons against flash for q [B,T,H,Dk], k [B,K,G,Dk], v [B,K,G,Dv]."""
    return fused.unsupported(backend, q, v)


def calls(T: int, K: int, w: int, step: int) -> Iterator[tuple[slice, slice]]:
    """Cut the last T of K rows into calls of at most `step` queries: (queries, the keys that they see together)."""
    for start in range(0, T, step):
        stop = min(start + step, T)
        yield slice(start, stop), slice(max(0, K - T + start - w + 1), K - T + stop)


def reads(T: int, K: int, w: int) -> int:
    """Keys that T queries at the end of K are handed: each its own and those before it, w at most."""
    shortest = K - T + 1
    short = min(max(w - shortest, 0), T)
    return short * shortest + short * (short - 1) // 2 + (T - short) * w


def _step(q: torch.Tensor, w: int) -> int:
    """Queries a call: bounded by its workspace, and not so few that the window's w - 1 further keys outweigh them."""
    B, _, H, D = q.shape
    return max(fused.CALL_ELEMENTS // (B * H * D), 4 * w, 1)


def _band(rows: slice, w: int) -> int | None:
    """The window of these queries. One alone is given just its own keys: FA-2 splits what has no band over the card."""
    return None if rows.stop - rows.start == 1 else w


def forward(
    backend: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, w: int
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """out [B,T,H,Dv], lse [B,T,H] fp32, and the keys read by one batch row and group.

    q [B,T,H,Dk] are the last T of the K positions that k [B,K,G,Dk] and v [B,K,G,Dv] hold.
    """
    B, T, H, D = q.shape
    out, lse, n = q.new_empty(B, T, H, v.shape[3]), q.new_empty(B, T, H, dtype=torch.float32), 0
    for rows, keys in calls(T, k.shape[1], w, _step(q, w)):
        part, part_lse = fused.forward(
            backend, q[:, rows], k[:, keys], v[:, keys], D**-0.5, causal=True, window=_band(rows, w)
        )
        out[:, rows], lse[:, rows] = part, part_lse.transpose(1, 2)
        n += reads(rows.stop - rows.start, keys.stop - keys.start, w)
    return out, lse, n


def backward(
    backend: str,
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    w: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv of `forward`'s out; keys that two calls share are summed in fp32."""
    D = q.shape[3]
    dq = q.new_empty(q.shape)
    dk, dv = (x.new_zeros(x.shape, dtype=torch.float32) for x in (k, v))
    for rows, keys in calls(q.shape[1], k.shape[1], w, _step(q, w)):
        part_dq, part_dk, part_dv = fused.backward(
            backend,
            dout[:, rows],
            q[:, rows],
            k[:, keys],
            v[:, keys],
            out[:, rows],
            lse[:, rows].transpose(1, 2),
            D**-0.5,
            causal=True,
            window=_band(rows, w),
        )
        dq[:, rows] = part_dq
        dk[:, keys] += part_dk
        dv[:, keys] += part_dv
    return dq, dk.to(k.dtype), dv.to(v.dtype)
