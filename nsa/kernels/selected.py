"""Selected attention on the GPU, block-major: a program owns one KV block and walks the queries that chose it.

The rows of a tile are (query, head of the group) pairs, packed with no gap, so that any group size fills the tile; K
and V are loaded once for all of them. A row's result against one block is a partial: its output and logsumexp go to
the slot of the query's list that named the block, and `merge` weighs a row's slots in slot order. Block 0, the query's
own and the one before are in nearly every list and shared by neighbours: one dense pass makes one partial of them.
Backward, one pass
over the same lists gives dQ partials (summed in slot order), dK and dV (summed in list order, pieces of one list in
order, chunks of queries in order). Nothing is added by atomics, so equal runs are equal bit for bit.

Few queries (decode) go query-major: a program owns one query's group and walks its blocks. Short sequences go by
unions: a program owns neighbouring queries and walks the blocks that any of them chose. `_form` is the rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton

from nsa.blocks import Pattern
from nsa.kernels import combine, window
from nsa.kernels import selected_device as device
from nsa.kernels.lists import Layout, build, layout
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
# Up to this many positions, neighbours' blocks are few enough to be walked together: no partials, no merging.
_UNION = 4096
# Keys of a tile, at most, and bytes of its K: a longer KV block is listed as several.
_MOST_KEYS = 64
_KEY_BYTES = 32 << 10
# Cards whose blocks may hold 160 KB of shared memory or more; others hold 99 KB, and half the keys.
_ROOMY = (80, 90, 100)
_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
# Some tiles get 32 registers and 6 to 20 KB of spills a thread from Triton 3.0's assembler, or kill its compiler.
_OLD = _VERSION < (3, 2)
_MOST_DIM = 256
_MOST_GROUPS = 65_535  # a grid's second axis


@dataclass(frozen=True)
class Launch:
    """Rows of a tile, warps, pipeline stages, and most registers of a thread, of one kernel."""

    rows: int
    warps: int
    stages: int
    registers: int | None = None


def launch(kernel: str, sm: int, dim: int, itemsize: int) -> Launch:
    """The launch table: kernel (forward, near, union, backward), card, padded head dim, bytes of an element.

    Times on sm_90, of 6 to 12 candidates each: docs/kernels.md. Elsewhere what compiles within the card's memory.
    """
    if itemsize == 4:
        if _OLD and (kernel == "backward" or (kernel == "near" and dim > 64)):
            return Launch(16, 4 if kernel == "backward" else 8, 1)
        return Launch(32 if dim <= 64 else 16, 4, 1)
    if dim > 128:
        roomy = kernel != "backward" and sm in _ROOMY and not (_OLD and kernel == "near")
        return Launch(64 if roomy else 32, 8, 1)
    if kernel == "union" and sm in (90, 100):
        # Capped, two of these blocks share a multiprocessor.
        return Launch(128, 8, 3, 128) if dim <= 64 else Launch(64, 4, 3)
    if kernel in ("forward", "near", "union"):
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
    if q.shape[0] * v.shape[2] > _MOST_GROUPS:
        reasons.append(f"{backend} takes at most {_MOST_GROUPS} batch rows x KV heads, not {q.shape[0] * v.shape[2]}")
    return reasons


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x as the kernels load it; a copy only where the last axis is strided."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _parts(q: torch.Tensor, v: torch.Tensor, l_sel: int) -> int:
    """Equal parts that a block is listed as, so that each is at most a tile's keys."""
    row = max(padded(q.shape[3]), padded(v.shape[3])) * q.element_size()
    most = min(_MOST_KEYS, (_KEY_BYTES if capability(q) in _ROOMY else _KEY_BYTES // 2) // row)
    return next(c for c in range(1, l_sel + 1) if l_sel % c == 0 and l_sel // c <= most)


def _split(q: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor, l_sel: int) -> tuple[torch.Tensor, int]:
    """Blocks as (their parts, length of a part)."""
    parts = _parts(q, v, l_sel)
    if parts > 1:
        each = blocks.unsqueeze(-1) * parts + torch.arange(parts, dtype=torch.int32, device=blocks.device)
        in_range = (blocks >= 0) & (blocks <= torch.iinfo(torch.int32).max // parts - 1)
        blocks = each.masked_fill(~in_range.unsqueeze(-1), -1).flatten(3)
    return blocks.contiguous(), l_sel // parts


@dataclass(frozen=True)
class _Plan:
    """What a call's shape decides: sizes that its launches are specialised for, their tiles, and the lists' layout."""

    B: int
    T: int
    G: int
    R: int
    S: int
    DK: int
    DV: int
    sizes: dict[str, Any]
    form: str
    options: dict[str, dict[str, int]]
    layout: Layout

    @property
    def groups(self) -> int:
        return self.B * self.G

    @property
    def places(self) -> int:
        """Rows of a chunk, times heads, over all groups: partials of one slot."""
        return self.groups * min(self.layout.chunk, self.T) * self.R


@lru_cache(maxsize=256)
def _plan(
    B: int, T: int, H: int, G: int, N: int, L: int, S: int, DK: int, DV: int, dtype: torch.dtype, sm: int,
    partial_bytes: int, words_bytes: int, piece_rows: tuple[int, int], form: str,
) -> _Plan:  # fmt: skip
    R, dim = H // G, max(padded(DK), padded(DV))
    # One set of chunks for both directions, so that their lists are the same.
    a_query = B * G * (N + 1) * R * (max(DK, DV) * dtype.itemsize + 4)
    chunks = max(1, -(-T * a_query // partial_bytes))
    piece = (max(1, piece_rows[0] // R), max(1, piece_rows[1] // R))
    cut = layout(B * G, T, N, L, S, max(1, -(-T // chunks // 32)) * 32, words_bytes, piece)
    sizes = {
        "N": N, "R": R, "L": L, "BS": padded(L), "DK": DK, "DV": DV, "DKP": padded(DK), "DVP": padded(DV),
        "IP": precision(dtype),
    }  # fmt: skip
    options = {}
    for kernel in ("forward", "near", "union", "backward"):
        chosen = launch(kernel, sm, dim, dtype.itemsize)
        options[kernel] = {"ROWS": chosen.rows, "num_warps": chosen.warps, "num_stages": chosen.stages}
        if chosen.registers:
            options[kernel]["maxnreg"] = chosen.registers
    return _Plan(B, T, G, R, S, DK, DV, sizes, form, options, cut)


def lists_size(q: torch.Tensor, v: torch.Tensor, N: int, p: Pattern, S: int) -> int:
    """Elements of the lists that `forward_summed` hands to the backward (`keep`), for blocks of N slots."""
    parts = _parts(q, v, p.l_sel)
    return _plan_of(q, v, v.shape[2], N * parts, p.l_sel // parts, S).layout.size


def _plan_of(q: torch.Tensor, v: torch.Tensor, G: int, N: int, L: int, S: int) -> _Plan:
    pieces = (_PIECE_ROWS["forward"], _PIECE_ROWS["backward"])
    return _plan(
        *q.shape[:3], G, N, L, S, q.shape[3], v.shape[3], q.dtype, capability(q),
        _PARTIAL_BYTES, _WORDS_BYTES, pieces, _form(q.shape[1], S, max(q.shape[3], v.shape[3])),
    )  # fmt: skip


def _merged_rows(dim: int) -> int:
    """Rows of a merging program: 2,048 elements of a slot at once."""
    return max(1, 2048 // padded(dim))


def takes_all(backend: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: Pattern, S: int) -> bool:
    """Whether the choice of blocks leaves none of S positions out, and `forward` may be called with blocks None."""
    return p.n_sel * p.l_sel >= S and not window.unsupported(backend, q, k, v)


@dataclass(frozen=True)
class _Gates:
    """The other branches [B,T,H,Dv] and the gate logits [B,T,H,3] of the gated sum, and the sum."""

    cmp: torch.Tensor
    win: torch.Tensor
    logits: torch.Tensor
    softmax: bool
    out: torch.Tensor

    @classmethod
    def of(cls, cmp: torch.Tensor, win: torch.Tensor, logits: torch.Tensor, softmax: bool) -> _Gates:
        out = torch.empty(cmp.shape, dtype=cmp.dtype, device=cmp.device)
        return cls(_rows(cmp), _rows(win), logits, softmax, out)

    def arguments(self) -> tuple[tuple[Any, ...], tuple[int, ...], dict[str, bool]]:
        """Tensors, strides and constants of a kernel that writes the sum."""
        by_token, by_head, logits = combine.logits_rows(self.logits)
        tensors = (self.out, self.cmp, self.win, logits)
        strides = (*self.cmp.stride()[:3], *self.win.stride()[:3], by_token, by_head)
        return tensors, strides, {"SUM": True, "SOFTMAX": self.softmax}


def _arguments(gates: _Gates | None, sel: torch.Tensor) -> tuple[tuple[Any, ...], tuple[int, ...], dict[str, bool]]:
    return gates.arguments() if gates else ((sel,) * 4, (0,) * 8, {"SUM": False, "SOFTMAX": False})


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor | None, p: Pattern, S: int, count: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """out [B,T,H,Dv], lse [B,T,H] fp32 (natural), tokens read [B,G] or [] (counted where they are loaded).

    q [B,T,H,Dk], k [B,>=S,G,Dk], v [B,>=S,G,Dv], blocks [B,T,G,N] int32, any strides. blocks None: all, see
    `takes_all`.
    """
    return _forward(q, k, v, blocks, p, S, count, backend, None, False)[:3]


def forward_summed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor | None, p: Pattern, S: int, count: bool,
    backend: str, cmp: torch.Tensor, win: torch.Tensor, logits: torch.Tensor, softmax: bool, keep: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The gated sum [B,T,H,Dv] in cmp's dtype; then out, lse and reads as `forward`; and the lists for `backward`.

    cmp and win [B,T,H,Dv]; logits [B,T,H,3] of the gates cmp, sel, win: sigmoid, or softmax over the three. lists:
    int32, [0] where this form made none; keep: it makes them for the backward though it reads none itself.
    """
    if blocks is None:
        sel, lse, reads, lists = _forward(q, k, v, None, p, S, count, backend, None, False)
        return combine.forward(cmp, sel, win, logits, softmax), sel, lse, reads, lists
    gates = _Gates.of(cmp, win, logits, softmax)
    return gates.out, *_forward(q, k, v, blocks, p, S, count, backend, gates, keep)


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor | None, p: Pattern, S: int, count: bool,
    backend: str, gates: _Gates | None, keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    lists = torch.empty(0, dtype=torch.int32, device=q.device)
    if blocks is None:
        return *window.forward(q, k, v, None, p._replace(w=S), S, count, backend), lists
    q, k, v = _rows(q), _rows(k), _rows(v)
    blocks, l_sel = _split(q, v, blocks, p.l_sel)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(out.shape[:3], dtype=torch.float32)
    reads = q.new_zeros((q.shape[0], k.shape[2]) if count else (0,), dtype=torch.int64)
    if out.numel():
        plan = _plan_of(q, v, blocks.shape[2], blocks.shape[3], l_sel, S)
        with on_device(q):
            if keep or plan.form == "block":
                lists = build(blocks, plan.layout)
            if plan.form == "block":
                _forward_by_block(plan, q, k, v, blocks, lists, out, lse, reads, count, gates)
            else:
                _forward_by_row(plan, q, k, v, blocks, out, lse, reads, count, gates)
    return out, lse, reads, lists


def _form(T: int, S: int, dim: int) -> str:
    """What the forward's programs own: one query, the union of some queries' blocks, or one block."""
    if T <= _FEW:
        return "query"
    return "union" if S <= _UNION and dim <= 128 else "block"


def _forward_by_row(
    plan: _Plan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor, out: torch.Tensor,
    lse: torch.Tensor, reads: torch.Tensor, count: bool, gates: _Gates | None,
) -> None:  # fmt: skip
    grid: tuple[int, ...]
    kernel: Any
    if plan.form == "query":
        options: dict[str, Any] = {**plan.options["forward"], "ROWS": min(64, padded(plan.R))}
        kernel, grid = device.query_forward, (plan.T, plan.groups, triton.cdiv(plan.R, options["ROWS"]))
    else:
        options = {**plan.options["union"], "NP": triton.next_power_of_2(plan.sizes["N"])}
        options["ROWS"] = min(options["ROWS"], padded(plan.T * plan.R))
        options["ALWAYS"] = _OLD or plan.sizes["L"] != plan.sizes["BS"]
        kernel, grid = device.union_forward, (plan.groups, triton.cdiv(plan.T * plan.R, options["ROWS"]))
    tensors, strides, constants = _arguments(gates, out)
    kernel[grid](
        q, k, v, blocks, out, lse, reads, *tensors, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *strides,
        plan.DK**-0.5 * LOG2E, plan.S, plan.T, plan.G, **plan.sizes, COUNT=count, **constants, **options,
    )  # fmt: skip


def _forward_by_block(
    plan: _Plan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor, lists: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, reads: torch.Tensor, count: bool, gates: _Gates | None,
) -> None:  # fmt: skip
    sizes, near, N = plan.sizes, plan.options["near"], plan.sizes["N"]
    partial = q.new_empty(plan.places * (N + 1), plan.DV)
    partial_lse = lse.new_empty(len(partial))
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    scale2, merged = plan.DK**-0.5 * LOG2E, _merged_rows(plan.DV)
    tensors, others, constants = _arguments(gates, out)
    kept = {name: sizes[name] for name in ("N", "R", "L", "DV", "DVP", "IP")}
    for chunk in plan.layout.chunks:
        a, n = chunk.start, chunk.stop - chunk.start
        device.block_forward[(chunk.pieces[0], plan.groups)](
            q, k, v, lists, partial, partial_lse, reads, *strides, scale2, plan.S, a, n, plan.G,
            chunk.tables[0], chunk.rooms[0], **sizes, COUNT=count, **plan.options["forward"],
        )  # fmt: skip
        device.near_forward[(triton.cdiv(n * plan.R, near["ROWS"]), plan.groups)](
            q, k, v, blocks, partial, partial_lse, reads, *strides, scale2, plan.S, plan.T, a, n, plan.G,
            **sizes, NP=triton.next_power_of_2(N), COUNT=count, **near,
        )  # fmt: skip
        device.merge[(triton.cdiv(n * plan.R, merged), plan.groups)](
            partial, partial_lse, blocks, out, lse, *tensors, *others, plan.S, plan.T, a, n, plan.G,
            **kept, ROWS=merged, **constants, num_warps=4,
        )  # fmt: skip


def backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor | None,
    out: torch.Tensor, lse: torch.Tensor, p: Pattern, S: int, backend: str, gate: torch.Tensor | None,
    delta: torch.Tensor | None, *, lists: torch.Tensor | None = None, plus: tuple[torch.Tensor, ...] = (),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """dq, dk, dv of `forward`'s out, in the inputs' dtypes and shapes; dk and dv are 0 past S. Equal runs are equal.

    What gate and delta mean: `nsa.ops.branch`. lists: what `forward_summed` returned. plus: gradients [B,T,H,Dk], at
    most two, added to dq in fp32.
    """
    if blocks is None:
        dq, dk, dv = window.backward(dout, q, k, v, None, out, lse, p._replace(w=S), S, backend, gate, delta)
        return _sum(dq, plus) if plus else dq, dk, dv
    q, k, v, dout = _rows(q), _rows(k), _rows(v), _rows(gated(dout, gate))
    blocks, l_sel = _split(q, v, blocks, p.l_sel)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if not out.numel():
        return dq, dk.zero_(), dv.zero_()
    plan = _plan_of(q, v, blocks.shape[2], blocks.shape[3], l_sel, S)
    with on_device(q):
        if lists is None or not lists.numel():
            lists = build(blocks, plan.layout)
        lse = lse.contiguous()
        # fp32 takes back the rounding of lse, the larger part of its error; below that it is lost in the inputs'. An
        # lse that carries a gate has no such sum.
        mass = _mass(plan, q, k, blocks, lse) if q.dtype == torch.float32 and delta is None else None
        delta = _row_products(out, dout) if delta is None else delta.contiguous()
        _backward(plan, dout, q, k, v, blocks, lse, delta, mass, lists, plus, dq, dk, dv)
    return dq, dk, dv


def _row_products(out: torch.Tensor, dout: torch.Tensor) -> torch.Tensor:
    """rowsum(out * dout) [B,T,H], fp32."""
    B, T, H, DV = out.shape
    made = torch.empty((B, T, H), dtype=torch.float32, device=out.device)
    device.row_products[(triton.cdiv(T * H, _merged_rows(DV)), B)](
        out.contiguous(), dout, made, *dout.stride()[:3], T, H, DV=DV, DVP=padded(DV), ROWS=_merged_rows(DV),
        num_warps=4,
    )  # fmt: skip
    return made


def _mass(plan: _Plan, q: torch.Tensor, k: torch.Tensor, blocks: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    sizes = {name: value for name, value in plan.sizes.items() if name not in ("DV", "DVP")}
    rows = min(16, padded(plan.R))
    mass = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
    device.query_mass[(plan.T, plan.groups, triton.cdiv(plan.R, rows))](
        q, k, blocks, lse, mass, *q.stride()[:3], *k.stride()[:3], plan.DK**-0.5, plan.S, plan.T, plan.G,
        **sizes, ROWS=rows, num_warps=4, num_stages=1,
    )  # fmt: skip
    return mass


def _backward(
    plan: _Plan, dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor,
    lse: torch.Tensor, delta: torch.Tensor, mass: torch.Tensor | None, lists: torch.Tensor,
    plus: tuple[torch.Tensor, ...], dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor,
) -> None:  # fmt: skip
    sizes, held, L = plan.sizes, k.shape[1], plan.layout.L
    width = plan.DK + plan.DV
    partial = q.new_empty(plan.places * sizes["N"], plan.DK)
    spill = lse.new_empty(plan.groups * plan.layout.spill_rows * padded(L), width)
    chunks = plan.layout.chunks
    total = lse.new_empty(plan.groups * held, width) if len(chunks) > 1 else spill
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3])
    gather = {name: sizes[name] for name in ("L", "BS", "DK", "DV", "DKP", "DVP")}
    for chunk in chunks:
        a, n = chunk.start, chunk.stop - chunk.start
        edge = (chunk is chunks[0]) + 2 * (chunk is chunks[-1])
        device.block_backward[(chunk.pieces[1], plan.groups)](
            q, k, v, dout, lse, delta, lse if mass is None else mass, lists, partial, total, dk, dv, spill,
            *strides, plan.DK**-0.5, plan.S, plan.T, a, n, plan.G, chunk.tables[1], chunk.rooms[1], held, edge,
            **sizes, MASS=mass is not None, **plan.options["backward"],
        )  # fmt: skip
        device.gather_spill[(plan.groups * triton.cdiv(held, L), padded(L) // 16)](
            lists, spill, total, dk, dv, plan.S, plan.G, plan.groups, chunk.known, held, edge,
            **gather, KEYS=16, num_warps=4,
        )  # fmt: skip
        _sum_slots(plan, partial, blocks, plus, dq, a, n)


def _sum_slots(
    plan: _Plan, partial: torch.Tensor, blocks: torch.Tensor, plus: tuple[torch.Tensor, ...], dq: torch.Tensor,
    start: int, n: int,
) -> None:  # fmt: skip
    rows = _merged_rows(plan.DK)
    device.sum_slots[(triton.cdiv(n * plan.R, rows), plan.groups)](
        partial, blocks, *_three(plus, dq), dq, plan.S, plan.T, start, n, plan.G, N=plan.sizes["N"], R=plan.R,
        L=plan.sizes["L"], D=plan.DK, DP=padded(plan.DK), ROWS=rows, PLUS=len(plus), num_warps=4,
    )  # fmt: skip


def _three(plus: tuple[torch.Tensor, ...], other: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (*(x.contiguous() for x in plus), *(other,) * (3 - len(plus)))


def _sum(dq: torch.Tensor, plus: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """dq + plus in fp32, rounded once."""
    B, T, H, D = dq.shape
    rows, total = _merged_rows(D), torch.empty_like(dq, memory_format=torch.contiguous_format)
    if dq.numel():
        with on_device(dq):
            device.sum_slots[(triton.cdiv(T * H, rows), B)](
                dq, dq, *_three((dq, *plus), dq), total, T, T, 0, T, 1,
                N=0, R=H, L=1, D=D, DP=padded(D), ROWS=rows, PLUS=1 + len(plus), num_warps=4,
            )  # fmt: skip
    return total
