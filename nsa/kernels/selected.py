"""Selected attention on the GPU, block-major: a program owns one KV block and walks the queries that chose it.

The rows of a tile are (query, head of the group) pairs, packed with no gap, so that any group size fills the tile; K
and V are loaded once for all of them. A row's result against one block is a partial: its output and logsumexp go to
the slot of the query's list that named the block, and `merge` weighs a row's slots in slot order. Block 0, the query's
own and the one before are in nearly every list and shared by neighbours: one dense pass makes one partial of them.
Backward, one pass
over the same lists gives dQ partials (summed in slot order), dK and dV (summed in list order, pieces of one list in
order, chunks of queries in order). Nothing is added by atomics, so equal runs are equal bit for bit.

Few queries (decode) go query-major: a program owns one query's group and walks its blocks. `_query_major` is the rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton

from nsa.blocks import Pattern
from nsa.kernels import lists
from nsa.kernels import selected_device as device
from nsa.kernels.plain.dense import gated
from nsa.kernels.primitives import LOG2E, capability, on_device, padded, precision

# Bounds of the workspace: partial results of a chunk of queries, and the bit words of a stretch of chunks. With the
# pieces' dK and dV (at most 64 MiB) and the lists themselves it stays under 1 GiB at any length.
_PARTIAL_BYTES = 768 << 20
_WORDS_BYTES = 96 << 20
# Rows of work a piece of a list holds: enough to pay for its K and V, few enough to even out the programs.
_PIECE_ROWS = {"forward": 2048, "backward": 4096}
# Up to this many queries the lists cost more than they save.
_FEW = 16
# Keys of a tile, at most, and bytes of its K: a longer KV block is listed as several.
_MOST_KEYS = 64
_KEY_BYTES = 32 << 10
# Cards whose blocks may hold 160 KB of shared memory or more; others hold 99 KB, and half the keys.
_ROOMY = (80, 90, 100)
_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
# Some tiles get 32 registers and 6 to 20 KB of spills a thread from Triton 3.0's assembler, or kill its compiler.
_OLD = _VERSION < (3, 2)
_MOST_DIM = 256


@dataclass(frozen=True)
class Launch:
    """Rows of a tile, warps and pipeline stages of one kernel."""

    rows: int
    warps: int
    stages: int


def launch(kernel: str, sm: int, dim: int, itemsize: int) -> Launch:
    """The launch table: kernel (forward, near, backward), card, padded head dim, bytes of an element.

    Times on sm_90, of 6 to 12 candidates each: docs/kernels.md. Elsewhere what compiles within the card's memory.
    """
    if itemsize == 4:
        if _OLD and (kernel == "backward" or (kernel == "near" and dim > 64)):
            return Launch(16, 4 if kernel == "backward" else 8, 1)
        return Launch(32 if dim <= 64 else 16, 4, 1)
    if dim > 128:
        roomy = kernel != "backward" and sm in _ROOMY and not (_OLD and kernel == "near")
        return Launch(64 if roomy else 32, 8, 1)
    if kernel == "near":
        return Launch(64, 4, 2)
    if kernel == "forward":
        return Launch(64, 4, 2)
    if dim <= 64:
        return Launch(64, 4, 3 if sm in (90, 100) else 2)
    if sm in (90, 100):
        # Triton 3.0 lays this tile out 1 KB too large for the card.
        return Launch(128, 8, 2) if _VERSION >= (3, 6) else Launch(64, 8, 2)
    return Launch(64, 8, 2 if sm == 80 else 1)


def unsupported(backend: str, *tensors: torch.Tensor, seq_len: int | None = None) -> list[str]:
    """Reasons why these q, k, v cannot be taken; none if they can."""
    q, _, v = tensors[:3]
    reasons = []
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        reasons.append(f"{backend} takes bf16, fp16 or fp32, not {q.dtype}")
    if max(q.shape[-1], v.shape[-1]) > _MOST_DIM:
        reasons.append(f"{backend} takes head dims up to {_MOST_DIM}, not {max(q.shape[-1], v.shape[-1])}")
    return reasons


def _split(q: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor, l_sel: int) -> tuple[torch.Tensor, int]:
    """Blocks as (blocks, length) of at most a tile's keys: a longer block is listed as its equal parts."""
    row = max(padded(q.shape[3]), padded(v.shape[3])) * q.element_size()
    most = min(_MOST_KEYS, (_KEY_BYTES if capability(q) in _ROOMY else _KEY_BYTES // 2) // row)
    parts = next(c for c in range(1, l_sel + 1) if l_sel % c == 0 and l_sel // c <= most)
    if parts > 1:
        each = blocks.unsqueeze(-1) * parts + torch.arange(parts, dtype=torch.int32, device=blocks.device)
        in_range = (blocks >= 0) & (blocks <= torch.iinfo(torch.int32).max // parts - 1)
        blocks = each.masked_fill(~in_range.unsqueeze(-1), -1).flatten(3)
    return blocks, l_sel // parts


@dataclass(frozen=True)
class _Shape:
    """What every launch of one call is specialised for, and what bounds its chunks."""

    B: int
    T: int
    G: int
    R: int
    N: int
    L: int
    S: int
    DK: int
    DV: int
    dtype: torch.dtype
    sm: int

    @classmethod
    def of(cls, q: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor, l_sel: int, S: int) -> _Shape:
        B, T, H, DK = q.shape
        G, N = blocks.shape[2:]
        return cls(B, T, G, H // G, N, l_sel, S, DK, v.shape[3], q.dtype, capability(q))

    @property
    def n_blocks(self) -> int:
        return -(-self.S // self.L)

    def sizes(self) -> dict[str, object]:
        return {
            "N": self.N, "R": self.R, "L": self.L, "BS": padded(self.L), "DK": self.DK, "DV": self.DV,
            "DKP": padded(self.DK), "DVP": padded(self.DV), "IP": precision(self.dtype),
        }  # fmt: skip

    def options(self, kernel: str) -> dict[str, int]:
        chosen = launch(kernel, self.sm, max(padded(self.DK), padded(self.DV)), self.dtype.itemsize)
        return {"ROWS": chosen.rows, "num_warps": chosen.warps, "num_stages": chosen.stages}

    def merged_rows(self, dim: int) -> int:
        """Rows of a merging program: 2,048 elements of a slot at once."""
        return max(1, 2048 // padded(dim))

    def stretches(self, kernel: str, blocks: torch.Tensor, dim: int) -> Iterator[tuple[slice, int, lists.Lists]]:
        """(queries, position of the first, their lists), so that partials of width `dim` fit their bound."""
        a_query = self.B * self.G * (self.N + 1) * self.R * (dim * self.dtype.itemsize + 4)
        chunks = -(-self.T * a_query // _PARTIAL_BYTES)
        chunk = -(-self.T // chunks // 32) * 32
        words = lists.words_bytes(self.B * self.G, self.n_blocks, chunk)
        stretch = max(1, _WORDS_BYTES // words) * chunk
        piece = max(1, _PIECE_ROWS[kernel] // self.R)
        for a in range(0, self.T, stretch):
            rows, first = slice(a, min(a + stretch, self.T)), self.S - self.T + a
            plan = lists.build(
                blocks[:, rows], self.L, first, self.n_blocks, chunk, piece, far_only=kernel == "forward"
            )
            yield rows, first, plan


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor, p: Pattern, S: int, count: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """out [B,T,H,Dv], lse [B,T,H] fp32 (natural), tokens read [B,G] or [] (counted where they are loaded).

    q [B,T,H,Dk], k [B,>=S,G,Dk], v [B,>=S,G,Dv], blocks [B,T,G,N] int32, any strides.
    """
    blocks, l_sel = _split(q, v, blocks, p.l_sel)
    shape = _Shape.of(q, v, blocks, l_sel, S)
    out = q.new_empty(shape.B, shape.T, q.shape[2], shape.DV)
    lse = q.new_empty(out.shape[:3], dtype=torch.float32)
    reads = q.new_zeros((shape.B, shape.G) if count else (0,), dtype=torch.int64)
    if out.numel():
        with on_device(q):
            run = _forward_by_query if _query_major(shape) else _forward_by_block
            run(shape, q, k, v, blocks, out, lse, reads, count)
    return out, lse, reads


def _query_major(shape: _Shape) -> bool:
    """Whether the forward walks queries rather than KV blocks."""
    return shape.T <= _FEW


def _forward_by_query(
    shape: _Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, reads: torch.Tensor, count: bool,
) -> None:  # fmt: skip
    rows = min(64, padded(shape.R))
    device.query_forward[(shape.T, shape.B * shape.G, triton.cdiv(shape.R, rows))](
        q, k, v, blocks, out, lse, reads,
        *q.stride(), *k.stride(), *v.stride(), *blocks.stride(), *out.stride()[:3], *lse.stride(),
        shape.DK**-0.5 * LOG2E, shape.S - shape.T, shape.G, **shape.sizes(), COUNT=count,
        **{**shape.options("forward"), "ROWS": rows},
    )  # fmt: skip


def _forward_by_block(
    shape: _Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, reads: torch.Tensor, count: bool,
) -> None:  # fmt: skip
    groups, sizes, near = shape.B * shape.G, shape.sizes(), shape.options("near")
    scale2, merged = shape.DK**-0.5 * LOG2E, shape.merged_rows(shape.DV)
    for rows, first, plan in shape.stretches("forward", blocks, shape.DV):
        places = groups * plan.chunk * (shape.N + 1) * shape.R
        partial, partial_lse = q.new_empty(places, shape.DV), lse.new_empty(places)
        part = q[:, rows]
        for c, (a, b) in enumerate(plan.chunks):
            device.block_forward[(plan.pieces[c],)](
                part, k, v, plan.pairs, plan.table[c], partial, partial_lse, reads,
                *part.stride(), *k.stride(), *v.stride(), scale2, a, b - a,
                shape.G, shape.n_blocks, **sizes, COUNT=count, **shape.options("forward"),
            )  # fmt: skip
            here = slice(rows.start + a, rows.start + b)
            x, listed, o, e = q[:, here], blocks[:, here], out[:, here], lse[:, here]
            device.near_forward[(triton.cdiv((b - a) * shape.R, near["ROWS"]), groups)](
                x, k, v, listed, partial, partial_lse, reads,
                *x.stride(), *k.stride(), *v.stride(), *listed.stride(), scale2, first + a, b - a, shape.G,
                **sizes, NP=triton.next_power_of_2(shape.N), COUNT=count, **near,
            )  # fmt: skip
            device.merge[(triton.cdiv((b - a) * shape.R, merged), groups)](
                partial, partial_lse, listed, o, e, *listed.stride(), *o.stride()[:3], *e.stride(),
                first + a, b - a, shape.G, N=shape.N, R=shape.R, L=shape.L, DV=shape.DV, DVP=padded(shape.DV),
                ROWS=merged, IP=precision(shape.dtype), num_warps=4,
            )  # fmt: skip


def backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor, out: torch.Tensor,
    lse: torch.Tensor, p: Pattern, S: int, backend: str, gate: torch.Tensor | None, delta: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """dq, dk, dv of `forward`'s out, in the inputs' dtypes and shapes; dk and dv are 0 past S. Equal runs are equal."""
    dout = gated(dout, gate)
    blocks, l_sel = _split(q, v, blocks, p.l_sel)
    shape = _Shape.of(q, v, blocks, l_sel, S)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.zeros(k.shape, dtype=torch.float32, device=k.device)
    dv = torch.zeros(v.shape, dtype=torch.float32, device=v.device)
    if out.numel():
        with on_device(q):
            _backward(shape, dout, q, k, v, blocks, out, lse, dq, dk, dv)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _mass(shape: _Shape, q: torch.Tensor, k: torch.Tensor, blocks: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    sizes = {name: value for name, value in shape.sizes().items() if name not in ("DV", "DVP")}
    rows = min(16, padded(shape.R))
    mass = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
    device.query_mass[(shape.T, shape.B * shape.G, triton.cdiv(shape.R, rows))](
        q, k, blocks, lse, mass,
        *q.stride(), *k.stride(), *blocks.stride(), *lse.stride(), *mass.stride(),
        shape.DK**-0.5, shape.S - shape.T, shape.G, **sizes, ROWS=rows, num_warps=4, num_stages=1,
    )  # fmt: skip
    return mass


def _backward(
    shape: _Shape, dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor,
) -> None:  # fmt: skip
    groups, sizes = shape.B * shape.G, shape.sizes()
    delta = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
    heads, merged = q.shape[2], shape.merged_rows(shape.DV)
    device.row_products[(triton.cdiv(shape.T * heads, merged), shape.B)](
        out, dout, delta, *out.stride(), *dout.stride(), shape.T, heads,
        DV=shape.DV, DVP=padded(shape.DV), ROWS=merged, num_warps=4,
    )  # fmt: skip
    # fp32 takes back the rounding of lse, the larger part of its error; below that it is lost in the inputs'.
    mass = _mass(shape, q, k, blocks, lse) if shape.dtype == torch.float32 else delta
    merged = shape.merged_rows(shape.DK)
    keys = groups * shape.n_blocks
    for rows, first, plan in shape.stretches("backward", blocks, shape.DK):
        partial = q.new_empty(groups * plan.chunk * shape.N * shape.R, shape.DK)
        spills = [dk.new_empty(plan.spill_rows * padded(shape.L), dim) for dim in (shape.DK, shape.DV)]
        x, do, e, y, z = (row[:, rows] for row in (q, dout, lse, delta, mass))
        for c, (a, b) in enumerate(plan.chunks):
            device.block_backward[(plan.pieces[c],)](
                x, k, v, do, e, y, z, plan.pairs, plan.table[c], partial, dk, dv, *spills,
                *x.stride(), *k.stride(), *v.stride(), *do.stride(), *e.stride(), *y.stride(),
                *dk.stride()[:3], *dv.stride()[:3], shape.DK**-0.5, first, a, b - a, shape.G, shape.n_blocks,
                **sizes, **shape.options("backward"),
            )  # fmt: skip
            for spill, grad, dim in zip(spills, (dk, dv), (shape.DK, shape.DV), strict=True):
                device.gather_spill[(keys, padded(shape.L) // 16)](
                    spill, plan.count[c], plan.spilled[c], grad, *grad.stride()[:3], plan.piece, first + b,
                    shape.G, shape.n_blocks, L=shape.L, BS=padded(shape.L), D=dim, DP=padded(dim), KEYS=16,
                    num_warps=4,
                )  # fmt: skip
            here = slice(rows.start + a, rows.start + b)
            listed, d = blocks[:, here], dq[:, here]
            device.sum_slots[(triton.cdiv((b - a) * shape.R, merged), groups)](
                partial, listed, d, *listed.stride(), *d.stride()[:3], first + a, b - a, shape.G,
                N=shape.N, R=shape.R, L=shape.L, D=shape.DK, DP=padded(shape.DK), ROWS=merged, num_warps=4,
            )  # fmt: skip
