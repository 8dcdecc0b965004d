"""Selected attention on the GPU, block-major: a program owns one KV block and walks the queries that chose it.

The rows of a tile are (query, head of the group) pairs, packed with no gap, so that any group size fills the tile; K
and V are loaded once for all of them. A row's result against one block is a partial: its output and logsumexp go to
the slot of the query's list that named the block, and `_merge` weighs a row's slots in slot order. Backward, one pass
over the same lists gives dQ partials (summed in slot order), dK and dV (summed in list order, pieces of one list in
order, chunks of queries in order). Nothing is added by atomics, so equal runs are equal bit for bit.

Few queries (decode) go query-major: a program owns one query's group and walks its blocks. `_query_major` is the rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from nsa.kernels import lists
from nsa.kernels.primitives import LOG2E, capability, exp2, on_device, padded, precision, visible

# Bounds of the workspace: partial results of a chunk of queries, and the bit words of a stretch of chunks. With the
# pieces' dK and dV (at most 64 MiB) and the lists themselves it stays under 1 GiB at any length.
_PARTIAL_BYTES = 768 << 20
_WORDS_BYTES = 96 << 20
# Rows of work a piece of a list holds: enough to pay for its K and V, few enough to even out the programs.
_PIECE_ROWS = {"forward": 2048, "backward": 4096}
# Up to this many queries the lists cost more than they save.
_FEW = 16
# A KV block is at most this many keys of one tile; longer ones are listed as several.
_MOST_KEYS = 128
_MOST_DIM = 256


@dataclass(frozen=True)
class Launch:
    """Rows of a tile, warps and pipeline stages of one kernel."""

    rows: int
    warps: int
    stages: int


def launch(kernel: str, sm: int, dim: int, itemsize: int) -> Launch:
    """The launch table: kernel (forward, backward), card, padded head dim, bytes of an element.

    Times on sm_90, of 6 to 12 candidates each: docs/kernels.md. Elsewhere what compiles within the card's memory.
    """
    if itemsize == 4:
        return Launch(32 if dim <= 64 else 16, 4, 1)
    if dim > 128:
        return Launch(64 if kernel == "forward" and sm != 89 else 32, 8, 1)
    if kernel == "forward":
        return Launch(64, 4, 2)
    if dim <= 64:
        return Launch(64, 4, 3 if sm >= 90 else 2)
    return Launch(128, 8, 2) if sm >= 90 else Launch(64, 8, 2 if sm == 80 else 1)


def unsupported(backend: str, *tensors: torch.Tensor) -> list[str]:
    """Reasons why these q, k, v cannot be taken; none if they can."""
    q, _, v = tensors[:3]
    reasons = []
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        reasons.append(f"{backend} takes bf16, fp16 or fp32, not {q.dtype}")
    if max(q.shape[-1], v.shape[-1]) > _MOST_DIM:
        reasons.append(f"{backend} takes head dims up to {_MOST_DIM}, not {max(q.shape[-1], v.shape[-1])}")
    return reasons


@triton.jit
def _block_forward(
    Q, K, V, Pairs, Table, Partial, PartialLse, Reads,
    sq_b, sq_t, sq_h, sq_d, sk_b, sk_t, sk_g, sk_d, sv_b, sv_t, sv_g, sv_d,
    scale2, first, start, Tc, G, M,
    N: tl.constexpr, R: tl.constexpr, L: tl.constexpr, BS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    DKP: tl.constexpr, DVP: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    cell = Table + tl.program_id(0).to(tl.int64) * 4
    key = tl.load(cell)
    if key < 0:
        return
    begin = tl.load(cell + 1)
    rows = (tl.load(cell + 2) - begin) * R
    bg = (key // M).to(tl.int64)
    inside = tl.arange(0, BS)
    token = (key % M) * L + inside
    dk, dv = tl.arange(0, DKP), tl.arange(0, DVP)
    # A listed block lies before its query or holds it, so only the own block can pass the end: bounded by the query.
    held = (inside < L) & (token < first + Tc + start)
    k = tl.load(
        K + (bg // G) * sk_b + (bg % G) * sk_g + token.to(tl.int64)[None, :] * sk_t + dk[:, None] * sk_d,
        mask=held[None, :] & (dk[:, None] < DK), other=0.0,
    )  # fmt: skip
    v = tl.load(
        V + (bg // G) * sv_b + (bg % G) * sv_g + token.to(tl.int64)[:, None] * sv_t + dv[None, :] * sv_d,
        mask=held[:, None] & (dv[None, :] < DV), other=0.0,
    )  # fmt: skip
    queries = Q + (bg // G) * sq_b + (bg % G) * R * sq_h
    partial = bg * Tc * N
    reads = tl.zeros([ROWS], tl.int32)
    lane = tl.arange(0, ROWS)
    ahead = tl.load(Pairs + begin + lane // R, mask=lane < rows, other=0)
    for x0 in range(0, rows, ROWS):
        x = x0 + lane
        ok = x < rows
        pair = ahead
        ahead = tl.load(Pairs + begin + (x + ROWS) // R, mask=x + ROWS < rows, other=0)
        i = pair // N
        head = x % R
        q = tl.load(
            queries + i.to(tl.int64)[:, None] * sq_t + head[:, None] * sq_h + dk[None, :] * sq_d,
            mask=ok[:, None] & (dk[None, :] < DK), other=0.0,
        )  # fmt: skip
        # A row past the list's end sees the whole block: no row of scores is empty.
        see = token[None, :] <= tl.where(ok, first + i, 2147483647)[:, None]
        if L != BS:
            see = see & (inside < L)[None, :]
        s = tl.where(see, tl.dot(q, k, input_precision=IP), float("-inf"))
        m = tl.max(s, 1) * scale2
        p = exp2(s * scale2 - m[:, None], IP)
        z = tl.sum(p, 1)
        o = tl.dot(p.to(v.dtype), v, input_precision=IP) * (1.0 / z)[:, None]
        place = (partial + pair - start * N) * R + head
        tl.store(
            Partial + place[:, None] * DV + dv[None, :], o.to(Partial.dtype.element_ty),
            mask=ok[:, None] & (dv[None, :] < DV), cache_modifier=".cs",
        )  # fmt: skip
        tl.store(PartialLse + place, m + tl.log2(z), mask=ok)
        if COUNT:
            reads += tl.where(ok & (head == 0), tl.sum(see.to(tl.int32), 1), 0)
    if COUNT:
        tl.atomic_add(Reads + bg, tl.sum(reads, 0).to(tl.int64))


@triton.jit
def _merge(
    Partial, PartialLse, Blocks, Out, Lse, sb_b, sb_t, sb_g, sb_n, so_b, so_t, so_h, sl_b, sl_t, sl_h,
    first, Tc, G,
    N: tl.constexpr, R: tl.constexpr, L: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, ROWS: tl.constexpr,
    IP: tl.constexpr,
):  # fmt: skip
    x = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    bg = tl.program_id(1).to(tl.int64)
    i = (x // R).to(tl.int64)
    head = x % R
    ok = i < Tc
    dv = tl.arange(0, DVP)
    place = (bg * Tc + i) * N * R + head
    listed = Blocks + (bg // G) * sb_b + (bg % G) * sb_g + i * sb_t
    m = tl.full([ROWS], float("-inf"), tl.float32)
    for n in tl.static_range(N):
        there = visible(tl.load(listed + n * sb_n, mask=ok, other=-1), first + i, L)
        m = tl.maximum(m, tl.load(PartialLse + place + n * R, mask=there, other=float("-inf")))
    safe = tl.where(m == float("-inf"), 0.0, m)
    z = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, DVP], tl.float32)
    for n in tl.static_range(N):
        there = visible(tl.load(listed + n * sb_n, mask=ok, other=-1), first + i, L)
        weight = exp2(tl.load(PartialLse + place + n * R, mask=there, other=float("-inf")) - safe, IP)
        part = tl.load(
            Partial + (place + n * R)[:, None] * DV + dv[None, :], mask=there[:, None] & (dv[None, :] < DV), other=0.0
        )
        z += weight
        out += part.to(tl.float32) * weight[:, None]
    out = out / tl.where(z == 0.0, 1.0, z)[:, None]
    lse = tl.where(z == 0.0, float("-inf"), safe * 0.6931471805599453 + tl.log(tl.where(z == 0.0, 1.0, z)))
    head += (bg % G).to(tl.int32) * R
    tl.store(
        Out + (bg // G) * so_b + i[:, None] * so_t + head[:, None] * so_h + dv[None, :],
        out.to(Out.dtype.element_ty), mask=ok[:, None] & (dv[None, :] < DV),
    )  # fmt: skip
    tl.store(Lse + (bg // G) * sl_b + i * sl_t + head * sl_h, lse, mask=ok)


@triton.jit
def _query_forward(
    Q, K, V, Blocks, Out, Lse, Reads,
    sq_b, sq_t, sq_h, sq_d, sk_b, sk_t, sk_g, sk_d, sv_b, sv_t, sv_g, sv_d,
    sb_b, sb_t, sb_g, sb_n, so_b, so_t, so_h, sl_b, sl_t, sl_h,
    scale2, first, G,
    N: tl.constexpr, R: tl.constexpr, L: tl.constexpr, BS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    DKP: tl.constexpr, DVP: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """A program: one query's heads of one group (ROWS of them at a time), its blocks in slot order."""
    i = tl.program_id(0).to(tl.int64)
    bg = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    head = (bg % G) * R + row
    ok = row < R
    t = first + i
    inside = tl.arange(0, BS)
    dk, dv = tl.arange(0, DKP), tl.arange(0, DVP)
    q = tl.load(
        Q + (bg // G) * sq_b + i * sq_t + head[:, None] * sq_h + dk[None, :] * sq_d,
        mask=ok[:, None] & (dk[None, :] < DK), other=0.0,
    )  # fmt: skip
    keys = K + (bg // G) * sk_b + (bg % G) * sk_g + dk[:, None] * sk_d
    values = V + (bg // G) * sv_b + (bg % G) * sv_g + dv[None, :] * sv_d
    m = tl.full([ROWS], float("-inf"), tl.float32)
    z = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, DVP], tl.float32)
    reads = tl.zeros([BS], tl.int32)
    for n in range(N):
        block = tl.load(Blocks + (bg // G) * sb_b + i * sb_t + (bg % G) * sb_g + n * sb_n)
        there = visible(block, t, L)
        token = tl.where(there, block, 0).to(tl.int64) * L + inside
        see = there & (inside < L) & (token <= t)
        k = tl.load(keys + token[None, :] * sk_t, mask=see[None, :] & (dk[:, None] < DK), other=0.0)
        v = tl.load(values + token[:, None] * sv_t, mask=see[:, None] & (dv[None, :] < DV), other=0.0)
        s = tl.where(see[None, :], tl.dot(q, k, input_precision=IP) * scale2, float("-inf"))
        above = tl.maximum(m, tl.max(s, 1))
        safe = tl.where(above == float("-inf"), 0.0, above)
        p = exp2(s - safe[:, None], IP)
        fade = exp2(m - safe, IP)
        z = z * fade + tl.sum(p, 1)
        out = out * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision=IP)
        m = above
        if COUNT:
            reads += see.to(tl.int32)
    some = z > 0.0
    out = out / tl.where(some, z, 1.0)[:, None]
    lse = tl.where(some, m * 0.6931471805599453 + tl.log(tl.where(some, z, 1.0)), float("-inf"))
    tl.store(
        Out + (bg // G) * so_b + i * so_t + head[:, None] * so_h + dv[None, :],
        out.to(Out.dtype.element_ty), mask=ok[:, None] & (dv[None, :] < DV),
    )  # fmt: skip
    tl.store(Lse + (bg // G) * sl_b + i * sl_t + head * sl_h, lse, mask=ok)
    if COUNT:
        tl.atomic_add(Reads + bg, tl.sum(reads, 0).to(tl.int64), mask=tl.program_id(2) == 0)


@triton.jit
def _delta(
    Out, Dout, Delta, so_b, so_t, so_h, so_d, sd_b, sd_t, sd_h, sd_d, T, H,
    DV: tl.constexpr, DVP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """rowsum(out * dout) of [B,T,H,D], to fp32 [B,T,H]."""
    x = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(1).to(tl.int64)
    i = (x // H).to(tl.int64)
    head = x % H
    ok = i < T
    dv = tl.arange(0, DVP)
    mask = ok[:, None] & (dv[None, :] < DV)
    out = tl.load(Out + b * so_b + i[:, None] * so_t + head[:, None] * so_h + dv[None, :] * so_d, mask=mask, other=0.0)
    dout = tl.load(
        Dout + b * sd_b + i[:, None] * sd_t + head[:, None] * sd_h + dv[None, :] * sd_d, mask=mask, other=0.0
    )
    tl.store(Delta + (b * T + i) * H + head, tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1), mask=ok)


@triton.jit
def _block_backward(
    Q, K, V, Dout, Lse, Delta, Pairs, Table, Partial, Dk, Dv, SpillK, SpillV,
    sq_b, sq_t, sq_h, sq_d, sk_b, sk_t, sk_g, sk_d, sv_b, sv_t, sv_g, sv_d, sd_b, sd_t, sd_h, sd_d,
    sl_b, sl_t, sl_h, sy_b, sy_t, sy_h, sdk_b, sdk_t, sdk_g, sdv_b, sdv_t, sdv_g,
    scale, first, start, Tc, G, M,
    N: tl.constexpr, R: tl.constexpr, L: tl.constexpr, BS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    DKP: tl.constexpr, DVP: tl.constexpr, ROWS: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    cell = Table + tl.program_id(0).to(tl.int64) * 4
    key = tl.load(cell)
    if key < 0:
        return
    begin = tl.load(cell + 1)
    rows = (tl.load(cell + 2) - begin) * R
    spill = tl.load(cell + 3).to(tl.int64)
    bg = (key // M).to(tl.int64)
    b = bg // G
    g = bg % G
    inside = tl.arange(0, BS)
    token = (key % M) * L + inside
    dk, dv = tl.arange(0, DKP), tl.arange(0, DVP)
    held = (inside < L) & (token < first + Tc + start)
    line = token.to(tl.int64)[:, None]
    in_k = held[:, None] & (dk[None, :] < DK)
    in_v = held[:, None] & (dv[None, :] < DV)
    k = tl.load(K + b * sk_b + g * sk_g + line * sk_t + dk[None, :] * sk_d, mask=in_k, other=0.0)
    v = tl.load(V + b * sv_b + g * sv_g + line * sv_t + dv[None, :] * sv_d, mask=in_v, other=0.0)
    grad_k = tl.zeros([BS, DKP], tl.float32)
    grad_v = tl.zeros([BS, DVP], tl.float32)
    scale2 = scale * 1.4426950408889634
    lane = tl.arange(0, ROWS)
    ahead = tl.load(Pairs + begin + lane // R, mask=lane < rows, other=0)
    for x0 in range(0, rows, ROWS):
        x = x0 + lane
        ok = x < rows
        pair = ahead
        ahead = tl.load(Pairs + begin + (x + ROWS) // R, mask=x + ROWS < rows, other=0)
        i = pair // N
        head = x % R
        at = i.to(tl.int64)
        h = g * R + head
        q = tl.load(
            Q + b * sq_b + at[:, None] * sq_t + h[:, None] * sq_h + dk[None, :] * sq_d,
            mask=ok[:, None] & (dk[None, :] < DK), other=0.0,
        )  # fmt: skip
        do = tl.load(
            Dout + b * sd_b + at[:, None] * sd_t + h[:, None] * sd_h + dv[None, :] * sd_d,
            mask=ok[:, None] & (dv[None, :] < DV), other=0.0,
        )  # fmt: skip
        lse = tl.load(Lse + b * sl_b + at * sl_t + h * sl_h, mask=ok, other=0.0)
        delta = tl.load(Delta + b * sy_b + at * sy_t + h * sy_h, mask=ok, other=0.0) * scale
        # Rows past the list's end have q, dout, lse and delta 0: they add nothing.
        see = token[None, :] <= (first + i)[:, None]
        if L != BS:
            see = see & (inside < L)[None, :]
        s = tl.dot(q, tl.trans(k), input_precision=IP)
        if IP == "ieee":
            # lse is subtracted before the change of base: its product would be rounded, and a row's error with it.
            p = exp2((s * scale - lse[:, None]) * 1.4426950408889634, IP)
        else:
            p = exp2(s * scale2 - (lse * 1.4426950408889634)[:, None], IP)
        p = tl.where(see, p, 0.0)
        grad_v += tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=IP)
        dp = tl.dot(do, tl.trans(v), input_precision=IP)
        ds = (p * (dp * scale - delta[:, None])).to(q.dtype)
        grad_k += tl.dot(tl.trans(ds), q, input_precision=IP)
        dq = tl.dot(ds, k, input_precision=IP)
        place = (bg * Tc * N + pair - start * N) * R + head
        tl.store(
            Partial + place[:, None] * DK + dk[None, :], dq.to(Partial.dtype.element_ty),
            mask=ok[:, None] & (dk[None, :] < DK), cache_modifier=".cs",
        )  # fmt: skip
    if spill >= 0:
        tl.store(SpillK + (spill * BS + inside)[:, None] * DK + dk[None, :], grad_k, mask=in_k)
        tl.store(SpillV + (spill * BS + inside)[:, None] * DV + dv[None, :], grad_v, mask=in_v)
    else:
        # The list's only piece of this chunk: no other program of this launch touches the block's gradient.
        out_k = Dk + b * sdk_b + line * sdk_t + g * sdk_g + dk[None, :]
        out_v = Dv + b * sdv_b + line * sdv_t + g * sdv_g + dv[None, :]
        tl.store(out_k, tl.load(out_k, mask=in_k, other=0.0) + grad_k, mask=in_k)
        tl.store(out_v, tl.load(out_v, mask=in_v, other=0.0) + grad_v, mask=in_v)


@triton.jit
def _gather_spill(
    Spill, Count, Spilled, Grad, s_b, s_t, s_g, piece, end, G, M,
    L: tl.constexpr, BS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Add a list's pieces, in order, to the gradient of its block; lists of one piece have added their own."""
    key = tl.program_id(0)
    tiles = (tl.load(Count + key) + piece - 1) // piece
    if tiles < 2:
        return
    bg = (key // M).to(tl.int64)
    inside = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    token = (key % M) * L + inside
    d = tl.arange(0, DP)
    mask = ((inside < L) & (token < end))[:, None] & (d[None, :] < D)
    out = Grad + (bg // G) * s_b + (bg % G) * s_g + token.to(tl.int64)[:, None] * s_t + d[None, :]
    total = tl.load(out, mask=mask, other=0.0)
    place = tl.load(Spilled + key) - tiles
    for j in range(0, tiles):
        total += tl.load(Spill + ((place + j) * BS + inside)[:, None] * D + d[None, :], mask=mask, other=0.0)
    tl.store(out, total, mask=mask)


@triton.jit
def _sum_slots(
    Partial, Blocks, Dq, sb_b, sb_t, sb_g, sb_n, so_b, so_t, so_h, first, Tc, G,
    N: tl.constexpr, R: tl.constexpr, L: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    x = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    bg = tl.program_id(1).to(tl.int64)
    i = (x // R).to(tl.int64)
    head = x % R
    ok = i < Tc
    d = tl.arange(0, DP)
    place = (bg * Tc + i) * N * R + head
    listed = Blocks + (bg // G) * sb_b + (bg % G) * sb_g + i * sb_t
    total = tl.zeros([ROWS, DP], tl.float32)
    for n in tl.static_range(N):
        there = visible(tl.load(listed + n * sb_n, mask=ok, other=-1), first + i, L)
        total += tl.load(
            Partial + (place + n * R)[:, None] * D + d[None, :], mask=there[:, None] & (d[None, :] < D), other=0.0
        ).to(tl.float32)
    head += (bg % G).to(tl.int32) * R
    tl.store(
        Dq + (bg // G) * so_b + i[:, None] * so_t + head[:, None] * so_h + d[None, :],
        total.to(Dq.dtype.element_ty), mask=ok[:, None] & (d[None, :] < D),
    )  # fmt: skip


def _split(blocks: torch.Tensor, l_sel: int) -> tuple[torch.Tensor, int]:
    """Blocks as (blocks, length) of at most _MOST_KEYS keys: a longer block is listed as its equal parts."""
    parts = next(c for c in range(1, l_sel + 1) if l_sel % c == 0 and l_sel // c <= _MOST_KEYS)
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
        a_query = self.B * self.G * self.N * self.R * (dim * self.dtype.itemsize + 4)
        chunks = -(-self.T * a_query // _PARTIAL_BYTES)
        chunk = -(-self.T // chunks // 32) * 32
        words = lists.words_bytes(self.B * self.G, self.n_blocks, chunk)
        stretch = max(1, _WORDS_BYTES // words) * chunk
        piece = max(1, _PIECE_ROWS[kernel] // self.R)
        for a in range(0, self.T, stretch):
            rows, first = slice(a, min(a + stretch, self.T)), self.S - self.T + a
            yield rows, first, lists.build(blocks[:, rows], self.L, first, self.n_blocks, chunk, piece)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor, l_sel: int, S: int, count: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out [B,T,H,Dv], lse [B,T,H] fp32 (natural), tokens read [B,G] (counted where they are loaded, if `count`).

    q [B,T,H,Dk], k [B,>=S,G,Dk], v [B,>=S,G,Dv], blocks [B,T,G,N] int32, any strides.
    """
    blocks, l_sel = _split(blocks, l_sel)
    shape = _Shape.of(q, v, blocks, l_sel, S)
    out = q.new_empty(shape.B, shape.T, q.shape[2], shape.DV)
    lse = q.new_empty(out.shape[:3], dtype=torch.float32)
    reads = q.new_zeros(shape.B, shape.G, dtype=torch.int64)
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
    _query_forward[(shape.T, shape.B * shape.G, triton.cdiv(shape.R, rows))](
        q, k, v, blocks, out, lse, reads,
        *q.stride(), *k.stride(), *v.stride(), *blocks.stride(), *out.stride()[:3], *lse.stride(),
        shape.DK**-0.5 * LOG2E, shape.S - shape.T, shape.G, **shape.sizes(), COUNT=count,
        **{**shape.options("forward"), "ROWS": rows},
    )  # fmt: skip


def _forward_by_block(
    shape: _Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, reads: torch.Tensor, count: bool,
) -> None:  # fmt: skip
    groups, merged = shape.B * shape.G, shape.merged_rows(shape.DV)
    for rows, first, plan in shape.stretches("forward", blocks, shape.DV):
        places = groups * plan.chunk * shape.N * shape.R
        partial, partial_lse = q.new_empty(places, shape.DV), lse.new_empty(places)
        part = q[:, rows]
        for c, (a, b) in enumerate(plan.chunks):
            _block_forward[(plan.pieces[c],)](
                part, k, v, plan.pairs, plan.table[c], partial, partial_lse, reads,
                *part.stride(), *k.stride(), *v.stride(), shape.DK**-0.5 * LOG2E, first, a, b - a,
                shape.G, shape.n_blocks, **shape.sizes(), COUNT=count, **shape.options("forward"),
            )  # fmt: skip
            here = slice(rows.start + a, rows.start + b)
            listed, o, e = blocks[:, here], out[:, here], lse[:, here]
            _merge[(triton.cdiv((b - a) * shape.R, merged), groups)](
                partial, partial_lse, listed, o, e, *listed.stride(), *o.stride()[:3], *e.stride(),
                first + a, b - a, shape.G, N=shape.N, R=shape.R, L=shape.L, DV=shape.DV, DVP=padded(shape.DV),
                ROWS=merged, IP=precision(shape.dtype), num_warps=4,
            )  # fmt: skip


def backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, l_sel: int, S: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """dq, dk, dv of `forward`'s out, in the inputs' dtypes and shapes; dk and dv are 0 past S. Equal runs are equal."""
    blocks, l_sel = _split(blocks, l_sel)
    shape = _Shape.of(q, v, blocks, l_sel, S)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.zeros(k.shape, dtype=torch.float32, device=k.device)
    dv = torch.zeros(v.shape, dtype=torch.float32, device=v.device)
    if out.numel():
        with on_device(q):
            _backward(shape, dout, q, k, v, blocks, out, lse, dq, dk, dv)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _backward(
    shape: _Shape, dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor,
) -> None:  # fmt: skip
    groups, sizes = shape.B * shape.G, shape.sizes()
    delta = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
    heads, merged = q.shape[2], shape.merged_rows(shape.DV)
    _delta[(triton.cdiv(shape.T * heads, merged), shape.B)](
        out, dout, delta, *out.stride(), *dout.stride(), shape.T, heads,
        DV=shape.DV, DVP=padded(shape.DV), ROWS=merged, num_warps=4,
    )  # fmt: skip
    merged = shape.merged_rows(shape.DK)
    keys = groups * shape.n_blocks
    for rows, first, plan in shape.stretches("backward", blocks, shape.DK):
        partial = q.new_empty(groups * plan.chunk * shape.N * shape.R, shape.DK)
        spills = [dk.new_empty(plan.spill_rows * padded(shape.L), dim) for dim in (shape.DK, shape.DV)]
        x, do, e, y = q[:, rows], dout[:, rows], lse[:, rows], delta[:, rows]
        for c, (a, b) in enumerate(plan.chunks):
            _block_backward[(plan.pieces[c],)](
                x, k, v, do, e, y, plan.pairs, plan.table[c], partial, dk, dv, *spills,
                *x.stride(), *k.stride(), *v.stride(), *do.stride(), *e.stride(), *y.stride(),
                *dk.stride()[:3], *dv.stride()[:3], shape.DK**-0.5, first, a, b - a, shape.G, shape.n_blocks,
                **sizes, **shape.options("backward"),
            )  # fmt: skip
            for spill, grad, dim in zip(spills, (dk, dv), (shape.DK, shape.DV), strict=True):
                _gather_spill[(keys, padded(shape.L) // 16)](
                    spill, plan.count[c], plan.spilled[c], grad, *grad.stride()[:3], plan.piece, first + b,
                    shape.G, shape.n_blocks, L=shape.L, BS=padded(shape.L), D=dim, DP=padded(dim), KEYS=16,
                    num_warps=4,
                )  # fmt: skip
            here = slice(rows.start + a, rows.start + b)
            listed, d = blocks[:, here], dq[:, here]
            _sum_slots[(triton.cdiv((b - a) * shape.R, merged), groups)](
                partial, listed, d, *listed.stride(), *d.stride()[:3], first + a, b - a, shape.G,
                N=shape.N, R=shape.R, L=shape.L, D=shape.DK, DP=padded(shape.DK), ROWS=merged, num_warps=4,
            )  # fmt: skip
