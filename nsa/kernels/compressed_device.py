"""The kernels of compressed.py. Strides are named by tensor and axis: sq_t is q's over tokens, sk_c k's over blocks.

Sizes: R heads a group; L, STEP length and stride of a block; DK, DV head dims in tiles of DKP, DVP; ROWS of a tile, a
row being one head of one query, packed without a gap; KEYS of a tile; IP the precision of every dot. The T queries end
at position S, or, RAGGED, at Lengths[b]; of the compressed keys the first C may be read. out, lse, dq, dk and dv are
contiguous. Scores are in units of log 2 inside.

Only tiles at the edge are masked. That is a branch round the mask alone: one round a load would cost its pipelining,
and a loop for each kind of tile, its filling and draining. ALWAYS masks every tile, without a branch. A row that sees
nothing is not loaded but taken for 0, so that whatever lies there reaches no gradient.
"""

import triton
import triton.language as tl

from nsa.kernels.primitives import exp2, in_units, load_rows, weights


@triton.jit
def _seen(t, C, L: tl.constexpr, STEP: tl.constexpr):
    """Blocks that end at or before position t, of the C that may be read."""
    return tl.minimum(tl.maximum(t - (L - 1) + STEP, 0) // STEP, C)


@triton.jit
def _end(Lengths, b, S, RAGGED: tl.constexpr):
    """Positions of batch row b."""
    if RAGGED:
        end = tl.load(Lengths + b).to(tl.int32)
    else:
        end = S
    return end


@triton.jit
def _first_seeing(block, first, L: tl.constexpr, STEP: tl.constexpr):
    """The first query that sees a block, where query 0 is at position `first`."""
    return tl.maximum(block * STEP + L - 1 - first, 0)


@triton.jit(do_not_specialize=["S", "T", "C"])
def forward(
    Q, K, V, Lengths, Out, Lse, Reads,
    sq_b, sq_t, sq_h, sk_b, sk_c, sk_g, sv_b, sv_c, sv_g, scale, S, T, C, G,
    R: tl.constexpr, L: tl.constexpr, STEP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    DKP: tl.constexpr, DVP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, IP: tl.constexpr,
    ALWAYS: tl.constexpr, RAGGED: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """A program: ROWS rows of one group against the blocks that they see, from the last one backwards."""
    tiles = tl.cdiv(T * R, ROWS)
    pairs = tl.num_programs(0) // tiles
    bg = tl.program_id(0) % pairs
    b, g = (bg // G).to(tl.int64), (bg % G).to(tl.int64)
    first = _end(Lengths, b, S, RAGGED) - T
    # The last rows, whose walk is the longest, go first: short walks fill up the end of the launch.
    x0 = (tiles - 1 - tl.program_id(0) // pairs) * ROWS
    x = x0 + tl.arange(0, ROWS)
    i = (x // R).to(tl.int64)
    head = g * R + x % R
    seen = tl.where(x < T * R, _seen(first + x // R, C, L, STEP), 0)
    least = _seen(first + x0 // R, C, L, STEP)
    most = _seen(first + tl.minimum(x0 + ROWS - 1, T * R - 1) // R, C, L, STEP)
    dk, dv = tl.arange(0, DKP), tl.arange(0, DVP)
    at = Q + b * sq_b + i[:, None] * sq_t + head[:, None] * sq_h + dk[None, :]
    q = load_rows(at, seen > 0, dk, DK)
    inside = tl.arange(0, KEYS)
    keys = K + b * sk_b + g * sk_g + inside.to(tl.int64)[:, None] * sk_c + dk[None, :]
    values = V + b * sv_b + g * sv_g + inside.to(tl.int64)[:, None] * sv_c + dv[None, :]
    scale2 = scale * 1.4426950408889634
    # Below every score, and finite: a row that a tile hides whole keeps it without a NaN.
    m = tl.full([ROWS], -3.0e38, tl.float32)
    z = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, DVP], tl.float32)
    count = tl.zeros([ROWS], tl.int32)
    walk = tl.cdiv(most, KEYS)
    edge = walk - least // KEYS
    for j in range(0, walk):
        s0 = (walk - 1 - j) * KEYS
        block = s0 + inside
        k = load_rows(keys + s0.to(tl.int64) * sk_c, block < most, dk, DK)
        v = load_rows(values + s0.to(tl.int64) * sv_c, block < most, dv, DV)
        s = tl.dot(q, tl.trans(k), input_precision=IP)
        if ALWAYS:  # noqa: SIM114 (known when compiling, the other when running)
            s = tl.where(block[None, :] < seen[:, None], s, float("-inf"))
        elif j < edge:
            s = tl.where(block[None, :] < seen[:, None], s, float("-inf"))
        if COUNT:
            count += tl.sum((block[None, :] < seen[:, None]).to(tl.int32), 1)
        above = tl.maximum(m, tl.max(s, 1) * scale2)
        p = exp2(s * scale2 - above[:, None], IP)
        fade = exp2(m - above, IP)
        z = z * fade + tl.sum(p, 1)
        out = out * fade[:, None]
        out += tl.dot(p.to(v.dtype), v, input_precision=IP)
        m = above
    z = tl.where(seen > 0, z, 1.0)
    place = (b * T + i) * (G * R) + head
    tl.store(
        Out + place[:, None] * DV + dv[None, :], (out / z[:, None]).to(Out.dtype.element_ty),
        mask=(x < T * R)[:, None] & (dv[None, :] < DV),
    )  # fmt: skip
    lse = tl.where(seen > 0, m * 0.6931471805599453 + tl.log(z), float("-inf"))
    tl.store(Lse + place, lse, mask=x < T * R)
    if COUNT:
        # The heads of a query are handed the same blocks.
        read = tl.where(x % R == 0, count, 0)
        tl.atomic_add(Reads + bg, tl.sum(read, 0).to(tl.int64))


@triton.jit(do_not_specialize=["S", "T", "C", "rows"])
def backward_dq(
    Q, K, V, Dout, Out, Lse, Delta, Lengths, Packed, Dq,
    sq_b, sq_t, sq_h, sk_b, sk_c, sk_g, sv_b, sv_c, sv_g, sd_b, sd_t, sd_h, scale, S, T, C, G, rows,
    R: tl.constexpr, L: tl.constexpr, STEP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    DKP: tl.constexpr, DVP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, IP: tl.constexpr,
    ALWAYS: tl.constexpr, RAGGED: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """A program: dq of ROWS rows of one group; their lse and delta, [B,G,T*R] each, for the other kernel.

    DELTA: it is given, and lse may be less the log of a gate: the weights then carry the gate, and nothing more is done
    or loaded for it.
    """
    tiles = tl.cdiv(T * R, ROWS)
    pairs = tl.num_programs(0) // tiles
    bg = tl.program_id(0) % pairs
    b, g = (bg // G).to(tl.int64), (bg % G).to(tl.int64)
    first = _end(Lengths, b, S, RAGGED) - T
    x0 = (tiles - 1 - tl.program_id(0) // pairs) * ROWS
    x = x0 + tl.arange(0, ROWS)
    i = (x // R).to(tl.int64)
    head = g * R + x % R
    seen = tl.where(x < T * R, _seen(first + x // R, C, L, STEP), 0)
    least = _seen(first + x0 // R, C, L, STEP)
    most = _seen(first + tl.minimum(x0 + ROWS - 1, T * R - 1) // R, C, L, STEP)
    ok = seen > 0
    dk, dv = tl.arange(0, DKP), tl.arange(0, DVP)
    q = load_rows(Q + b * sq_b + i[:, None] * sq_t + head[:, None] * sq_h + dk[None, :], ok, dk, DK)
    do = load_rows(Dout + b * sd_b + i[:, None] * sd_t + head[:, None] * sd_h + dv[None, :], ok, dv, DV)
    place = (b * T + i) * (G * R) + head
    lse = tl.load(Lse + place, mask=ok, other=0.0)
    if DELTA:
        delta = tl.load(Delta + place, mask=ok, other=0.0)
    else:
        o = load_rows(Out + place[:, None] * DV + dv[None, :], ok, dv, DV)
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    lse = in_units(lse, IP)
    to = Packed + bg.to(tl.int64) * T * R + x
    tl.store(to, lse, mask=x < T * R)
    tl.store(to + rows.to(tl.int64), delta, mask=x < T * R)
    inside = tl.arange(0, KEYS)
    keys = K + b * sk_b + g * sk_g + inside.to(tl.int64)[:, None] * sk_c + dk[None, :]
    values = V + b * sv_b + g * sv_g + inside.to(tl.int64)[:, None] * sv_c + dv[None, :]
    dq = tl.zeros([ROWS, DKP], tl.float32)
    walk = tl.cdiv(most, KEYS)
    edge = walk - least // KEYS
    for j in range(0, walk):
        s0 = (walk - 1 - j) * KEYS
        block = s0 + inside
        k = load_rows(keys + s0.to(tl.int64) * sk_c, block < most, dk, DK)
        v = load_rows(values + s0.to(tl.int64) * sv_c, block < most, dv, DV)
        p = weights(tl.dot(q, tl.trans(k), input_precision=IP), lse[:, None], scale, IP)
        if ALWAYS:  # noqa: SIM114 (known when compiling, the other when running)
            p = tl.where(block[None, :] < seen[:, None], p, 0.0)
        elif j < edge:
            p = tl.where(block[None, :] < seen[:, None], p, 0.0)
        ds = p * (tl.dot(do, tl.trans(v), input_precision=IP) - delta[:, None])
        dq += tl.dot(ds.to(k.dtype), k, input_precision=IP)
    tl.store(
        Dq + place[:, None] * DK + dk[None, :], (dq * scale).to(Dq.dtype.element_ty),
        mask=(x < T * R)[:, None] & (dk[None, :] < DK),
    )  # fmt: skip


@triton.jit(do_not_specialize=["S", "T", "C", "most", "tiles", "rows", "piece"])
def backward_dkv(
    Q, K, V, Dout, Packed, Lengths, Dk, Dv,
    sq_b, sq_t, sq_h, sk_b, sk_c, sk_g, sv_b, sv_c, sv_g, sd_b, sd_t, sd_h, scale, S, T, C, G, most, tiles, rows, piece,
    R: tl.constexpr, L: tl.constexpr, STEP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    DKP: tl.constexpr, DVP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, IP: tl.constexpr,
    ALWAYS: tl.constexpr, RAGGED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A program: dk and dv of KEYS keys of one group, from those rows of its piece that see one of them, in order.

    tiles: of keys; most: keys that dk and dv hold; piece: tiles of rows. WHOLE: the one piece writes dk and dv, zeros
    past C included. Otherwise Dk is [pieces, B*G, tiles*KEYS, DK + DV] fp32, without the pieces before a key's first.
    """
    # The tiles of keys that read the same rows run side by side, and the last pieces, which all of them see, first.
    pairs = rows // (T * R)
    bg = tl.program_id(0) // tiles % pairs
    part = tl.num_programs(0) // (tiles * pairs) - 1 - tl.program_id(0) // (tiles * pairs)
    s0 = tl.program_id(0) % tiles * KEYS
    b, g = (bg // G).to(tl.int64), (bg % G).to(tl.int64)
    end = _end(Lengths, b, S, RAGGED)
    first = end - T
    block = s0 + tl.arange(0, KEYS)
    held = block < _seen(end - 1, C, L, STEP)
    at = block.to(tl.int64)[:, None]
    dk, dv = tl.arange(0, DKP), tl.arange(0, DVP)
    k = load_rows(K + b * sk_b + g * sk_g + at * sk_c + dk[None, :], held, dk, DK)
    v = load_rows(V + b * sv_b + g * sv_g + at * sv_c + dv[None, :], held, dv, DV)
    queries = Q + b * sq_b + g * R * sq_h + dk[None, :]
    douts = Dout + b * sd_b + g * R * sd_h + dv[None, :]
    packed = Packed + bg.to(tl.int64) * T * R
    # Tiles of rows that see a key of this tile, and from `near` on those of rows that see every key.
    begin = _first_seeing(s0, first, L, STEP) * R // ROWS
    near = tl.cdiv(_first_seeing(s0 + KEYS - 1, first, L, STEP) * R, ROWS)
    blind = _first_seeing(0, first, L, STEP) * R
    grad_k = tl.zeros([KEYS, DKP], tl.float32)
    grad_v = tl.zeros([KEYS, DVP], tl.float32)
    for j in range(tl.maximum(part * piece, begin), tl.minimum((part + 1) * piece, tl.cdiv(T * R, ROWS))):
        x = j * ROWS + tl.arange(0, ROWS)
        ok = (x >= blind) & (x < T * R)
        i = (x // R).to(tl.int64)
        head = (x % R).to(tl.int64)
        # Rows that are not loaded have q, dout, lse and delta 0: they add nothing.
        q = load_rows(queries + i[:, None] * sq_t + head[:, None] * sq_h, ok, dk, DK)
        do = load_rows(douts + i[:, None] * sd_t + head[:, None] * sd_h, ok, dv, DV)
        lse = tl.load(packed + x, mask=ok, other=0.0)
        delta = tl.load(packed + rows.to(tl.int64) + x, mask=ok, other=0.0)
        p = weights(tl.dot(k, tl.trans(q), input_precision=IP), lse[None, :], scale, IP)
        if ALWAYS:  # noqa: SIM114 (known when compiling, the other when running)
            p = tl.where(block[:, None] < _seen(first + x // R, C, L, STEP)[None, :], p, 0.0)
        elif j < near:
            p = tl.where(block[:, None] < _seen(first + x // R, C, L, STEP)[None, :], p, 0.0)
        grad_v += tl.dot(p.to(do.dtype), do, input_precision=IP)
        ds = p * (tl.dot(v, tl.trans(do), input_precision=IP) - delta[None, :])
        grad_k += tl.dot(ds.to(q.dtype), q, input_precision=IP)
    grad_k *= scale
    if WHOLE:
        # No row sees a key that is not held: its gradients are 0.
        to = (b * most + at) * G + g
        kept = (block < most)[:, None]
        tl.store(Dk + to * DK + dk[None, :], grad_k.to(Dk.dtype.element_ty), mask=kept & (dk[None, :] < DK))
        tl.store(Dv + to * DV + dv[None, :], grad_v.to(Dv.dtype.element_ty), mask=kept & (dv[None, :] < DV))
    else:
        to = Dk + ((part.to(tl.int64) * pairs + bg) * (tiles * KEYS) + at) * (DK + DV)
        wanted = held[:, None] & (part >= begin // piece)
        tl.store(to + dk[None, :], grad_k, mask=wanted & (dk[None, :] < DK))
        tl.store(to + DK + dv[None, :], grad_v, mask=wanted & (dv[None, :] < DV))


@triton.jit(do_not_specialize=["S", "T", "C", "most", "tiles", "pairs", "piece", "pieces"])
def sum_pieces(
    Parts, Lengths, Dk, Dv, S, T, C, G, most, tiles, pairs, piece, pieces,
    R: tl.constexpr, L: tl.constexpr, STEP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SPAN: tl.constexpr, TOGETHER: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """A program: SPAN elements of dk and dv of one group from `backward_dkv`'s pieces, TOGETHER of them at a time."""
    spans = tl.cdiv(most * (DK + DV), SPAN)
    bg = tl.program_id(0) // spans
    b, g = (bg // G).to(tl.int64), (bg % G).to(tl.int64)
    end = _end(Lengths, b, S, RAGGED)
    e = tl.program_id(0) % spans * SPAN + tl.arange(0, SPAN)
    block, d = e // (DK + DV), e % (DK + DV)
    held = block < _seen(end - 1, C, L, STEP)
    since = _first_seeing(block // KEYS * KEYS, end - T, L, STEP) * R // ROWS // piece
    apart = pairs.to(tl.int64) * (tiles * KEYS * (DK + DV))
    at = Parts + bg.to(tl.int64) * (tiles * KEYS * (DK + DV)) + e
    # Summed over the pieces after the loop: Triton 3.0 dies of a sum within whose result is used twice.
    shares = tl.zeros([TOGETHER, SPAN], tl.float32)
    for n in range(0, tl.cdiv(pieces, TOGETHER)):
        part = n * TOGETHER + tl.arange(0, TOGETHER)
        there = (part < pieces)[:, None] & held[None, :] & (part[:, None] >= since[None, :])
        shares += tl.load(at[None, :] + part.to(tl.int64)[:, None] * apart, mask=there, other=0.0)
    total = tl.sum(shares, 0)
    to = (b * most + block) * G + g
    kept = block < most
    tl.store(Dk + to * DK + d, total.to(Dk.dtype.element_ty), mask=kept & (d < DK))
    tl.store(Dv + to * DV + d - DK, total.to(Dv.dtype.element_ty), mask=kept & (d >= DK))
