"""The kernels of window.py. Strides are named by tensor and axis: sq_t is q's over tokens; the last one of a tensor is
1. Results, lse and delta are contiguous.

Sizes: R heads a group; DK, DV head dims in tiles of DKP, DVP; ROWS of a tile, a row being one head of one query, packed
without a gap; SPAN the queries that a tile's rows may touch, in a tile of DIAG keys; KEYS of a tile; IP the precision
of every dot. Row i of q sees keys first + i - w + 1 .. first + i. Scores are in units of log 2 inside.

Only tiles at the band's edges are masked. That is a branch round the mask alone: one round a load would cost its
pipelining, and a loop for each kind of tile, its filling and draining. ALWAYS masks every tile, without a branch.

DELTA: a row's delta is given, and its lse may be less the log of a gate: the weights then carry the gate, and nothing
more is done or loaded for it.
"""

import triton
import triton.language as tl

from nsa.kernels.primitives import exp2, in_units, load_rows, weights


@triton.jit
def _tile(tiles, G):
    """This program's tile, batch row and group: one axis of the grid, since the others end at 65,535."""
    others = tl.program_id(0) // tiles
    return tl.program_id(0) % tiles, (others // G).to(tl.int64), (others % G).to(tl.int64)


@triton.jit
def _not_before(token, end):
    """[rows, keys]: keys after the last one that is too old for the row, and after the sequence's start."""
    return (token >= 0)[None, :] & (token[None, :] > end[:, None])


@triton.jit
def _seen_by(token, t, w):
    """[keys, rows]: keys in the window of the row at t."""
    return (token[:, None] <= t[None, :]) & (token[:, None] > (t - w)[None, :])


@triton.jit
def forward(
    Q, K, V, Out, Lse,
    sq_b, sq_t, sq_h, sk_b, sk_t, sk_g, sv_b, sv_t, sv_g, scale, w, first, T, G,
    R: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, DKP: tl.constexpr, DVP: tl.constexpr,
    ROWS: tl.constexpr, SPAN: tl.constexpr, DIAG: tl.constexpr, KEYS: tl.constexpr, IP: tl.constexpr,
    ALWAYS: tl.constexpr,
):  # fmt: skip
    """A program: ROWS rows of one group against their band of keys."""
    tile, b, g = _tile(tl.cdiv(T * R, ROWS), G)
    x = tile * ROWS + tl.arange(0, ROWS)
    i = (x // R).to(tl.int64)
    head = g * R + x % R
    ok = x < T * R
    row = (b * T + i) * (G * R) + head
    t = first + x // R
    t0 = first + tile * ROWS // R
    dk, dv = tl.arange(0, DKP), tl.arange(0, DVP)
    keys = K + b * sk_b + g * sk_g + dk[None, :]
    values = V + b * sv_b + g * sv_g + dv[None, :]
    q = load_rows(Q + b * sq_b + i[:, None] * sq_t + head[:, None] * sq_h + dk[None, :], ok, dk, DK)
    scale2 = scale * 1.4426950408889634
    # The keys from the first row's own on come first: each row sees one of them, so that no maximum is -inf after it.
    own = t0 + tl.arange(0, DIAG)
    at = own.to(tl.int64)[:, None]
    own_k = load_rows(keys + at * sk_t, own < first + T, dk, DK)
    own_v = load_rows(values + at * sv_t, own < first + T, dv, DV)
    see = (own[None, :] <= t[:, None]) & (own[None, :] > (t - w)[:, None])
    own_s = tl.where(see, tl.dot(q, tl.trans(own_k), input_precision=IP), float("-inf"))
    m = tl.max(own_s, 1) * scale2
    own_p = exp2(own_s * scale2 - m[:, None], IP)
    z = tl.sum(own_p, 1)
    out = tl.dot(own_p.to(own_v.dtype), own_v, input_precision=IP)
    # Then those before it, backwards; of them the first `whole` tiles are seen by every row.
    before = tl.minimum(w - 1, t0)
    whole = tl.minimum(before, tl.maximum(w - SPAN, 0)) // KEYS
    inside = tl.arange(0, KEYS)
    keys += inside.to(tl.int64)[:, None] * sk_t
    values += inside.to(tl.int64)[:, None] * sv_t
    for j in range(0, tl.cdiv(before, KEYS)):
        s0 = t0 - (j + 1) * KEYS
        token = s0 + inside
        k = load_rows(keys + s0.to(tl.int64) * sk_t, token >= 0, dk, DK)
        v = load_rows(values + s0.to(tl.int64) * sv_t, token >= 0, dv, DV)
        s = tl.dot(q, tl.trans(k), input_precision=IP)
        if ALWAYS:  # noqa: SIM114 (known when compiling, the other when running)
            s = tl.where(_not_before(token, t - w), s, float("-inf"))
        elif j >= whole:
            s = tl.where(_not_before(token, t - w), s, float("-inf"))
        above = tl.maximum(m, tl.max(s, 1) * scale2)
        p = exp2(s * scale2 - above[:, None], IP)
        fade = exp2(m - above, IP)
        z = z * fade + tl.sum(p, 1)
        out = out * fade[:, None]
        out += tl.dot(p.to(v.dtype), v, input_precision=IP)
        m = above
    tl.store(
        Out + row[:, None] * DV + dv[None, :], (out / z[:, None]).to(Out.dtype.element_ty),
        mask=ok[:, None] & (dv[None, :] < DV),
    )  # fmt: skip
    tl.store(Lse + row, m * 0.6931471805599453 + tl.log(z), mask=ok)


@triton.jit
def backward_dq(
    Q, K, V, Dout, Out, Lse, Delta, Dq,
    sq_b, sq_t, sq_h, sk_b, sk_t, sk_g, sv_b, sv_t, sv_g, sd_b, sd_t, sd_h, scale, w, first, T, G,
    R: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, DKP: tl.constexpr, DVP: tl.constexpr,
    ROWS: tl.constexpr, SPAN: tl.constexpr, DIAG: tl.constexpr, KEYS: tl.constexpr, IP: tl.constexpr,
    ALWAYS: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """A program: dq of ROWS rows of one group. Delta is read if DELTA, else written, rowsum(out * dout)."""
    tile, b, g = _tile(tl.cdiv(T * R, ROWS), G)
    x = tile * ROWS + tl.arange(0, ROWS)
    i = (x // R).to(tl.int64)
    head = g * R + x % R
    ok = x < T * R
    row = (b * T + i) * (G * R) + head
    t = first + x // R
    t0 = first + tile * ROWS // R
    dk, dv = tl.arange(0, DKP), tl.arange(0, DVP)
    keys = K + b * sk_b + g * sk_g + dk[None, :]
    values = V + b * sv_b + g * sv_g + dv[None, :]
    q = load_rows(Q + b * sq_b + i[:, None] * sq_t + head[:, None] * sq_h + dk[None, :], ok, dk, DK)
    do = load_rows(Dout + b * sd_b + i[:, None] * sd_t + head[:, None] * sd_h + dv[None, :], ok, dv, DV)
    lse = in_units(tl.load(Lse + row, mask=ok, other=0.0), IP)
    if DELTA:
        delta = tl.load(Delta + row, mask=ok, other=0.0)
    else:
        o = load_rows(Out + row[:, None] * DV + dv[None, :], ok, dv, DV)
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        tl.store(Delta + row, delta, mask=ok)
    # The keys from the first row's own on, then those before it, as in the forward.
    own = t0 + tl.arange(0, DIAG)
    at = own.to(tl.int64)[:, None]
    own_k = load_rows(keys + at * sk_t, own < first + T, dk, DK)
    own_v = load_rows(values + at * sv_t, own < first + T, dv, DV)
    see = (own[None, :] <= t[:, None]) & (own[None, :] > (t - w)[:, None])
    own_p = tl.where(see, weights(tl.dot(q, tl.trans(own_k), input_precision=IP), lse[:, None], scale, IP), 0.0)
    own_dp = tl.dot(do, tl.trans(own_v), input_precision=IP)
    own_ds = own_p * (own_dp - delta[:, None])
    dq = tl.dot(own_ds.to(own_k.dtype), own_k, input_precision=IP)
    before = tl.minimum(w - 1, t0)
    whole = tl.minimum(before, tl.maximum(w - SPAN, 0)) // KEYS
    inside = tl.arange(0, KEYS)
    keys += inside.to(tl.int64)[:, None] * sk_t
    values += inside.to(tl.int64)[:, None] * sv_t
    for j in range(0, tl.cdiv(before, KEYS)):
        s0 = t0 - (j + 1) * KEYS
        token = s0 + inside
        k = load_rows(keys + s0.to(tl.int64) * sk_t, token >= 0, dk, DK)
        v = load_rows(values + s0.to(tl.int64) * sv_t, token >= 0, dv, DV)
        p = weights(tl.dot(q, tl.trans(k), input_precision=IP), lse[:, None], scale, IP)
        if ALWAYS:  # noqa: SIM114 (known when compiling, the other when running)
            p = tl.where(_not_before(token, t - w), p, 0.0)
        elif j >= whole:
            p = tl.where(_not_before(token, t - w), p, 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision=IP)
        ds = p * (dp - delta[:, None])
        dq += tl.dot(ds.to(k.dtype), k, input_precision=IP)
    tl.store(
        Dq + row[:, None] * DK + dk[None, :], (dq * scale).to(Dq.dtype.element_ty),
        mask=ok[:, None] & (dk[None, :] < DK),
    )  # fmt: skip


@triton.jit
def backward_dkv(
    Q, K, V, Dout, Lse, Delta, Dk, Dv,
    sq_b, sq_t, sq_h, sk_b, sk_t, sk_g, sv_b, sv_t, sv_g, sd_b, sd_t, sd_h, scale, w, first, T, G, N,
    R: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, DKP: tl.constexpr, DVP: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, IP: tl.constexpr, ALWAYS: tl.constexpr,
):  # fmt: skip
    """A program: dk and dv of KEYS of the N keys of one group, from all rows that see one of them, in order.

    Keys that no row sees, those from first + T on among them, are not read and get 0.
    """
    tile, b, g = _tile(tl.cdiv(N, KEYS), G)
    s0 = tile * KEYS
    token = s0 + tl.arange(0, KEYS)
    held = token < first + T
    at = token.to(tl.int64)[:, None]
    dk, dv = tl.arange(0, DKP), tl.arange(0, DVP)
    k = load_rows(K + b * sk_b + g * sk_g + at * sk_t + dk[None, :], held, dk, DK)
    v = load_rows(V + b * sv_b + g * sv_g + at * sv_t + dv[None, :], held, dv, DV)
    queries = Q + b * sq_b + g * R * sq_h + dk[None, :]
    douts = Dout + b * sd_b + g * R * sd_h + dv[None, :]
    # Tiles of rows that see a key of this tile, and among them those of rows that see every key.
    begin = tl.maximum(s0 - first, 0) * R // ROWS
    end = tl.cdiv(tl.minimum(s0 + KEYS + w - 1 - first, T) * R, ROWS)
    near = tl.cdiv(tl.maximum(s0 + KEYS - 1 - first, 0) * R, ROWS)
    far = tl.minimum(s0 + w - first, T) * R // ROWS
    grad_k = tl.zeros([KEYS, DKP], tl.float32)
    grad_v = tl.zeros([KEYS, DVP], tl.float32)
    for j in range(begin, end):
        x = j * ROWS + tl.arange(0, ROWS)
        ok = x < T * R
        i = (x // R).to(tl.int64)
        head = (x % R).to(tl.int64)
        row = (b * T + i) * (G * R) + g * R + head
        # Rows past the last have q, dout, lse and delta 0: they add nothing.
        q = load_rows(queries + i[:, None] * sq_t + head[:, None] * sq_h, ok, dk, DK)
        do = load_rows(douts + i[:, None] * sd_t + head[:, None] * sd_h, ok, dv, DV)
        lse = in_units(tl.load(Lse + row, mask=ok, other=0.0), IP)
        delta = tl.load(Delta + row, mask=ok, other=0.0)
        p = weights(tl.dot(k, tl.trans(q), input_precision=IP), lse[None, :], scale, IP)
        if ALWAYS:  # noqa: SIM114 (known when compiling, the other when running)
            p = tl.where(_seen_by(token, first + x // R, w), p, 0.0)
        elif (j < near) | (j >= far):
            p = tl.where(_seen_by(token, first + x // R, w), p, 0.0)
        dp = tl.dot(v, tl.trans(do), input_precision=IP)
        grad_v += tl.dot(p.to(do.dtype), do, input_precision=IP)
        ds = p * (dp - delta[None, :])
        grad_k += tl.dot(ds.to(q.dtype), q, input_precision=IP)
    to = (b * N + at) * G + g
    tl.store(
        Dk + to * DK + dk[None, :], (grad_k * scale).to(Dk.dtype.element_ty),
        mask=(token < N)[:, None] & (dk[None, :] < DK),
    )  # fmt: skip
    tl.store(
        Dv + to * DV + dv[None, :], grad_v.to(Dv.dtype.element_ty),
        mask=(token < N)[:, None] & (dv[None, :] < DV),
    )  # fmt: skip
