"""The kernels of selected.py. Strides are named by tensor and axis: sq_t is q's over tokens; every last one is 1, and a
tensor without strides is contiguous.

Sizes: N slots, R heads a group, L tokens a block in a tile of BS; DK, DV head dims in tiles of DKP, DVP; ROWS of a
tile, a row being one head of one query; IP the precision of every dot. Scores and lse are in units of log 2 inside.
Queries start .. start + Tc - 1 of T are a chunk; the query i stands at position S - T + i.
"""

import triton
import triton.language as tl

from nsa.kernels.combine import _gates
from nsa.kernels.primitives import exp2, far, popcount, visible


@triton.jit
def _finish(
    Sel, Lse, Sum, Cmp, Win, Logits, sel, lse, b, i, h, dv, ok, T, H,
    sc_b, sc_t, sc_h, sw_b, sw_t, sw_h, sl_t, sl_h,
    DV: tl.constexpr, SUM: tl.constexpr, SOFTMAX: tl.constexpr,
):  # fmt: skip
    """Write rows (b, i, h) of the branch's output, their natural lse and, if SUM, the gated sum of the branches."""
    row = (b * T + i) * H + h
    at = row[:, None] * DV + dv[None, :]
    inside = ok[:, None] & (dv[None, :] < DV)
    tl.store(Sel + at, sel.to(Sel.dtype.element_ty), mask=inside)
    tl.store(Lse + row, lse, mask=ok)
    if SUM:
        g_cmp, g_sel, g_win = _gates(Logits, row, ok, sl_t, sl_h, H, SOFTMAX)
        cmp = tl.load(Cmp + (b * sc_b + i * sc_t + h * sc_h)[:, None] + dv[None, :], mask=inside, other=0.0)
        win = tl.load(Win + (b * sw_b + i * sw_t + h * sw_h)[:, None] + dv[None, :], mask=inside, other=0.0)
        total = g_cmp[:, None] * cmp.to(tl.float32) + g_sel[:, None] * sel + g_win[:, None] * win.to(tl.float32)
        tl.store(Sum + at, total.to(Sum.dtype.element_ty), mask=inside)


@triton.jit
def block_forward(
    Q, K, V, Lists, Partial, PartialLse, Reads, sq_b, sq_t, sq_h, sk_b, sk_t, sk_g, sv_b, sv_t, sv_g,
    scale2, S, start, Tc, G, table, room,
    N: tl.constexpr, R: tl.constexpr, L: tl.constexpr, BS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    DKP: tl.constexpr, DVP: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Partials of the far blocks: they end before their query's own begins, so every row sees every key."""
    cell = Lists + table + (tl.program_id(1).to(tl.int64) * room + tl.program_id(0)) * 4
    key = tl.load(cell)
    if key < 0:
        return
    begin = tl.load(cell + 1)
    rows = (tl.load(cell + 2) - begin) * R
    M = tl.cdiv(S, L)
    bg = (key // M).to(tl.int64)
    inside = tl.arange(0, BS)
    token = ((key % M) * L + inside).to(tl.int64)
    dk, dv = tl.arange(0, DKP), tl.arange(0, DVP)
    k = tl.load(
        K + (bg // G) * sk_b + (bg % G) * sk_g + token[None, :] * sk_t + dk[:, None],
        mask=(inside < L)[None, :] & (dk[:, None] < DK), other=0.0,
    )  # fmt: skip
    v = tl.load(
        V + (bg // G) * sv_b + (bg % G) * sv_g + token[:, None] * sv_t + dv[None, :],
        mask=(inside < L)[:, None] & (dv[None, :] < DV), other=0.0,
    )  # fmt: skip
    queries = Q + (bg // G) * sq_b + (bg % G) * R * sq_h
    partial = bg * Tc - start
    reads = tl.zeros([ROWS], tl.int32)
    lane = tl.arange(0, ROWS)
    ahead = tl.load(Lists + begin + lane // R, mask=lane < rows, other=0)
    for x0 in range(0, rows, ROWS):
        x = x0 + lane
        ok = x < rows
        pair = ahead
        ahead = tl.load(Lists + begin + (x + ROWS) // R, mask=x + ROWS < rows, other=0)
        i = (pair // N).to(tl.int64)
        head = (x % R).to(tl.int64)
        q = tl.load(
            queries + i[:, None] * sq_t + head[:, None] * sq_h + dk[None, :],
            mask=ok[:, None] & (dk[None, :] < DK), other=0.0,
        )  # fmt: skip
        s = tl.dot(q, k, input_precision=IP)
        if L != BS:
            s = tl.where((inside < L)[None, :], s, float("-inf"))
        m = tl.max(s, 1) * scale2
        p = exp2(s * scale2 - m[:, None], IP)
        z = tl.sum(p, 1)
        o = tl.dot(p.to(v.dtype), v, input_precision=IP) * (1.0 / z)[:, None]
        place = ((partial + i) * (N + 1) + pair % N) * R + head
        tl.store(
            Partial + place[:, None] * DV + dv[None, :], o.to(Partial.dtype.element_ty),
            mask=ok[:, None] & (dv[None, :] < DV), cache_modifier=".cs",
        )  # fmt: skip
        tl.store(PartialLse + place, m + tl.log2(z), mask=ok)
        if COUNT:
            reads += tl.where(ok & (head == 0), L, 0)
    if COUNT:
        tl.atomic_add(Reads + bg, tl.sum(reads, 0).to(tl.int64))


@triton.jit
def near_forward(
    Q, K, V, Blocks, Partial, PartialLse, Reads, sq_b, sq_t, sq_h, sk_b, sk_t, sk_g, sv_b, sv_t, sv_g,
    scale2, S, T, start, Tc, G,
    N: tl.constexpr, R: tl.constexpr, L: tl.constexpr, BS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    DKP: tl.constexpr, DVP: tl.constexpr, NP: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr,
    IP: tl.constexpr,
):  # fmt: skip
    """One partial, in slot N, of block 0, the own block and the one before, as far as the query's list holds them.

    Nearly every list holds the three, and neighbours share them: walked here, they cost one partial and no gather. A
    tile's rows are neighbours, so their own blocks are one or a few in a row.
    """
    x0 = tl.program_id(0) * ROWS
    x = x0 + tl.arange(0, ROWS)
    bg = tl.program_id(1).to(tl.int64)
    b, g = bg // G, bg % G
    i = (x // R).to(tl.int64)
    head = (x % R).to(tl.int64)
    ok = i < Tc
    first = S - T + start
    t = first + x // R
    own = tl.where(ok, t // L, -1)
    inside = tl.arange(0, BS)
    slot = tl.arange(0, NP)
    dk, dv = tl.arange(0, DKP), tl.arange(0, DVP)
    listed = tl.load(
        Blocks + ((b * T + start + i) * G + g)[:, None] * N + slot[None, :],
        mask=ok[:, None] & (slot < N)[None, :], other=-1,
    )  # fmt: skip
    q = tl.load(
        Q + b * sq_b + (start + i)[:, None] * sq_t + (g * R + head)[:, None] * sq_h + dk[None, :],
        mask=ok[:, None] & (dk[None, :] < DK), other=0.0,
    )  # fmt: skip
    keys = K + b * sk_b + g * sk_g + dk[:, None]
    values = V + b * sv_b + g * sv_g + dv[None, :]
    lowest = tl.maximum((first + x0 // R) // L - 1, 1)
    highest = (first + tl.minimum((x0 + ROWS - 1) // R, Tc - 1)) // L
    last = first + Tc - 1
    m = tl.full([ROWS], float("-inf"), tl.float32)
    z = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, DVP], tl.float32)
    reads = tl.zeros([ROWS], tl.int32)
    for step in range(lowest - 1, highest + 1):
        block = tl.where(step < lowest, 0, step)
        held = tl.max((listed == block).to(tl.int32), 1) > 0
        held = held & ((block == 0) | (block >= own - 1))
        token = block * L + inside
        see = held[:, None] & (token[None, :] <= t[:, None]) & (inside < L)[None, :]
        there = (token <= last) & (inside < L)
        line = token.to(tl.int64)
        k = tl.load(keys + line[None, :] * sk_t, mask=there[None, :] & (dk[:, None] < DK), other=0.0)
        v = tl.load(values + line[:, None] * sv_t, mask=there[:, None] & (dv[None, :] < DV), other=0.0)
        s = tl.where(see, tl.dot(q, k, input_precision=IP) * scale2, float("-inf"))
        above = tl.maximum(m, tl.max(s, 1))
        safe = tl.where(above == float("-inf"), 0.0, above)
        p = exp2(s - safe[:, None], IP)
        fade = exp2(m - safe, IP)
        z = z * fade + tl.sum(p, 1)
        out = out * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision=IP)
        m = above
        if COUNT:
            reads += tl.where(ok & (head == 0), tl.sum(see.to(tl.int32), 1), 0)
    some = z > 0.0
    out = out * (1.0 / tl.where(some, z, 1.0))[:, None]
    place = ((bg * Tc + i) * (N + 1) + N) * R + head
    tl.store(
        Partial + place[:, None] * DV + dv[None, :], out.to(Partial.dtype.element_ty),
        mask=ok[:, None] & (dv[None, :] < DV), cache_modifier=".cs",
    )  # fmt: skip
    tl.store(PartialLse + place, tl.where(some, m + tl.log2(tl.where(some, z, 1.0)), float("-inf")), mask=ok)
    if COUNT:
        tl.atomic_add(Reads + bg, tl.sum(reads, 0).to(tl.int64))


@triton.jit
def merge(
    Partial, PartialLse, Blocks, Sel, Lse, Sum, Cmp, Win, Logits,
    sc_b, sc_t, sc_h, sw_b, sw_t, sw_h, sl_t, sl_h, S, T, start, Tc, G,
    N: tl.constexpr, R: tl.constexpr, L: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, ROWS: tl.constexpr,
    IP: tl.constexpr, SUM: tl.constexpr, SOFTMAX: tl.constexpr,
):  # fmt: skip
    """Weigh a row's partials: those of the far blocks in slot order, then slot N, that of the near ones."""
    x = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    bg = tl.program_id(1).to(tl.int64)
    b, g = bg // G, bg % G
    i = (x // R).to(tl.int64)
    head = (x % R).to(tl.int64)
    ok = i < Tc
    t = S - T + start + i
    dv = tl.arange(0, DVP)
    place = (bg * Tc + i) * (N + 1) * R + head
    listed = Blocks + ((b * T + start + i) * G + g) * N
    m = tl.load(PartialLse + place + N * R, mask=ok, other=float("-inf"))
    for n in tl.static_range(N):
        there = far(tl.load(listed + n, mask=ok, other=-1), t, L)
        m = tl.maximum(m, tl.load(PartialLse + place + n * R, mask=there, other=float("-inf")))
    safe = tl.where(m == float("-inf"), 0.0, m)
    z = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, DVP], tl.float32)
    for n in tl.static_range(N + 1):
        there = ok
        if n < N:
            there = far(tl.load(listed + n, mask=ok, other=-1), t, L)
        weight = exp2(tl.load(PartialLse + place + n * R, mask=there, other=float("-inf")) - safe, IP)
        part = tl.load(
            Partial + (place + n * R)[:, None] * DV + dv[None, :], mask=there[:, None] & (dv[None, :] < DV), other=0.0
        )
        z += weight
        out += part.to(tl.float32) * weight[:, None]
    out = out / tl.where(z == 0.0, 1.0, z)[:, None]
    lse = tl.where(z == 0.0, float("-inf"), safe * 0.6931471805599453 + tl.log(tl.where(z == 0.0, 1.0, z)))
    _finish(
        Sel, Lse, Sum, Cmp, Win, Logits, out, lse, b, start + i, g * R + head, dv, ok, T, G * R,
        sc_b, sc_t, sc_h, sw_b, sw_t, sw_h, sl_t, sl_h, DV, SUM, SOFTMAX,
    )  # fmt: skip


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _lowest(bit):
    """The index of a power of two, int64 taken as unsigned: the exponent of its float."""
    return (bit.to(tl.uint64, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def union_forward(
    Q, K, V, Blocks, Sel, Lse, Reads, Sum, Cmp, Win, Logits, sq_b, sq_t, sq_h, sk_b, sk_t, sk_g, sv_b, sv_t, sv_g,
    sc_b, sc_t, sc_h, sw_b, sw_t, sw_h, sl_t, sl_h, scale2, S, T, G,
    N: tl.constexpr, R: tl.constexpr, L: tl.constexpr, BS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    DKP: tl.constexpr, DVP: tl.constexpr, NP: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr,
    IP: tl.constexpr, SUM: tl.constexpr, SOFTMAX: tl.constexpr, ALWAYS: tl.constexpr,
):  # fmt: skip
    """A program: ROWS rows of one group, neighbours, against every block that one of them chose, ascending.

    A row's blocks are bits, 64 to a word; the union's are walked one by one without a branch, so that loads overlap.
    """
    x0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS  # the late rows, which see most, begin first
    x = x0 + tl.arange(0, ROWS)
    bg = tl.program_id(0).to(tl.int64)
    b, g = bg // G, bg % G
    i = (x // R).to(tl.int64)
    head = g * R + x % R
    ok = i < T
    t = S - T + x // R
    t0 = S - T + x0 // R
    inside = tl.arange(0, BS)
    slot = tl.arange(0, NP)
    dk, dv = tl.arange(0, DKP), tl.arange(0, DVP)
    lists = Blocks + ((b * T + i) * G + g)[:, None] * N + slot[None, :]
    q = tl.load(
        Q + b * sq_b + i[:, None] * sq_t + head[:, None] * sq_h + dk[None, :],
        mask=ok[:, None] & (dk[None, :] < DK), other=0.0,
    )  # fmt: skip
    keys = K + b * sk_b + g * sk_g + inside.to(tl.int64)[:, None] * sk_t + dk[None, :]
    values = V + b * sv_b + g * sv_g + inside.to(tl.int64)[:, None] * sv_t + dv[None, :]
    highest = (S - T + tl.minimum((x0 + ROWS - 1) // R, T - 1)) // L
    m = tl.full([ROWS], -3.0e38, tl.float32)  # finite, so that a row that has seen nothing yet makes no NaN
    z = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, DVP], tl.float32)
    reads = tl.zeros([ROWS], tl.int32)
    for w0 in range(0, highest + 1, 64):
        listed = tl.load(lists, mask=ok[:, None] & (slot < N)[None, :], other=-1)
        here = visible(listed, t[:, None], L) & (listed >= w0) & (listed < w0 + 64)
        bits = tl.full([ROWS, NP], 1, tl.int64) << tl.where(here, listed - w0, 0).to(tl.int64)
        mine = tl.reduce(tl.where(here, bits, 0), 1, _or)
        union = tl.reduce(mine, 0, _or)
        for _ in range(0, popcount(union.to(tl.int32)) + popcount((union >> 32).to(tl.int32))):
            rest = union & (union - 1)
            block = _lowest(union ^ rest)
            union = rest
            s0 = (w0 + block) * L
            token = s0 + inside
            there = (token < S) & (inside < L)
            k = tl.load(keys + s0.to(tl.int64) * sk_t, mask=there[:, None] & (dk[None, :] < DK), other=0.0)
            v = tl.load(values + s0.to(tl.int64) * sv_t, mask=there[:, None] & (dv[None, :] < DV), other=0.0)
            s = tl.dot(q, tl.trans(k), input_precision=IP)
            # Only the tile's last blocks hold keys of some row's future: a branch round the mask alone, where the
            # pipeliner bears one (see window_device.py). A row that did not choose the block is masked by its shift.
            if ALWAYS:  # noqa: SIM114 (known when compiling, the other when running)
                s = tl.where((inside < L)[None, :] & (token[None, :] <= t[:, None]), s, float("-inf"))
            elif s0 + L - 1 > t0:
                s = tl.where((inside < L)[None, :] & (token[None, :] <= t[:, None]), s, float("-inf"))
            held = ((mine >> block) & 1) != 0
            above = tl.where(held, tl.maximum(m, tl.max(s, 1) * scale2), m)
            p = exp2(s * scale2 - tl.where(held, above, float("inf"))[:, None], IP)
            fade = exp2(m - above, IP)
            z = z * fade + tl.sum(p, 1)
            out = out * fade[:, None]
            out += tl.dot(p.to(v.dtype), v, input_precision=IP)
            m = above
            if COUNT:
                reads += tl.where(held & (x % R == 0), tl.minimum(t - s0 + 1, L), 0)
    some = z > 0.0
    out = out / tl.where(some, z, 1.0)[:, None]
    lse = tl.where(some, m * 0.6931471805599453 + tl.log(tl.where(some, z, 1.0)), float("-inf"))
    _finish(
        Sel, Lse, Sum, Cmp, Win, Logits, out, lse, b, i, head, dv, ok, T, G * R,
        sc_b, sc_t, sc_h, sw_b, sw_t, sw_h, sl_t, sl_h, DV, SUM, SOFTMAX,
    )  # fmt: skip
    if COUNT:
        tl.atomic_add(Reads + bg, tl.sum(reads, 0).to(tl.int64))


@triton.jit
def query_forward(
    Q, K, V, Blocks, Sel, Lse, Reads, Sum, Cmp, Win, Logits, sq_b, sq_t, sq_h, sk_b, sk_t, sk_g, sv_b, sv_t, sv_g,
    sc_b, sc_t, sc_h, sw_b, sw_t, sw_h, sl_t, sl_h, scale2, S, T, G,
    N: tl.constexpr, R: tl.constexpr, L: tl.constexpr, BS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    DKP: tl.constexpr, DVP: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr, IP: tl.constexpr,
    SUM: tl.constexpr, SOFTMAX: tl.constexpr,
):  # fmt: skip
    """A program: one query's heads of one group (ROWS of them at a time), its blocks in slot order."""
    i = tl.program_id(0).to(tl.int64)
    bg = tl.program_id(1).to(tl.int64)
    b, g = bg // G, bg % G
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    head = g * R + row
    ok = row < R
    t = S - T + i
    inside = tl.arange(0, BS)
    dk, dv = tl.arange(0, DKP), tl.arange(0, DVP)
    q = tl.load(
        Q + b * sq_b + i * sq_t + head[:, None] * sq_h + dk[None, :],
        mask=ok[:, None] & (dk[None, :] < DK), other=0.0,
    )  # fmt: skip
    keys = K + b * sk_b + g * sk_g + dk[:, None]
    values = V + b * sv_b + g * sv_g + dv[None, :]
    listed = Blocks + ((b * T + i) * G + g) * N
    m = tl.full([ROWS], float("-inf"), tl.float32)
    z = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, DVP], tl.float32)
    reads = tl.zeros([BS], tl.int32)
    for n in range(N):
        block = tl.load(listed + n)
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
    _finish(
        Sel, Lse, Sum, Cmp, Win, Logits, out, lse, b, i, head, dv, ok, T, G * R,
        sc_b, sc_t, sc_h, sw_b, sw_t, sw_h, sl_t, sl_h, DV, SUM, SOFTMAX,
    )  # fmt: skip
    if COUNT:
        tl.atomic_add(Reads + bg, tl.sum(reads, 0).to(tl.int64), mask=tl.program_id(2) == 0)


@triton.jit
def row_products(
    Out, Dout, Delta, sd_b, sd_t, sd_h, T, H, DV: tl.constexpr, DVP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """rowsum(out * dout) of [B,T,H,D], to fp32 [B,T,H]."""
    x = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(1).to(tl.int64)
    i = (x // H).to(tl.int64)
    head = (x % H).to(tl.int64)
    ok = i < T
    dv = tl.arange(0, DVP)
    row = (b * T + i) * H + head
    mask = ok[:, None] & (dv[None, :] < DV)
    out = tl.load(Out + row[:, None] * DV + dv[None, :], mask=mask, other=0.0)
    dout = tl.load(Dout + (b * sd_b + i * sd_t + head * sd_h)[:, None] + dv[None, :], mask=mask, other=0.0)
    tl.store(Delta + row, tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1), mask=ok)


@triton.jit
def query_mass(
    Q, K, Blocks, Lse, Mass, sq_b, sq_t, sq_h, sk_b, sk_t, sk_g, scale, S, T, G,
    N: tl.constexpr, R: tl.constexpr, L: tl.constexpr, BS: tl.constexpr, DK: tl.constexpr,
    DKP: tl.constexpr, ROWS: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """The sum of a row's probabilities as the backward computes them: 1, but for the rounding of lse."""
    i = tl.program_id(0).to(tl.int64)
    bg = tl.program_id(1).to(tl.int64)
    b, g = bg // G, bg % G
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    head = g * R + row
    ok = row < R
    t = S - T + i
    inside = tl.arange(0, BS)
    dk = tl.arange(0, DKP)
    q = tl.load(
        Q + b * sq_b + i * sq_t + head[:, None] * sq_h + dk[None, :],
        mask=ok[:, None] & (dk[None, :] < DK), other=0.0,
    )  # fmt: skip
    keys = K + b * sk_b + g * sk_g + dk[:, None]
    place = (b * T + i) * G * R + head
    lse = tl.load(Lse + place, mask=ok, other=0.0)
    total = tl.zeros([ROWS], tl.float32)
    for n in range(N):
        block = tl.load(Blocks + ((b * T + i) * G + g) * N + n)
        there = visible(block, t, L)
        token = tl.where(there, block, 0).to(tl.int64) * L + inside
        see = there & (inside < L) & (token <= t)
        k = tl.load(keys + token[None, :] * sk_t, mask=see[None, :] & (dk[:, None] < DK), other=0.0)
        s = tl.dot(q, k, input_precision=IP)
        total += tl.sum(tl.where(see[None, :], exp2((s * scale - lse[:, None]) * 1.4426950408889634, IP), 0.0), 1)
    tl.store(Mass + place, total, mask=ok)


@triton.jit(do_not_specialize=["edge"])
def block_backward(
    Q, K, V, Dout, Lse, Delta, Mass, Lists, Partial, Total, Dk, Dv, Spill,
    sq_b, sq_t, sq_h, sk_b, sk_t, sk_g, sv_b, sv_t, sv_g, sd_b, sd_t, sd_h,
    scale, S, T, start, Tc, G, table, room, held, edge,
    N: tl.constexpr, R: tl.constexpr, L: tl.constexpr, BS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    DKP: tl.constexpr, DVP: tl.constexpr, ROWS: tl.constexpr, IP: tl.constexpr, MASS: tl.constexpr,
):  # fmt: skip
    """A piece of a list: its pairs' dQ, and what they add to dK and dV of the block.

    Sums over chunks lie in Total, [B,held,G,DK+DV] fp32, k and v having `held` rows; the last chunk writes Dk
    and Dv. edge: 1 for the first chunk, 2 for the last, 3 for the only one.
    """
    cell = Lists + table + (tl.program_id(1).to(tl.int64) * room + tl.program_id(0)) * 4
    key = tl.load(cell)
    if key < 0:
        return
    begin = tl.load(cell + 1)
    rows = (tl.load(cell + 2) - begin) * R
    spill = tl.load(cell + 3).to(tl.int64)
    M = tl.cdiv(S, L)
    bg = (key // M).to(tl.int64)
    b, g = bg // G, bg % G
    first = S - T
    inside = tl.arange(0, BS)
    token = (key % M) * L + inside
    dk, dv = tl.arange(0, DKP), tl.arange(0, DVP)
    known = (inside < L) & (token < S)
    line = token.to(tl.int64)[:, None]
    in_k = known[:, None] & (dk[None, :] < DK)
    in_v = known[:, None] & (dv[None, :] < DV)
    k = tl.load(K + b * sk_b + g * sk_g + line * sk_t + dk[None, :], mask=in_k, other=0.0)
    v = tl.load(V + b * sv_b + g * sv_g + line * sv_t + dv[None, :], mask=in_v, other=0.0)
    grad_k = tl.zeros([BS, DKP], tl.float32)
    grad_v = tl.zeros([BS, DVP], tl.float32)
    scale2 = scale * 1.4426950408889634
    lane = tl.arange(0, ROWS)
    ahead = tl.load(Lists + begin + lane // R, mask=lane < rows, other=0)
    for x0 in range(0, rows, ROWS):
        x = x0 + lane
        ok = x < rows
        pair = ahead
        ahead = tl.load(Lists + begin + (x + ROWS) // R, mask=x + ROWS < rows, other=0)
        i = pair // N
        head = x % R
        at = i.to(tl.int64)
        h = g * R + head
        q = tl.load(
            Q + b * sq_b + at[:, None] * sq_t + h[:, None] * sq_h + dk[None, :],
            mask=ok[:, None] & (dk[None, :] < DK), other=0.0,
        )  # fmt: skip
        do = tl.load(
            Dout + b * sd_b + at[:, None] * sd_t + h[:, None] * sd_h + dv[None, :],
            mask=ok[:, None] & (dv[None, :] < DV), other=0.0,
        )  # fmt: skip
        row = (b * T + at) * (G * R) + h
        lse = tl.load(Lse + row, mask=ok, other=0.0)
        delta = tl.load(Delta + row, mask=ok, other=0.0) * scale
        # Rows past the list's end have q, dout, lse and delta 0: they add nothing.
        see = token[None, :] <= (first + i)[:, None]
        if L != BS:
            see = see & (inside < L)[None, :]
        s = tl.dot(q, tl.trans(k), input_precision=IP)
        if IP == "ieee":
            # lse is subtracted before the change of base: its product would be rounded, and a row's error with it.
            p = exp2((s * scale - lse[:, None]) * 1.4426950408889634, IP)
            if MASS:
                p = p * (1.0 / tl.load(Mass + row, mask=ok, other=1.0))[:, None]
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
        shared = ((spill * BS + inside) * (DK + DV))[:, None]
        tl.store(Spill + shared + dk[None, :], grad_k, mask=in_k)
        tl.store(Spill + shared + DK + dv[None, :], grad_v, mask=in_v)
    else:
        # The list's only piece of this chunk: no other program of this launch touches the block's gradient. Keys past
        # S have gradient 0, in a block's last tile too.
        ok = ((inside < L) & (token < held))[:, None]
        row = (b * held + line) * G + g
        _add_and_store(Total, Dk, row, grad_k, ok & (dk[None, :] < DK), dk, 0, DK + DV, edge, DK)
        _add_and_store(Total, Dv, row, grad_v, ok & (dv[None, :] < DV), dv, DK, DK + DV, edge, DV)


@triton.jit
def _add_and_store(
    Total, Out, row, grad, mask, d, column: tl.constexpr, width: tl.constexpr, edge, D: tl.constexpr
):  # fmt: skip
    """Add to what earlier chunks left in Total; the last chunk's result is rounded once, into Out."""
    at = Total + row * width + column + d[None, :]
    if edge % 2 == 0:
        grad += tl.load(at, mask=mask, other=0.0)
    if edge < 2:
        tl.store(at, grad, mask=mask)
    else:
        tl.store(Out + row * D + d[None, :], grad.to(Out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["edge"])
def gather_spill(
    Lists, Spill, Total, Dk, Dv, S, G, groups, known, held, edge,
    L: tl.constexpr, BS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, DKP: tl.constexpr, DVP: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """Add a list's pieces, in order, to the gradient of its block; lists of one piece have added their own.

    So that nothing need be zeroed or cast: the first chunk writes a block without pairs, the last one rounds it.
    """
    M, blocks = tl.cdiv(S, L), tl.cdiv(held, L)
    bg = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    mine = Lists + known + bg * M + block
    tiles = tl.load(mine, mask=block < M, other=0)
    if (tiles == 1) | ((tiles == 0) & (edge == 0)):
        return
    place = tl.load(mine + groups * M, mask=block < M, other=0).to(tl.int64)
    inside = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    token = block * L + inside
    dk, dv = tl.arange(0, DKP), tl.arange(0, DVP)
    ok = (inside < L) & (token < held)
    in_k = ok[:, None] & (dk[None, :] < DK)
    in_v = ok[:, None] & (dv[None, :] < DV)
    # Of keys past S no piece wrote anything.
    was_k, was_v = in_k & (token < S)[:, None], in_v & (token < S)[:, None]
    grad_k = tl.zeros([KEYS, DKP], tl.float32)
    grad_v = tl.zeros([KEYS, DVP], tl.float32)
    for j in range(0, tiles):
        piece = Spill + (((place + j) * BS + inside) * (DK + DV))[:, None]
        grad_k += tl.load(piece + dk[None, :], mask=was_k, other=0.0)
        grad_v += tl.load(piece + DK + dv[None, :], mask=was_v, other=0.0)
    row = ((bg // G) * held + token.to(tl.int64)[:, None]) * G + bg % G
    _add_and_store(Total, Dk, row, grad_k, in_k, dk, 0, DK + DV, edge, DK)
    _add_and_store(Total, Dv, row, grad_v, in_v, dv, DK, DK + DV, edge, DV)


@triton.jit
def sum_slots(
    Partial, Blocks, A, B, C, Dq, S, T, start, Tc, G,
    N: tl.constexpr, R: tl.constexpr, L: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
    PLUS: tl.constexpr,
):  # fmt: skip
    """dQ: a row's slots in their order, then the first PLUS of the gradients A, B, C [B,T,H,D], in fp32."""
    x = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    bg = tl.program_id(1).to(tl.int64)
    b, g = bg // G, bg % G
    i = (x // R).to(tl.int64)
    head = (x % R).to(tl.int64)
    ok = i < Tc
    t = S - T + start + i
    d = tl.arange(0, DP)
    place = (bg * Tc + i) * N * R + head
    listed = Blocks + ((b * T + start + i) * G + g) * N
    at = (((b * T + start + i) * G + g) * R + head)[:, None] * D + d[None, :]
    mask = ok[:, None] & (d[None, :] < D)
    total = tl.zeros([ROWS, DP], tl.float32)
    for n in tl.static_range(N):
        there = visible(tl.load(listed + n, mask=ok, other=-1), t, L)
        total += tl.load(
            Partial + (place + n * R)[:, None] * D + d[None, :], mask=there[:, None] & (d[None, :] < D), other=0.0
        ).to(tl.float32)
    if PLUS >= 1:
        total += tl.load(A + at, mask=mask, other=0.0).to(tl.float32)
    if PLUS >= 2:
        total += tl.load(B + at, mask=mask, other=0.0).to(tl.float32)
    if PLUS >= 3:
        total += tl.load(C + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(Dq + at, total.to(Dq.dtype.element_ty), mask=mask)
