"""The sliding window in Triton: only the band of keys is walked, with no copy and no workspace but a row's product,
and not that where the gated sum's backward hands it on.

The rows of a tile are (query, head of the group) pairs, packed with no gap: the heads of a group share every K and V
they load, and the fewer queries a tile has the less of the band's two corners it computes in vain. Forward and dq own
rows and walk keys; dk and dv own keys and walk the rows of all their heads. Nothing is added by atomics, so equal runs
are equal bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton

from nsa.blocks import Pattern
from nsa.kernels import window_device as device
from nsa.kernels.flash.window import reads
from nsa.kernels.plain.dense import gated
from nsa.kernels.primitives import BLIND_TO_BRANCHES, capability, on_device, operand, padded, precision, strides

# Wider heads read outside their memory on an H200 (Triton 3.6.0, one stage, tiles of 256 columns): cause not found.
_MOST_DIM = 128


@dataclass(frozen=True)
class Launch:
    """Rows and keys of a tile, warps, pipeline stages, and most registers of a thread, of one kernel."""

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


def launch(kernel: str, sm: int, dim: int, itemsize: int) -> Launch:
    """The launch table: kernel (forward, dq, dkv), card, padded head dim, bytes of an element.

    Times on sm_90, of 4 to 10 candidates each: docs/kernels.md. Elsewhere what compiles within the card's memory.
    """
    if itemsize == 4:
        return Launch(32, 32, 4, 1) if dim <= 64 else Launch(16, 16, 4, 1)
    if sm in (90, 100):
        stages = 3 if dim <= 64 else 2
        if kernel == "forward":  # capped, two of these blocks share a multiprocessor
            return Launch(128, 64, 8, stages, 128)
        return Launch(32, 64, 4, 3) if kernel == "dkv" and dim > 64 else Launch(64, 64, 4, stages)
    if kernel == "dkv":
        return Launch(32, 64, 8, 2)
    return Launch(64, 64 if kernel == "forward" else 32, 4, 2)


def unsupported(
    backend: str, q: torch.Tensor, _: torch.Tensor, v: torch.Tensor, *, seq_len: int | None = None
) -> list[str]:
    """Reasons why these q, k, v cannot be taken; none if they can."""
    reasons = []
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        reasons.append(f"{backend} takes bf16, fp16 or fp32, not {q.dtype}")
    if max(q.shape[-1], v.shape[-1]) > _MOST_DIM:
        reasons.append(f"{backend} takes head dims up to {_MOST_DIM}, not {max(q.shape[-1], v.shape[-1])}")
    return reasons


@lru_cache(maxsize=1024)
def _sizes(
    kernel: str, sm: int, dtype: torch.dtype, T: int, R: int, DK: int, DV: int, given: bool = False
) -> dict[str, Any]:
    """What a launch is specialised for."""
    chosen = launch(kernel, sm, max(padded(DK), padded(DV)), dtype.itemsize)
    rows = min(chosen.rows, padded(T * R))
    sizes = {
        "R": R, "DK": DK, "DV": DV, "DKP": padded(DK), "DVP": padded(DV), "ROWS": rows, "KEYS": chosen.keys,
        "IP": precision(dtype), "ALWAYS": BLIND_TO_BRANCHES, "num_warps": chosen.warps, "num_stages": chosen.stages,
    }  # fmt: skip
    if chosen.registers:
        sizes["maxnreg"] = chosen.registers
    if kernel != "dkv":
        span = (R - math.gcd(R, rows) + rows - 1) // R + 1
        sizes |= {"SPAN": span, "DIAG": padded(span)}
    if kernel == "dq":
        sizes["DELTA"] = given
    return sizes


def _shape(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[int, torch.dtype, int, int, int, int]:
    """What `_sizes` is asked for: the card, the type, queries, heads a group, head dims."""
    return capability(q), q.dtype, q.shape[1], q.shape[2] // k.shape[2], q.shape[3], v.shape[3]


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: None, p: Pattern, S: int, count: bool, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out [B,T,H,Dv], lse [B,T,H] fp32, natural, and the keys read [B,G] or []. Shapes as the op's, any strides."""
    (B, T, H, D), G, K, DV = q.shape, k.shape[2], min(S, k.shape[1]), v.shape[3]
    n = reads(T, K, p.w) if count else 0
    read = q.new_full((B, G), n, dtype=torch.int64) if count else q.new_empty((0,), dtype=torch.int64)
    q, k, v = operand(q), operand(k), operand(v)
    out = q.new_empty(B, T, H, v.shape[3])
    lse = q.new_empty(B, T, H, dtype=torch.float32)
    if out.numel():
        sizes = _sizes("forward", *_shape(q, k, v))
        with on_device(q):
            device.forward[(triton.cdiv(T * sizes["R"], sizes["ROWS"]) * B * G,)](
                q, k, v, out, lse, *strides(q), *strides(k), *strides(v), D**-0.5, min(p.w, K), K - T, T, G, **sizes
            )
    return out[..., :DV].contiguous(), lse, read


def backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: None, out: torch.Tensor,
    lse: torch.Tensor, p: Pattern, S: int, backend: str, gate: torch.Tensor | None, delta: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """dq, dk, dv of `forward`'s out, in the inputs' dtypes and shapes; 0 for keys that no query sees.

    What gate and delta mean: `nsa.ops.branch`. With delta out is not read.
    """
    (B, T, _, DK), (_, N, G, DV), K = q.shape, v.shape, min(S, k.shape[1])
    dout, q, k, v = operand(gated(dout, gate)), operand(q), operand(k), operand(v)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    lse = lse.contiguous()
    given = delta is not None
    out, delta = (dout, delta.contiguous()) if delta is not None else (operand(out).contiguous(), torch.empty_like(lse))
    if not q.numel():
        return dq, dk.zero_(), dv.zero_()
    steps = (*strides(q), *strides(k), *strides(v), *strides(dout))
    place = (DK**-0.5, min(p.w, K), K - T, T, G)
    with on_device(q):
        sizes = _sizes("dq", *_shape(q, k, v), given)
        device.backward_dq[(triton.cdiv(T * sizes["R"], sizes["ROWS"]) * B * G,)](
            q, k, v, dout, out, lse, delta, dq, *steps, *place, **sizes
        )
        sizes = _sizes("dkv", *_shape(q, k, v))
        device.backward_dkv[(triton.cdiv(N, sizes["KEYS"]) * B * G,)](
            q, k, v, dout, lse, delta, dk, dv, *steps, *place, N, **sizes
        )
    return dq[..., :DK].contiguous(), dk[..., :DK].contiguous(), dv[..., :DV].contiguous()
