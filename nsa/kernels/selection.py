"""Block choice on a GPU: scores recomputed from the known lse, summed over heads and overlaps, then the exact top n.

Two kernels walk the queries in chunks, so that the scores in memory stay within a fixed workspace at any length.

Scores. Compressed key j = m*step + a belongs to selection block m with residue a. A program holds the queries of all
heads of one group as columns (head-major, so that a head sum adds registers of one thread) and loads the keys of one
residue of many blocks as rows. Eq. 9's taps with offset a - s*step (s = 0, 1, ...) then are plane s, for the block s
further on. Planes are stored apart and added when they are read, since rows of a tile cannot meet in registers.

Top n. A row's scores stay in registers. Bits of floats >= 0 order as they do, so the n-th largest is found by
bisection of integers, and a prefix sum gives each chosen block its slot: ascending, equal scores to the lower block,
the same on every machine, without a sort.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from nsa.blocks import Pattern
from nsa.kernels.primitives import capability

_LOG2E = math.log2(math.e)
# Probabilities are scaled by 2**100, which leaves their order: the smallest that is not flushed is 1e-68, not 1e-38.
HEADROOM = tl.constexpr(100.0)
_WORKSPACE = 256 << 20  # bytes of scores at a time
_PROGRAMS = 256  # a grid below this is widened by splitting the keys: decode, short tiles
MAX_HEAD_DIM = 256
MAX_KEYS = 1 << 16  # a row's scores live in the registers of one program
_MOST_GRID = 65_535  # programs along a grid's second axis


class Tile(NamedTuple):
    """How a score program is cut: heads at once, queries, selection blocks, and its launch."""

    heads: int
    queries: int
    blocks: int
    warps: int
    stages: int


def tile(sm: int, R: int, D: int, itemsize: int) -> Tile:
    """The launch table of the scores, by card, group size, head dim and bytes an element."""
    if itemsize == 4:  # three products of tf32 each: operands are held in parts
        columns, blocks, stages = (64, 64, 1) if D <= 64 else (32, 32, 1)
    else:
        columns, blocks, stages = (128, 64, 3) if D <= 128 else (64, 64, 2)
    heads = min(triton.next_power_of_2(R), columns // 8)
    if heads == 16:
        stages = 2  # a third program then fits a multiprocessor, which is worth more than a third stage
    return Tile(heads, min(columns // heads, 32), blocks, 4, stages)


def top_warps(width: int) -> int:
    """Warps of a top-n program whose row is `width` blocks wide: about 32 scores a thread."""
    return min(max(width // 1024, 1), 32)


def unsupported(
    backend: str, q: torch.Tensor, k: torch.Tensor, *_: torch.Tensor, blocks: int | None = None
) -> list[str]:
    """Reasons why these inputs cannot be handed to `select`; `blocks` are visible, all of k's unless given."""
    reasons = []
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        reasons.append(f"{q.dtype} is not bfloat16, float16 or float32")
    if q.shape[-1] > MAX_HEAD_DIM:
        reasons.append(f"head dim {q.shape[-1]} is above {MAX_HEAD_DIM}")
    if (rows := q.shape[0] * k.shape[2]) > _MOST_GRID:
        reasons.append(f"{rows} batch rows times groups are more than {_MOST_GRID}")
    seen = k.shape[1] if blocks is None else blocks
    if seen > MAX_KEYS:
        reasons.append(f"{seen} compressed keys are more than {MAX_KEYS}")
    return reasons


# Values that differ from chunk to chunk: a kernel compiled for each would be compiled in the middle of a run.
_VARYING = ["lines", "quads", "first", "rows", "past", "T", "G", "R", "splits"]


@triton.jit(do_not_specialize=_VARYING)
def _score(
    q, k, lse, planes,
    q_b, q_t, q_h, k_b, k_c, k_g, lse_b, lse_t, lse_h, lines, quads,
    first, rows, past, G, R, splits, scale,
    D: tl.constexpr, BD: tl.constexpr, L: tl.constexpr, STRIDE: tl.constexpr, STEP: tl.constexpr,
    PLANES: tl.constexpr, HEADS: tl.constexpr, BQ: tl.constexpr, BM: tl.constexpr,
    ONE_CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """planes[s, b, g, i, m + s] = sum over heads and residues a of weight(s, a) * p[b, i, h, m*STEP + a], for two s."""
    part = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    b = (tl.program_id(1) // G).to(tl.int64)
    g = (tl.program_id(1) % G).to(tl.int64)
    plane = tl.program_id(2) * 2

    # Later queries see more keys: they go first, so that the last programs are short ones.
    start = (tl.cdiv(rows, BQ) - 1 - part) * BQ
    row = start + tl.arange(0, BQ)
    seen = past + first + row - (L - 1)
    seen = tl.where(seen >= 0, seen // STRIDE + 1, 0)
    t_last = past + first + tl.minimum(start + BQ, rows) - 1
    n_keys = tl.where(t_last >= L - 1, (t_last - (L - 1)) // STRIDE + 1, 0)
    n_blocks = t_last // (STEP * STRIDE) + 1

    column = tl.arange(0, HEADS * BQ)
    c_head = column // BQ
    c_row = start + column % BQ
    c_inside = c_row < rows
    c_time = (first + c_row).to(tl.int64)
    dim = tl.arange(0, BD)
    q_at = q + b * q_b + c_time[:, None] * q_t + (g * R + c_head)[:, None] * q_h + dim[None, :]
    lse_at = lse + b * lse_b + c_time * lse_t + (g * R + c_head) * lse_h
    k_at = k + b * k_b + g * k_g + dim[None, :]

    if ONE_CHUNK:
        live = c_inside & (c_head < R)
        query = tl.load(q_at, mask=live[:, None] & (dim < D)[None, :], other=0.0)
        # +inf where there is no query: exp2(x - inf) = 0, and so a head that does not exist adds nothing.
        shift = tl.load(lse_at, mask=live, other=float("inf")) * 1.4426950408889634 - HEADROOM

    each = tl.cdiv(tl.cdiv(n_blocks, BM), splits)
    here = tl.zeros([BM, BQ], tl.float32)
    before = tl.zeros([BM, BQ], tl.float32)
    stop = tl.minimum((split + 1) * each, tl.cdiv(n_blocks, BM))
    for step in range(split * each * STEP, stop * STEP):
        a = step % STEP
        m = (step // STEP) * BM + tl.arange(0, BM)
        j = m * STEP + a
        key = tl.load(k_at + j.to(tl.int64)[:, None] * k_c, mask=(j < n_keys)[:, None] & (dim < D)[None, :], other=0.0)
        if ONE_CHUNK:
            s = tl.dot(key, tl.trans(query), input_precision=PRECISION)
            p = tl.sum(tl.reshape(tl.exp2(s * scale - shift[None, :]), (BM, HEADS, BQ)), 1)
        else:
            p = tl.zeros([BM, BQ], tl.float32)
            zero = g * 0  # of 64 bits, as a head times its stride may be
            for head in range(0, R, HEADS):
                live = c_inside & (head + c_head < R)
                query = tl.load(q_at + (zero + head) * q_h, mask=live[:, None] & (dim < D)[None, :], other=0.0)
                shift = tl.load(lse_at + (zero + head) * lse_h, mask=live, other=float("inf")) * 1.4426950408889634
                s = tl.dot(key, tl.trans(query), input_precision=PRECISION)
                p += tl.sum(tl.reshape(tl.exp2(s * scale - (shift - HEADROOM)[None, :]), (BM, HEADS, BQ)), 1)
        # Visibility is the same for all heads, so it is applied to their sum.
        p = tl.where(j[:, None] < seen[None, :], p, 0.0)
        offset = a - plane * STEP
        here += p * _tap(offset, L // STRIDE, STEP)
        before += p * _tap(offset - STEP, L // STRIDE, STEP)
        if a == STEP - 1:
            line = plane.to(tl.int64) * lines + (b * G + g) * rows + row
            out = planes + line[None, :] * (quads * 4) + m[:, None] + plane
            mine = (row < rows)[None, :]
            tl.store(out, here, mask=mine & (m + plane < n_blocks)[:, None])
            if PLANES > 1:
                also = (m + plane + 1 < n_blocks) & (plane + 1 < PLANES)
                tl.store(out + lines.to(tl.int64) * (quads * 4) + 1, before, mask=mine & also[:, None])
            here = tl.zeros([BM, BQ], tl.float32)
            before = tl.zeros([BM, BQ], tl.float32)


@triton.jit
def _tap(offset, LENGTH: tl.constexpr, STEP: tl.constexpr):
    """Eq. 9's weight of the compressed block that begins `offset` strides into a selection block; 0 outside."""
    shared = tl.minimum(offset + LENGTH, STEP) - tl.maximum(offset, 0)
    return tl.maximum(shared, 0).to(tl.float32)


@triton.jit(do_not_specialize=_VARYING)
def _top(
    planes, blocks, lines, quads, first, rows, past, T, G,
    N: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, L_SEL: tl.constexpr,
    PLANES: tl.constexpr, BW: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """blocks[b, first + i, g] = the N blocks of planes[:, b, g, i], ascending, -1 behind them."""
    line = tl.program_id(0).to(tl.int64)
    i = first + line % rows
    g = (line // rows) % G
    b = line // rows // G
    own = ((past + i) // L_SEL).to(tl.int32)
    m = tl.arange(0, BW)
    candidate = m <= own
    score = tl.zeros([BW], tl.float32)
    for s in tl.static_range(PLANES):  # from the farthest plane: taps ascend
        back = PLANES - 1 - s
        # Loads end on a multiple of four and rows begin on one, so they are 16 bytes wide; the rest is masked after.
        at = planes + (back * lines + line) * (quads * 4) + m
        score += tl.where(candidate & (m >= back), tl.load(at, mask=m < (own // 4 + 1) * 4, other=0.0), 0.0)
    # No score is NaN, infinite or -0 from here on, so bits order as scores do; forced blocks stand above them all.
    score = tl.minimum(tl.where(score > 0, score, 0.0), 3.0e38)
    forced = candidate & ((m < INIT) | (m > own - LOCAL))
    bits = tl.where(forced, 0x7F800000, score.to(tl.int32, bitcast=True))
    bits = tl.where(candidate, bits, -1)

    # count(bits >= high) <= N <= count(bits >= low), unless all candidates fit.
    low = tl.min(tl.where(candidate, bits, 0x7F800000), 0)
    high = tl.max(tl.where(forced, -1, bits), 0) + 1
    n_low = own + 1
    n_high = tl.sum((bits >= high).to(tl.int32), 0)
    while (n_low > N) & (high - low > 1):
        middle = low + (high - low) // 2
        count = tl.sum((bits >= middle).to(tl.int32), 0)
        enough = count >= N
        low = tl.where(enough, middle, low)
        n_low = tl.where(enough, count, n_low)
        high = tl.where(enough, high, middle)
        n_high = tl.where(enough, n_high, count)
    above = bits >= high
    level = (bits >= low) & (bits < high)
    # One prefix sum of both counts; there are at most 2**17 blocks, and fewer above than N.
    counted = tl.cumsum(tl.where(above, 1 << 18, level.to(tl.int32)), 0)
    n_level = counted & ((1 << 18) - 1)
    chosen = above | (level & (n_level <= N - n_high))
    out = blocks + ((b * T + i) * G + g) * N
    tl.store(out + (counted >> 18) + tl.minimum(n_level, N - n_high) - 1, m, mask=chosen)
    slot = tl.arange(0, BN)
    tl.store(out + slot, tl.full([BN], -1, tl.int32), mask=(slot > own) & (slot < N))


def select(q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, p: Pattern, S: int) -> torch.Tensor:
    """q [B,T,H,D], the last T of S positions; k [B,>=C,G,D]; lse [B,T,H] fp32 -> int32 [B,T,G,N].

    The choice of `nsa.ops.selection.select_blocks_reference`. At most `_WORKSPACE` bytes of scores at a time, or the
    scores of one tile of queries where those are more.
    """
    B, T, H, D = q.shape
    G = k.shape[2]
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    blocks = torch.empty(B, T, G, p.n_sel, dtype=torch.int32, device=q.device)
    if blocks.numel() == 0:
        return blocks
    R, past, planes = H // G, S - T, _planes(p)
    cut = tile(capability(q), R, D, q.element_size())
    row_bytes = 16 * planes * B * G * triton.cdiv(triton.cdiv(S, p.l_sel), 4)
    chunk = max(_WORKSPACE // row_bytes // cut.queries, 1) * cut.queries
    scores = torch.empty(row_bytes // 4 * min(chunk, T), dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        for first in range(0, T, chunk):
            rows = min(chunk, T - first)
            width = triton.cdiv(past + first + rows, p.l_sel)
            lines, quads = B * G * rows, triton.cdiv(width, 4)
            tiles = triton.cdiv(rows, cut.queries)
            splits = max(1, min(triton.cdiv(width, cut.blocks), _PROGRAMS // (tiles * B * G)))
            _score[(tiles * splits, B * G, triton.cdiv(planes, 2))](
                q, k, lse, scores, *q.stride()[:3], *k.stride()[:3], *lse.stride(), lines, quads,
                first, rows, past, G, R, splits, D**-0.5 * _LOG2E,
                **_score_constants(cut, R, D, q.dtype, p), num_warps=cut.warps, num_stages=cut.stages,
            )  # fmt: skip
            constants = _top_constants(width, p)
            _top[(lines,)](
                scores, blocks, lines, quads, first, rows, past, T, G, **constants,
                num_warps=top_warps(constants["BW"]),
            )  # fmt: skip
    return blocks


def _planes(p: Pattern) -> int:
    """How many neighbouring selection blocks the keys of one may belong to, itself included."""
    return 1 + triton.cdiv(p.l // p.d - 1, p.l_sel // p.d)


def _score_constants(cut: Tile, R: int, D: int, dtype: torch.dtype, p: Pattern) -> dict[str, Any]:
    return {
        "D": D,
        "BD": max(16, triton.next_power_of_2(D)),
        "L": p.l,
        "STRIDE": p.d,
        "STEP": p.l_sel // p.d,
        "PLANES": _planes(p),
        "HEADS": cut.heads,
        "BQ": cut.queries,
        "BM": cut.blocks,
        "ONE_CHUNK": cut.heads >= R,
        "PRECISION": "tf32x3" if dtype == torch.float32 else "ieee",
    }


def _top_constants(width: int, p: Pattern) -> dict[str, int]:
    return {
        "N": p.n_sel,
        "INIT": p.init_blocks,
        "LOCAL": p.local_blocks,
        "L_SEL": p.l_sel,
        "PLANES": _planes(p),
        "BW": max(64, triton.next_power_of_2(width)),
        "BN": triton.next_power_of_2(p.n_sel),
    }
