"""Inverse lists: for every KV block the queries that chose it, ascending; built on the device by a counting sort.

A query sets one bit a block, in words of 32 queries. The place of a (query, slot) pair is then the start of its
block's list, plus the bits in earlier words, plus the lower bits of its own word: the same on every run, since or-ing
bits has no order. Lists are cut into pieces of at most `piece` pairs, so that a block chosen by everyone is many
programs' work. Nothing here waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from nsa.kernels.primitives import far, popcount, visible

_WORD = 32


@triton.jit
def _listed(block, t, L: tl.constexpr, FAR: tl.constexpr):
    return far(block, t, L) if FAR else visible(block, t, L)


@triton.jit
def _mark(
    Blocks, Words, s_b, s_t, s_g, s_n, first, n_queries, G, M, W,
    N: tl.constexpr, L: tl.constexpr, FAR: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    x = tl.program_id(0) * X + tl.arange(0, X)
    bg = tl.program_id(1).to(tl.int64)
    i = x // N
    row = Blocks + (bg // G) * s_b + (bg % G) * s_g
    block = tl.load(row + i.to(tl.int64) * s_t + (x % N) * s_n, mask=i < n_queries, other=-1)
    ok = _listed(block, first + i, L, FAR)
    bit = tl.full([X], 1, tl.int32) << (i % 32)
    tl.atomic_or(Words + (bg * W + i // 32) * M + block, bit, mask=ok, sem="relaxed")


@triton.jit
def _scan(Words, Before, M, W, WT: tl.constexpr, MT: tl.constexpr):
    """Before[bg, w, m]: pairs of block m in words below w; row W holds the totals."""
    m = tl.program_id(0) * MT + tl.arange(0, MT)
    bg = tl.program_id(1).to(tl.int64)
    total = tl.zeros([MT], tl.int32)
    for w0 in range(0, W, WT):
        w = w0 + tl.arange(0, WT)
        ok = (w[:, None] < W) & (m[None, :] < M)
        count = popcount(tl.load(Words + (bg * W + w[:, None]) * M + m[None, :], mask=ok, other=0))
        upto = tl.cumsum(count, 0)
        tl.store(Before + (bg * (W + 1) + w[:, None]) * M + m[None, :], total[None, :] + upto - count, mask=ok)
        total += tl.sum(count, 0)
    tl.store(Before + (bg * (W + 1) + W) * M + m, total, mask=m < M)


@triton.jit
def _place(
    Blocks, Words, Before, Start, Pairs, s_b, s_t, s_g, s_n, first, n_queries, G, M, W,
    N: tl.constexpr, L: tl.constexpr, FAR: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    x = tl.program_id(0) * X + tl.arange(0, X)
    bg = tl.program_id(1).to(tl.int64)
    i = x // N
    row = Blocks + (bg // G) * s_b + (bg % G) * s_g
    block = tl.load(row + i.to(tl.int64) * s_t + (x % N) * s_n, mask=i < n_queries, other=-1)
    ok = _listed(block, first + i, L, FAR)
    word = tl.load(Words + (bg * W + i // 32) * M + block, mask=ok, other=0)
    below = popcount(word & ((tl.full([X], 1, tl.int32) << (i % 32)) - 1))
    before = tl.load(Before + (bg * (W + 1) + i // 32) * M + block, mask=ok, other=0)
    start = tl.load(Start + bg * M + block, mask=ok, other=0)
    tl.store(Pairs + start + before + below, x, mask=ok)


@triton.jit
def _cut(Start, Since, Count, Last, Spilled, Table, keys, pieces, piece, KT: tl.constexpr):
    """Write a chunk's pieces: (list, first pair, end, place in the spill or -1)."""
    key = tl.program_id(0) * KT + tl.arange(0, KT)
    c = tl.program_id(1).to(tl.int64)
    ok = key < keys
    count = tl.load(Count + c * keys + key, mask=ok, other=0)
    begin = tl.load(Start + key, mask=ok, other=0).to(tl.int32) + tl.load(Since + c * keys + key, mask=ok, other=0)
    tiles = (count + piece - 1) // piece
    place = tl.load(Last + c * keys + key, mask=ok, other=0) - tiles
    spill = tl.load(Spilled + c * keys + key, mask=ok, other=0) - tiles
    for j in range(0, tl.max(tiles, 0)):
        cell = Table + (c * pieces + place + j) * 4
        mine = j < tiles
        tl.store(cell, key, mask=mine)
        tl.store(cell + 1, begin + j * piece, mask=mine)
        tl.store(cell + 2, begin + tl.minimum((j + 1) * piece, count), mask=mine)
        tl.store(cell + 3, tl.where(tiles > 1, spill + j, -1), mask=mine)


@dataclass(frozen=True)
class Lists:
    """The lists of one stretch of queries, cut into chunks of queries and those into pieces.

    A list is a (batch row, group, block): key = (b*G + g)*M + m. pairs int32: query*N + slot, by key then query, the
    query counted from the stretch's first. table int32 [chunks, pieces, 4], see `_cut`; unused rows hold -1. count
    int32 and spilled int64 [chunks, keys]: a list's pairs in a chunk, and the running total of pieces that share a
    list.
    chunks: (start, stop) queries; pieces: a bound on each chunk's; spill_rows: a bound on those that share a list.
    """

    chunk: int
    pairs: torch.Tensor
    table: torch.Tensor
    count: torch.Tensor
    spilled: torch.Tensor
    chunks: tuple[tuple[int, int], ...]
    pieces: tuple[int, ...]
    piece: int
    spill_rows: int


def words_bytes(groups: int, n_blocks: int, n_queries: int) -> int:
    """Bytes of the bit words and their running counts for a stretch of queries."""
    return groups * n_blocks * (-(-n_queries // _WORD)) * 8


def build(
    blocks: torch.Tensor, l_sel: int, first: int, n_blocks: int, chunk: int, piece: int, *, far_only: bool
) -> Lists:
    """Lists of blocks [B,T,G,N] int32, of which query i sits at position first + i.

    chunk: queries a chunk, a multiple of 32; piece: pairs a piece at most; far_only: without the pairs of a query with
    block 0, its own and the one before.
    """
    B, T, G, N = blocks.shape
    device, groups, W = blocks.device, B * G, -(-T // _WORD)
    keys = groups * n_blocks
    words = torch.zeros(groups, W, n_blocks, dtype=torch.int32, device=device)
    before = torch.empty(groups, W + 1, n_blocks, dtype=torch.int32, device=device)
    pairs = torch.empty(groups * T * N, dtype=torch.int32, device=device)
    where = (*blocks.stride(), first, T, G, n_blocks, W, N, l_sel, far_only, 1024)
    _mark[(triton.cdiv(T * N, 1024), groups)](blocks, words, *where)
    _scan[(triton.cdiv(n_blocks, 32), groups)](words, before, n_blocks, W, 64, 32)
    # A kernel reads these by key: never a strided view, which reshape returns of a single block's column.
    total = before[:, W].reshape(-1).contiguous()
    start = total.cumsum(0) - total
    _place[(triton.cdiv(T * N, 1024), groups)](blocks, words, before, start, pairs, *where)

    chunks = tuple((a, min(a + chunk, T)) for a in range(0, T, chunk))
    edges = (torch.arange(len(chunks) + 1, device=device) * (chunk // _WORD)).clamp_(max=W)
    at = before.index_select(1, edges).transpose(0, 1).reshape(len(edges), keys).contiguous()
    since, count = at[:-1], at[1:] - at[:-1]
    tiles = (count + (piece - 1)) // piece
    last = tiles.cumsum(1)
    spilled = (tiles * (tiles > 1)).cumsum(1)
    pieces = tuple(_most_pieces(groups, b - a, N, (first + b - 1) // l_sel + 1, piece) for a, b in chunks)
    table = torch.full((len(chunks), max(pieces), 4), -1, dtype=torch.int32, device=device)
    _cut[(triton.cdiv(keys, 32), len(chunks))](start, since, count, last, spilled, table, keys, max(pieces), piece, 32)
    # Every list of several pieces is longer than one, so its pieces are fewer than 2 * pairs / piece.
    spill_rows = max(1, 2 * groups * min(chunk, T) * N // piece)
    return Lists(min(chunk, T), pairs, table, count, spilled, chunks, pieces, piece, spill_rows)


def _most_pieces(groups: int, queries: int, N: int, reachable: int, piece: int) -> int:
    """A bound on a chunk's pieces that needs no look at the device: every list wastes less than one piece."""
    pairs = queries * N
    return groups * min(pairs, pairs // piece + reachable)
