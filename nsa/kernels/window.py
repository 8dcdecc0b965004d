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
import torch.nn.functional as F
import triton

from nsa.blocks import Pattern
from nsa.kernels import window_device as device
from nsa.kernels.flash.window import reads
from nsa.kernels.plain.dense import gated
from nsa.kernels.plain.window import all_rows, held
from nsa.kernels.primitives import capability, on_device, padded, precision

# Wider heads read outside their memory on an H200 (Triton 3.6.0, one stage, tiles of 256 columns): cause not found.
_MOST_DIM = 128
# Strides and head dims are whole multiples of it, so that every load is of 16 bytes and overlaps arithmetic. Loads of
# single elements gave a wrong dq there.
_EVEN = 16
# Triton 3.0's pipeliner overlooks what is used inside a branch: "operation scheduled before its operands".
_OLD = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 2)


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
        # Capped, two of these blocks share a multiprocessor.
        return Launch(128, 64, 8, stages, 128) if kernel == "forward" else Launch(64, 64, 4, stages)
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


def _operand(x: torch.Tensor) -> torch.Tensor:
    """x as the kernels load it: zero columns change neither scores nor output. A copy only where it is not so."""
    if short := -x.shape[-1] % _EVEN:
        return F.pad(x, (0, short)).contiguous()
    even = all(stride % _EVEN == 0 for stride in _strides(x))
    if x.stride(-1) == 1 and even and x.storage_offset() % _EVEN == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _strides(x: torch.Tensor) -> tuple[int, ...]:
    """All but the last, which is 1; that of an axis of one element, which is never walked, may be anything else."""
    return tuple(stride if n > 1 else 0 for stride, n in zip(x.stride()[:-1], x.shape[:-1], strict=True))


def _sizes(kernel: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Any]:
    """What a launch is specialised for."""
    T, R, DK, DV = q.shape[1], q.shape[2] // k.shape[2], q.shape[3], v.shape[3]
    chosen = launch(kernel, capability(q), max(padded(DK), padded(DV)), q.dtype.itemsize)
    rows = min(chosen.rows, padded(T * R))
    sizes = {
        "R": R, "DK": DK, "DV": DV, "DKP": padded(DK), "DVP": padded(DV), "ROWS": rows, "KEYS": chosen.keys,
        "IP": precision(q.dtype), "ALWAYS": _OLD, "num_warps": chosen.warps, "num_stages": chosen.stages,
    }  # fmt: skip
    if chosen.registers:
        sizes["maxnreg"] = chosen.registers
    if kernel != "dkv":
        span = (R - math.gcd(R, rows) + rows - 1) // R + 1
        sizes |= {"SPAN": span, "DIAG": padded(span)}
    return sizes


def _place(q: torch.Tensor, k: torch.Tensor, w: int, scale: float) -> tuple[float, int, int, int, int]:
    """Scale, window, position of the first query, queries, groups: what every kernel is told."""
    T, K = q.shape[1], k.shape[1]
    return scale, min(w, K), K - T, T, k.shape[2]


def _row_tiles(q: torch.Tensor, k: torch.Tensor, sizes: dict[str, Any]) -> tuple[int, int]:
    return triton.cdiv(q.shape[1] * sizes["R"], sizes["ROWS"]), q.shape[0] * k.shape[2]


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: None, p: Pattern, S: int, count: bool, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out [B,T,H,Dv], lse [B,T,H] fp32, natural, and the keys read [B,G] or []. Shapes as the op's, any strides."""
    _, k, v = held(k, v, S)
    n = reads(q.shape[1], k.shape[1], p.w) if count else 0
    read = q.new_full((q.shape[0], k.shape[2]) if count else (0,), n, dtype=torch.int64)
    return *_forward(q, k, v, p.w), read


def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, w: int) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B,T,H,Dk] are the last T of the K positions that k [B,K,G,Dk] and v [B,K,G,Dv] hold."""
    scale, DV = q.shape[3] ** -0.5, v.shape[3]
    q, k, v = _operand(q), _operand(k), _operand(v)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(out.shape[:3], dtype=torch.float32)
    if out.numel():
        sizes = _sizes("forward", q, k, v)
        with on_device(q):
            device.forward[_row_tiles(q, k, sizes)](
                q, k, v, out, lse, *_strides(q), *_strides(k), *_strides(v), *_strides(out), *lse.stride(),
                *_place(q, k, w, scale), **sizes,
            )  # fmt: skip
    return out[..., :DV].contiguous(), lse


def backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: None, out: torch.Tensor,
    lse: torch.Tensor, p: Pattern, S: int, backend: str, gate: torch.Tensor | None, delta: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """dq, dk, dv of `forward`'s out, in the inputs' dtypes and shapes; 0 for keys before every window."""
    _, k_held, v_held = held(k, v, S)
    dq, dk, dv = _backward(gated(dout, gate), q, k_held, v_held, out, lse, p.w)
    return dq, all_rows(dk, k), all_rows(dv, v)


def _backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, w: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scale, DK, DV = q.shape[3] ** -0.5, q.shape[3], v.shape[3]
    dout, q, k, v, out = (_operand(x) for x in (dout, q, k, v, out))
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    from_key = max(0, k.shape[1] - q.shape[1] - w + 1) if q.numel() else k.shape[1]
    dk[:, :from_key].zero_()
    dv[:, :from_key].zero_()
    if q.numel():
        with on_device(q):
            place = _place(q, k, w, scale)
            packed, delta = _backward_dq(dout, q, k, v, out, lse, place, dq)
            _backward_dkv(dout, q, k, v, packed, delta, place, from_key, dk, dv)
    return dq[..., :DK].contiguous(), dk[..., :DK].contiguous(), dv[..., :DV].contiguous()


def _backward_dq(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    place: tuple[float, int, int, int, int], dq: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Write dq; a row's lse and its rowsum(out * dout), as `_backward_dkv` reads them."""
    packed = torch.empty(lse.numel(), dtype=torch.float32, device=q.device)
    delta = torch.empty_like(packed)
    sizes = _sizes("dq", q, k, v)
    device.backward_dq[_row_tiles(q, k, sizes)](
        q, k, v, dout, out, lse, packed, delta, dq, *_strides(q), *_strides(k), *_strides(v), *_strides(dout),
        *_strides(out), *lse.stride(), *_strides(dq), *place, **sizes,
    )  # fmt: skip
    return packed, delta


def _backward_dkv(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: torch.Tensor, delta: torch.Tensor,
    place: tuple[float, int, int, int, int], from_key: int, dk: torch.Tensor, dv: torch.Tensor,
) -> None:  # fmt: skip
    """Write dk and dv of the keys from `from_key` on."""
    sizes = _sizes("dkv", q, k, v)
    device.backward_dkv[(triton.cdiv(k.shape[1] - from_key, sizes["KEYS"]), q.shape[0] * k.shape[2])](
        q, k, v, dout, packed, delta, dk, dv, *_strides(q), *_strides(k), *_strides(v), *_strides(dout),
        *_strides(dk), *_strides(dv), *place, from_key, **sizes,
    )  # fmt: skip
