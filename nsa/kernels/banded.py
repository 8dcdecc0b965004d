"""The sliding window in Triton: only the band of keys is walked, with no copy and no workspace but a row's product.

The rows of a tile are (query, head of the group) pairs, packed with no gap: the heads of a group share every K and V
they load, and the fewer queries a tile has the less of the band's two corners it computes in vain. Forward and dq own
rows and walk keys; dk and dv own keys and walk the rows of all their heads. Nothing is added by atomics, so equal runs
are equal bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton

from nsa.kernels import banded_device as device
from nsa.kernels.primitives import capability, on_device, padded, precision

_MOST_DIM = 256


@dataclass(frozen=True)
class Launch:
    """Rows and keys of a tile, warps and pipeline stages of one kernel."""

    rows: int
    keys: int
    warps: int
    stages: int


def launch(kernel: str, sm: int, dim: int, itemsize: int) -> Launch:
    """The launch table: kernel (forward, dq, dkv), card, padded head dim, bytes of an element."""
    if itemsize == 4:
        return Launch(32, 32, 4, 1) if dim <= 64 else Launch(16, 16, 4, 1)
    if dim > 128:
        return Launch(64, 32, 8, 1) if kernel != "dkv" else Launch(32, 32, 8, 1)
    if kernel == "dkv":
        return Launch(64, 64, 4, 2)
    return Launch(64, 64, 4, 2)


def unsupported(q: torch.Tensor, v: torch.Tensor) -> list[str]:
    """Reasons why these q, v cannot be taken; none if they can."""
    reasons = []
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        reasons.append(f"triton takes bf16, fp16 or fp32, not {q.dtype}")
    if max(q.shape[-1], v.shape[-1]) > _MOST_DIM:
        reasons.append(f"triton takes head dims up to {_MOST_DIM}, not {max(q.shape[-1], v.shape[-1])}")
    return reasons


def _sizes(kernel: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Any]:
    """What a launch is specialised for."""
    T, R, DK, DV = q.shape[1], q.shape[2] // k.shape[2], q.shape[3], v.shape[3]
    chosen = launch(kernel, capability(q), max(padded(DK), padded(DV)), q.dtype.itemsize)
    rows = min(chosen.rows, padded(T * R))
    sizes = {
        "R": R, "DK": DK, "DV": DV, "DKP": padded(DK), "DVP": padded(DV), "ROWS": rows, "KEYS": chosen.keys,
        "IP": precision(q.dtype), "num_warps": chosen.warps, "num_stages": chosen.stages,
    }  # fmt: skip
    if kernel != "dkv":
        span = (R - math.gcd(R, rows) + rows - 1) // R + 1
        sizes |= {"SPAN": span, "DIAG": padded(span)}
    return sizes


def _place(q: torch.Tensor, k: torch.Tensor, w: int) -> tuple[float, int, int, int, int]:
    """Scale, window, position of the first query, queries, groups: what every kernel is told."""
    T, K = q.shape[1], k.shape[1]
    return q.shape[3] ** -0.5, min(w, K), K - T, T, k.shape[2]


def _row_tiles(q: torch.Tensor, k: torch.Tensor, sizes: dict[str, Any]) -> tuple[int, int]:
    return triton.cdiv(q.shape[1] * sizes["R"], sizes["ROWS"]), q.shape[0] * k.shape[2]


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, w: int) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B,T,H,Dv], lse [B,T,H] fp32, natural.

    q [B,T,H,Dk] are the last T of the K positions that k [B,K,G,Dk] and v [B,K,G,Dv] hold; any strides.
    """
    out = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(out.shape[:3], dtype=torch.float32)
    if out.numel():
        sizes = _sizes("forward", q, k, v)
        with on_device(q):
            device.forward[_row_tiles(q, k, sizes)](
                q, k, v, out, lse, *q.stride(), *k.stride(), *v.stride(), *out.stride()[:3], *lse.stride(),
                *_place(q, k, w), **sizes,
            )  # fmt: skip
    return out, lse


def backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, w: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv of `forward`'s out, in the inputs' dtypes and shapes; 0 for keys before every window."""
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    from_key = max(0, k.shape[1] - q.shape[1] - w + 1) if q.numel() else k.shape[1]
    dk[:, :from_key].zero_()
    dv[:, :from_key].zero_()
    if q.numel():
        with on_device(q):
            packed, delta = _backward_dq(dout, q, k, v, out, lse, w, dq)
            _backward_dkv(dout, q, k, v, packed, delta, w, from_key, dk, dv)
    return dq, dk, dv


def _backward_dq(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    w: int, dq: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Write dq; a row's lse and its rowsum(out * dout), as `_backward_dkv` reads them."""
    packed, delta = torch.empty((2, lse.numel()), dtype=torch.float32, device=q.device)
    sizes = _sizes("dq", q, k, v)
    device.backward_dq[_row_tiles(q, k, sizes)](
        q, k, v, dout, out, lse, packed, delta, dq, *q.stride(), *k.stride(), *v.stride(), *dout.stride(),
        *out.stride(), *lse.stride(), *dq.stride()[:3], *_place(q, k, w), **sizes,
    )  # fmt: skip
    return packed, delta


def _backward_dkv(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: torch.Tensor, delta: torch.Tensor,
    w: int, from_key: int, dk: torch.Tensor, dv: torch.Tensor,
) -> None:  # fmt: skip
    """Write dk and dv of the keys from `from_key` on."""
    sizes = _sizes("dkv", q, k, v)
    device.backward_dkv[(triton.cdiv(k.shape[1] - from_key, sizes["KEYS"]), q.shape[0] * k.shape[2])](
        q, k, v, dout, packed, delta, dk, dv, *q.stride(), *k.stride(), *v.stride(), *dout.stride(),
        *dk.stride()[:3], *dv.stride()[:3], *_place(q, k, w), from_key, **sizes,
    )  # fmt: skip
