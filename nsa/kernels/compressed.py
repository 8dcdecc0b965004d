"""The compressed branch in Triton: a query walks the blocks that end at or before it, with no copy and no T x C mask.

The rows of a tile are (query, head of the group) pairs, packed with no gap: a tile's few queries end within a few
blocks of one another, so that hardly a tile of keys is masked, and no row is laid out anew. Forward and dq own rows and
walk keys. dk and dv own keys and walk rows; there are few keys and many rows, so the rows are cut into pieces, whose
shares are summed in fp32, in order. Nothing is added by atomics, so equal runs are equal bit for bit.

The backward is two passes, not one that also leaves a share of dq for each tile of keys. At C = 255 (S = 4,096, D 64:
four tiles, of which a row sees 2.5) those shares in bf16 are 2.5 times dq written and read back, and a kernel more to
sum them; a pass of its own for dq reads q and dout once more instead. So one pass is 3 times dq's bytes (at B = 8, 12
heads: 150 MB, 35 us of an H200) to save 2 of 7 products (13 GFLOP, 30 us): nothing. With every further tile of keys it
loses, and its dq is rounded once a tile.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton

from nsa.blocks import Pattern, n_compressed
from nsa.kernels import compressed_device as device
from nsa.kernels.plain.dense import gated
from nsa.kernels.primitives import BLIND_TO_BRANCHES, capability, on_device, operand, padded, precision, strides
from nsa.kernels.window import Launch, unsupported  # noqa: F401 - limits of the same loops

# The forms take `lengths`, int32 [B] on the device: row b's queries are then the last min(T, lengths[b]) of that many.
RAGGED = True

# dk and dv are cut into pieces until there are so many programs, none with fewer rows than these, and the pieces no
# larger than these bytes. About half of the programs see nothing, and end at once.
_PROGRAMS, _LEAST_ROWS, _PIECES_BYTES = 1536, 512, 256 << 20
# Elements of dk and dv, and pieces at a time, of a program that sums the pieces; its warps.
_SUM = {"SPAN": 512, "TOGETHER": 8, "num_warps": 4}


def launch(kernel: str, sm: int, dim: int, itemsize: int) -> Launch:
    """The launch table: kernel (forward, dq, dkv), card, padded head dim, bytes of an element.

    Times on sm_90, of 4 to 5 candidates each: docs/kernels.md. Elsewhere what compiles within the card's memory.
    """
    if itemsize == 4:
        return Launch(32, 32, 4, 1) if dim <= 64 else Launch(16, 16, 4, 1)
    if sm in (90, 100):
        # Capped, two of the forward's blocks and three of dq's share a multiprocessor.
        if kernel == "forward":
            return Launch(128, 64, 8, 3 if dim <= 64 else 2, 128)
        if dim <= 64:
            return Launch(64, 64, 4, 2, 160) if kernel == "dq" else Launch(64, 64, 4, 3)
        return Launch(64, 64, 4, 2) if kernel == "dq" else Launch(32, 64, 4, 3)
    if kernel == "dkv":
        return Launch(32, 64, 8, 2)
    return Launch(64, 64 if kernel == "forward" else 32, 4, 2)


class _Job(NamedTuple):
    """What the launches of a call are specialised for, besides tiles; hashable."""

    R: int
    DK: int
    DV: int
    p: Pattern
    dtype: torch.dtype
    ragged: bool


@lru_cache(maxsize=1024)
def _sizes(kernel: str, job: _Job, sm: int, T: int) -> dict[str, Any]:
    chosen = launch(kernel, sm, max(padded(job.DK), padded(job.DV)), job.dtype.itemsize)
    sizes = {
        "R": job.R, "L": job.p.l, "STEP": job.p.d, "DK": job.DK, "DV": job.DV, "DKP": padded(job.DK),
        "DVP": padded(job.DV), "ROWS": min(chosen.rows, padded(T * job.R)), "KEYS": chosen.keys,
        "IP": precision(job.dtype), "ALWAYS": BLIND_TO_BRANCHES, "RAGGED": job.ragged,
        "num_warps": chosen.warps, "num_stages": chosen.stages,
    }  # fmt: skip
    if chosen.registers:
        sizes["maxnreg"] = chosen.registers
    return sizes


@lru_cache(maxsize=256)
def _pieces(rows: int, tile: int, programs: int, piece_bytes: int) -> tuple[int, int]:
    """(pieces, tiles of rows in each) that `rows` rows, in tiles of `tile`, are cut into for dk and dv."""
    tiles = triton.cdiv(rows, tile)
    if not programs:
        return 1, tiles
    wanted = min(triton.cdiv(_PROGRAMS, programs), _PIECES_BYTES // piece_bytes, rows // _LEAST_ROWS)
    piece = triton.cdiv(tiles, max(1, wanted))
    return triton.cdiv(tiles, piece), piece


def _job(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: Pattern, lengths: torch.Tensor | None) -> _Job:
    return _Job(q.shape[2] // k.shape[2], q.shape[3], v.shape[3], p, q.dtype, lengths is not None)


def _readable(k: torch.Tensor, p: Pattern, S: int, lengths: torch.Tensor | None) -> int:
    """Compressed keys that a kernel may read; of a ragged row, those that its length has."""
    return k.shape[1] if lengths is not None else min(n_compressed(S, p), k.shape[1])


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: None, p: Pattern, S: int, count: bool, backend: str,
    *, lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """out [B,T,H,Dv], lse [B,T,H] fp32, natural, and the blocks read [B,G] or []; q [B,T,H,Dk], k [B,>=C,G,Dk],
    v [B,>=C,G,Dv], any strides. lengths: see RAGGED; S is not looked at then."""
    (B, T, H, DK), (G, DV) = q.shape, v.shape[2:]
    q, k, v = operand(q), operand(k), operand(v)
    lengths = None if lengths is None else lengths.contiguous()
    out, lse = q.new_empty(B, T, H, v.shape[3]), q.new_empty(B, T, H, dtype=torch.float32)
    reads = q.new_zeros((B, G) if count else (0,), dtype=torch.int64)
    if out.numel():
        sizes = _sizes("forward", _job(q, k, v, p, lengths), capability(q), T)
        programs = triton.cdiv(T * sizes["R"], sizes["ROWS"]) * B * G
        with on_device(q):
            device.forward[(programs,)](
                q, k, v, lse if lengths is None else lengths, out, lse, reads, *strides(q), *strides(k), *strides(v),
                DK**-0.5, S, T, _readable(k, p, S, lengths), G, COUNT=count, **sizes,
            )  # fmt: skip
    return out if v.shape[3] == DV else out[..., :DV].contiguous(), lse, reads


def backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: None, out: torch.Tensor,
    lse: torch.Tensor, p: Pattern, S: int, backend: str, gate: torch.Tensor | None, delta: torch.Tensor | None,
    *, lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """dq, dk, dv of `forward`'s out, in the inputs' dtypes and shapes; 0 for queries that see no block and for keys
    that none sees. What gate and delta mean: `nsa.ops.branch`. With delta out is not read."""
    if not q.numel():
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    scale, DK, DV = q.shape[3] ** -0.5, q.shape[3], v.shape[3]
    lengths = None if lengths is None else lengths.contiguous()
    dout, q, k, v = operand(gated(dout, gate)), operand(q), operand(k), operand(v)
    if delta is None:
        out = operand(out).contiguous()
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    with on_device(q):
        job, place = _job(q, k, v, p, lengths), (S, q.shape[1], _readable(k, p, S, lengths), k.shape[2])
        packed = _backward_dq(job, place, scale, dout, q, k, v, out, lse.contiguous(), delta, lengths, dq)
        _backward_dkv(job, place, scale, dout, q, k, v, packed, lengths, dk, dv)
    if (DK, DV) == (q.shape[3], v.shape[3]):
        return dq, dk, dv
    return dq[..., :DK].contiguous(), dk[..., :DK].contiguous(), dv[..., :DV].contiguous()


def _backward_dq(
    job: _Job, place: tuple[int, int, int, int], scale: float, dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor,
    v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor | None, lengths: torch.Tensor | None,
    dq: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Write dq; the rows' lse and delta as `_backward_dkv` reads them."""
    B, T = q.shape[:2]
    sizes = _sizes("dq", job, capability(q), T)
    packed = lse.new_empty(2, lse.numel())
    device.backward_dq[(triton.cdiv(T * job.R, sizes["ROWS"]) * B * place[3],)](
        q, k, v, dout, out, lse, lse if delta is None else delta.contiguous(),
        lse if lengths is None else lengths, packed, dq, *strides(q), *strides(k), *strides(v), *strides(dout),
        scale, *place, lse.numel(), DELTA=delta is not None, **sizes,
    )  # fmt: skip
    return packed


def _backward_dkv(
    job: _Job, place: tuple[int, int, int, int], scale: float, dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor,
    v: torch.Tensor, packed: torch.Tensor, lengths: torch.Tensor | None, dk: torch.Tensor, dv: torch.Tensor,
) -> None:  # fmt: skip
    """Write dk and dv."""
    _, T, readable, G = place
    pairs, most, width = q.shape[0] * G, k.shape[1], job.DK + job.DV
    sizes = _sizes("dkv", job, capability(q), T)
    tiles = triton.cdiv(readable, sizes["KEYS"])
    floats = pairs * tiles * sizes["KEYS"] * width
    pieces, piece = _pieces(T * job.R, sizes["ROWS"], pairs * tiles, 4 * floats)
    whole = pieces == 1
    if whole:
        tiles, parts = triton.cdiv(most, sizes["KEYS"]), (dk, dv)
    else:
        parts = (packed.new_empty(pieces, floats),) * 2
    device.backward_dkv[(tiles * pairs * pieces,)](
        q, k, v, dout, packed, packed if lengths is None else lengths, *parts, *strides(q), *strides(k), *strides(v),
        *strides(dout), scale, *place, most, tiles, packed.shape[1], piece, WHOLE=whole, **sizes,
    )  # fmt: skip
    if not whole:
        device.sum_pieces[(triton.cdiv(most * width, _SUM["SPAN"]) * pairs,)](
            parts[0], packed if lengths is None else lengths, dk, dv, *place, most, tiles, pairs, piece, pieces,
            **{name: sizes[name] for name in ("R", "L", "STEP", "DK", "DV", "ROWS", "KEYS", "RAGGED")}, **_SUM,
        )  # fmt: skip
