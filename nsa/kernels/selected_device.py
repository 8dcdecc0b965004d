"""The kernels of selected.py. Strides are named by tensor and axis: sq_t is q's over tokens.

Sizes: N slots, R heads a group, L tokens a block in a tile of BS; DK, DV head dims in tiles of DKP, DVP; ROWS of a
tile, a row being one head of one query; IP the precision of every dot. Scores and lse are in units of log 2 inside.
"""

import triton
import triton.language as tl

from nsa.kernels.primitives import exp2, far, visible


@triton.jit
def block_forward(
    Q, K, V, Pairs, Table, Partial, PartialLse, Reads,
    sq_b, sq_t, sq_h, sq_d, sk_b, sk_t, sk_g, sk_d, sv_b, sv_t, sv_g, sv_d,
    scale2, start, Tc, G, M,
    N: tl.constexpr, R: tl.constexpr, L: tl.constexpr, BS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    DKP: tl.constexpr, DVP: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Partials of the far blocks: they end before their query's own begins, so every row sees every key."""
    cell = Table + tl.program_id(0).to(tl.int64) * 4
    key = tl.load(cell)
    if key < 0:
        return
    begin = tl.load(cell + 1)
    rows = (tl.load(cell + 2) - begin) * R
    bg = (key // M).to(tl.int64)
    inside = tl.arange(0, BS)
    token = ((key % M) * L + inside).to(tl.int64)
    dk, dv = tl.arange(0, DKP), tl.arange(0, DVP)
    k = tl.load(
        K + (bg // G) * sk_b + (bg % G) * sk_g + token[None, :] * sk_t + dk[:, None] * sk_d,
        mask=(inside < L)[None, :] & (dk[:, None] < DK), other=0.0,
    )  # fmt: skip
    v = tl.load(
        V + (bg // G) * sv_b + (bg % G) * sv_g + token[:, None] * sv_t + dv[None, :] * sv_d,
        mask=(inside < L)[:, None] & (dv[None, :] < DV), other=0.0,
    )  # fmt: skip
    queries = Q + (bg // G) * sq_b + (bg % G) * R * sq_h
    partial = bg * Tc - start
    reads = tl.zeros([ROWS], tl.int32)
    lane = tl.arange(0, ROWS)
    ahead = tl.load(Pairs + begin + lane // R, mask=lane < rows, other=0)
    for x0 in range(0, rows, ROWS):
        x = x0 + lane
        ok = x < rows
        pair = ahead
        ahead = tl.load(Pairs + begin + (x + ROWS) // R, mask=x + ROWS < rows, other=0)
        i = (pair // N).to(tl.int64)
        head = x % R
        q = tl.load(
            queries + i[:, None] * sq_t + head[:, None] * sq_h + dk[None, :] * sq_d,
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
    Q, K, V, Blocks, Partial, PartialLse, Reads,
    sq_b, sq_t, sq_h, sq_d, sk_b, sk_t, sk_g, sk_d, sv_b, sv_t, sv_g, sv_d, sb_b, sb_t, sb_g, sb_n,
    scale2, first, Tc, G,
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
    i = (x // R).to(tl.int64)
    head = x % R
    ok = i < Tc
    t = first + i
    own = tl.where(ok, t // L, -1)
    inside = tl.arange(0, BS)
    slot = tl.arange(0, NP)
    dk, dv = tl.arange(0, DKP), tl.arange(0, DVP)
    listed = tl.load(
        Blocks + (bg // G) * sb_b + (bg % G) * sb_g + i[:, None] * sb_t + slot[None, :] * sb_n,
        mask=ok[:, None] & (slot < N)[None, :], other=-1,
    )  # fmt: skip
    q = tl.load(
        Q + (bg // G) * sq_b + i[:, None] * sq_t + ((bg % G) * R + head)[:, None] * sq_h + dk[None, :] * sq_d,
        mask=ok[:, None] & (dk[None, :] < DK), other=0.0,
    )  # fmt: skip
    keys = K + (bg // G) * sk_b + (bg % G) * sk_g + dk[:, None] * sk_d
    values = V + (bg // G) * sv_b + (bg % G) * sv_g + dv[None, :] * sv_d
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
    Partial, PartialLse, Blocks, Out, Lse, sb_b, sb_t, sb_g, sb_n, so_b, so_t, so_h, sl_b, sl_t, sl_h,
    first, Tc, G,
    N: tl.constexpr, R: tl.constexpr, L: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, ROWS: tl.constexpr,
    IP: tl.constexpr,
):  # fmt: skip
    """Weigh a row's partials: those of the far blocks in slot order, then slot N, that of the near ones."""
    x = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    bg = tl.program_id(1).to(tl.int64)
    i = (x // R).to(tl.int64)
    head = x % R
    ok = i < Tc
    dv = tl.arange(0, DVP)
    place = (bg * Tc + i) * (N + 1) * R + head
    listed = Blocks + (bg // G) * sb_b + (bg % G) * sb_g + i * sb_t
    m = tl.load(PartialLse + place + N * R, mask=ok, other=float("-inf"))
    for n in tl.static_range(N):
        there = far(tl.load(listed + n * sb_n, mask=ok, other=-1), first + i, L)
        m = tl.maximum(m, tl.load(PartialLse + place + n * R, mask=there, other=float("-inf")))
    safe = tl.where(m == float("-inf"), 0.0, m)
    z = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, DVP], tl.float32)
    for n in tl.static_range(N + 1):
        there = ok
        if n < N:
            there = far(tl.load(listed + n * sb_n, mask=ok, other=-1), first + i, L)
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
def query_forward(
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
def row_products(
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
def query_mass(
    Q, K, Blocks, Lse, Mass,
    sq_b, sq_t, sq_h, sq_d, sk_b, sk_t, sk_g, sk_d, sb_b, sb_t, sb_g, sb_n, sl_b, sl_t, sl_h, sm_b, sm_t, sm_h,
    scale, first, G,
    N: tl.constexpr, R: tl.constexpr, L: tl.constexpr, BS: tl.constexpr, DK: tl.constexpr,
    DKP: tl.constexpr, ROWS: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """The sum of a row's probabilities as the backward computes them: 1, but for the rounding of lse."""
    i = tl.program_id(0).to(tl.int64)
    bg = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    head = (bg % G) * R + row
    ok = row < R
    t = first + i
    inside = tl.arange(0, BS)
    dk = tl.arange(0, DKP)
    q = tl.load(
        Q + (bg // G) * sq_b + i * sq_t + head[:, None] * sq_h + dk[None, :] * sq_d,
        mask=ok[:, None] & (dk[None, :] < DK), other=0.0,
    )  # fmt: skip
    keys = K + (bg // G) * sk_b + (bg % G) * sk_g + dk[:, None] * sk_d
    lse = tl.load(Lse + (bg // G) * sl_b + i * sl_t + head * sl_h, mask=ok, other=0.0)
    total = tl.zeros([ROWS], tl.float32)
    for n in range(N):
        block = tl.load(Blocks + (bg // G) * sb_b + i * sb_t + (bg % G) * sb_g + n * sb_n)
        there = visible(block, t, L)
        token = tl.where(there, block, 0).to(tl.int64) * L + inside
        see = there & (inside < L) & (token <= t)
        k = tl.load(keys + token[None, :] * sk_t, mask=see[None, :] & (dk[:, None] < DK), other=0.0)
        s = tl.dot(q, k, input_precision=IP)
        total += tl.sum(tl.where(see[None, :], exp2((s * scale - lse[:, None]) * 1.4426950408889634, IP), 0.0), 1)
    tl.store(Mass + (bg // G) * sm_b + i * sm_t + head * sm_h, total, mask=ok)


@triton.jit
def block_backward(
    Q, K, V, Dout, Lse, Delta, Mass, Pairs, Table, Partial, Dk, Dv, SpillK, SpillV,
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
            mass = tl.load(Mass + b * sy_b + at * sy_t + h * sy_h, mask=ok, other=1.0)
            p = exp2((s * scale - lse[:, None]) * 1.4426950408889634, IP) * (1.0 / mass)[:, None]
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
def gather_spill(
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
def sum_slots(
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
