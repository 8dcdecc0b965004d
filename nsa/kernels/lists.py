"""Inverse lists: for every KV block the queries that chose it, ascending; built on the device by a counting sort.

A query sets one bit a block, in words of 32 queries. The place of a (query, slot) pair is then the start of its
block's list, plus the bits in earlier words, plus the lower bits of its own word: the same on every run, since or-ing
bits has no order. Lists are cut into pieces of at most so many pairs, so that a block chosen by everyone is many
programs' work. Nothing here waits for the device, and a stretch of queries takes five operations of it.

All of it lies in one int32 tensor, which `Layout` divides: it can be saved for the backward as it is. A list is
ascending, so the queries that see a block as their own or as the one before it are a prefix: the forward, which walks
those apart, reads the same lists and leaves the prefix out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from nsa.kernels.primitives import popcount, visible

_WORD = 32
# Regions begin at multiples of it, so that Triton specialises every offset alike.
_EVEN = 16


@triton.jit
def _mark(
    Blocks, Words, start, n_queries, first, T, G, M, W, N: tl.constexpr, L: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    x = tl.program_id(0) * X + tl.arange(0, X)
    bg = tl.program_id(1).to(tl.int64)
    i = x // N
    row = ((bg // G) * T + start + i) * G + bg % G
    block = tl.load(Blocks + row * N + x % N, mask=i < n_queries, other=-1)
    bit = tl.full([X], 1, tl.int32) << (i % 32)
    tl.atomic_or(Words + (bg * W + i // 32) * M + block, bit, mask=visible(block, first + i, L), sem="relaxed")


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
def _cut(
    Words, Before, Start, Lists, n_queries, first, M, W, chunk_words,
    pairs, table_f, table_b, known, room_f, room_b, piece_f, piece_b, spill_rows,
    N: tl.constexpr, L: tl.constexpr, MT: tl.constexpr,
):  # fmt: skip
    """A program: the pieces of one group's lists in one chunk, for one direction; where each list starts.

    A piece is (list, first pair, end, place in the spill or -1), pairs counted from the tensor's beginning.
    """
    bg = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1)
    back = tl.program_id(2) == 1
    piece = tl.where(back, piece_b, piece_f)
    room = tl.where(back, room_b, room_f)
    groups = tl.num_programs(0)
    table = Lists + tl.where(back, table_b, table_f) + ((c * groups + bg) * room) * 4
    known_of = Lists + known + (c * 2 * groups + bg) * M
    low = c * chunk_words
    high = tl.minimum(low + chunk_words, W)
    pairs_of = pairs + bg * n_queries * N
    listed = 0
    placed = 0
    spilled = 0
    for m0 in range(0, M, MT):
        m = m0 + tl.arange(0, MT)
        ok = m < M
        before = bg * (W + 1)
        total = tl.load(Before + (before + W) * M + m, mask=ok, other=0)
        begin = tl.load(Before + (before + low) * M + m, mask=ok, other=0)
        end = tl.load(Before + (before + high) * M + m, mask=ok, other=0)
        # Queries before `x` see the block as near: their pairs begin the list, and are all of block 0's.
        x = tl.minimum(tl.maximum((m + 2) * L - first, 0), n_queries)
        word = tl.load(Words + (bg * W + x // 32) * M + m, mask=ok & (x // 32 < W), other=0)
        near = tl.load(Before + (before + x // 32) * M + m, mask=ok, other=0)
        near += popcount(word & ((tl.full([MT], 1, tl.int32) << (x % 32)) - 1))
        near = tl.where(m == 0, total, near)
        begin = tl.where(back, begin, tl.maximum(begin, near))
        count = tl.maximum(end - begin, 0)
        tiles = (count + piece - 1) // piece
        shared = tl.where(tiles > 1, tiles, 0)
        start = listed + tl.cumsum(total, 0) - total
        place = placed + tl.cumsum(tiles, 0) - tiles
        spill = bg * spill_rows + spilled + tl.cumsum(shared, 0) - shared
        tl.store(Start + bg * M + m, pairs_of + start, mask=ok & (c == 0) & (tl.program_id(2) == 0))
        tl.store(known_of + m, tiles, mask=ok & back)
        tl.store(known_of + groups * M + m, spill.to(tl.int32), mask=ok & back)
        begin += (pairs_of + start).to(tl.int32)
        for j in range(0, tl.max(tiles, 0)):
            cell = table + (place + j) * 4
            mine = j < tiles
            tl.store(cell, (bg * M + m).to(tl.int32), mask=mine)
            tl.store(cell + 1, begin + j * piece, mask=mine)
            tl.store(cell + 2, begin + tl.minimum((j + 1) * piece, count), mask=mine)
            tl.store(cell + 3, tl.where(tiles > 1, spill + j, -1).to(tl.int32), mask=mine)
        listed += tl.sum(total, 0)
        placed += tl.sum(tiles, 0)
        spilled += tl.sum(shared, 0)
    for j0 in range(placed, room, MT):
        j = j0 + tl.arange(0, MT)
        tl.store(table + j * 4, tl.full([MT], -1, tl.int32), mask=j < room)


@triton.jit
def _place(
    Blocks, Words, Before, Start, Lists, start, n_queries, first, T, G, M, W,
    N: tl.constexpr, L: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    x = tl.program_id(0) * X + tl.arange(0, X)
    bg = tl.program_id(1).to(tl.int64)
    i = x // N
    row = ((bg // G) * T + start + i) * G + bg % G
    block = tl.load(Blocks + row * N + x % N, mask=i < n_queries, other=-1)
    ok = visible(block, first + i, L)
    word = tl.load(Words + (bg * W + i // 32) * M + block, mask=ok, other=0)
    below = popcount(word & ((tl.full([X], 1, tl.int32) << (i % 32)) - 1))
    before = tl.load(Before + (bg * (W + 1) + i // 32) * M + block, mask=ok, other=0)
    at = tl.load(Start + bg * M + block, mask=ok, other=0)
    tl.store(Lists + at + before + below, x + start * N, mask=ok)


@dataclass(frozen=True)
class Chunk:
    """Queries start .. stop - 1 of all. Twos are of the forward (far pairs alone) and of the backward (all).

    tables: where the pieces lie, [groups, room, 4] int32, those unused being -1; pieces: how many of a group's may be
    used; known: where the backward's pieces of a list [groups*M] and then its place in the spill [groups*M] lie.
    """

    start: int
    stop: int
    tables: tuple[int, int]
    pieces: tuple[int, int]
    rooms: tuple[int, int]
    known: int


@dataclass(frozen=True)
class Stretch:
    """Queries start .. stop - 1, whose bit words are held at once, and where their pairs lie: [groups, queries*N]."""

    start: int
    stop: int
    pairs: int
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Layout:
    """What a call's lists are made of, from its shape alone.

    A list is a (batch row, group, block): key = (b*G + g)*M + m. A pair is query*N + slot. spill_rows: a bound on the
    pieces of a group, in a chunk of the backward, that share their list.
    """

    groups: int
    N: int
    L: int
    S: int
    T: int
    chunk: int
    piece: tuple[int, int]
    stretches: tuple[Stretch, ...]
    spill_rows: int
    size: int

    @property
    def n_blocks(self) -> int:
        return -(-self.S // self.L)

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return tuple(chunk for stretch in self.stretches for chunk in stretch.chunks)


@lru_cache(maxsize=256)
def layout(groups: int, T: int, N: int, L: int, S: int, chunk: int, words_bytes: int, piece: tuple[int, int]) -> Layout:
    """The layout of lists of blocks [B,T,G,N], groups = B*G, whose queries are the last T of S positions.

    chunk: queries a chunk, a multiple of 32; words_bytes: a bound on the bit words and their counts; piece: pairs of
    a piece at most, of the forward and of the backward.
    """
    n_blocks, used = -(-S // L), 0

    def take(count: int) -> int:
        nonlocal used
        here, used = used, used + -(-count // _EVEN) * _EVEN
        return here

    def cut(a: int, b: int) -> Stretch:
        edges = [(c, min(c + chunk, b)) for c in range(a, b, chunk)]
        pieces = [tuple(_most_pieces(stop - c, N, (S - T + stop - 1) // L + 1, p) for p in piece) for c, stop in edges]
        rooms = [-(-max(each[d] for each in pieces) // 4) * 4 for d in (0, 1)]
        pairs = take(groups * (b - a) * N)
        tables = [take(len(edges) * groups * room * 4) for room in rooms]
        known = take(len(edges) * 2 * groups * n_blocks)
        chunks = tuple(
            Chunk(
                *edge, (tables[0] + n * groups * rooms[0] * 4, tables[1] + n * groups * rooms[1] * 4),
                (most[0], most[1]), (rooms[0], rooms[1]), known + n * 2 * groups * n_blocks,
            )
            for n, (edge, most) in enumerate(zip(edges, pieces, strict=True))
        )  # fmt: skip
        return Stretch(a, b, pairs, chunks)

    most = max(1, words_bytes // (groups * n_blocks * (chunk // _WORD) * 8)) * chunk
    stretches = tuple(cut(a, min(a + most, T)) for a in range(0, T, most))
    # Every list of several pieces is longer than one, so its pieces are fewer than 2 * pairs / piece.
    spill_rows = max(1, 2 * min(chunk, T) * N // piece[1])
    return Layout(groups, N, L, S, T, chunk, piece, stretches, spill_rows, used)


def _most_pieces(queries: int, N: int, reachable: int, piece: int) -> int:
    """A bound on a group's pieces that needs no look at the device: every list wastes less than one piece."""
    pairs = queries * N
    return min(pairs, pairs // piece + reachable)


def build(blocks: torch.Tensor, plan: Layout) -> torch.Tensor:
    """The lists, int32 [plan.size], of contiguous blocks [B,T,G,N] int32. The same on every run."""
    G = blocks.shape[2]
    lists = torch.empty(plan.size, dtype=torch.int32, device=blocks.device)
    for stretch in plan.stretches:
        _build(blocks, plan, stretch, G, lists)
    return lists


def _build(blocks: torch.Tensor, plan: Layout, stretch: Stretch, G: int, lists: torch.Tensor) -> None:
    queries, M = stretch.stop - stretch.start, plan.n_blocks
    W, groups, first = -(-queries // _WORD), plan.groups, plan.S - plan.T + stretch.start
    words = torch.zeros(groups * W * M, dtype=torch.int32, device=blocks.device)
    before = torch.empty(groups * (W + 1) * M, dtype=torch.int32, device=blocks.device)
    start = torch.empty(groups * M, dtype=torch.int64, device=blocks.device)
    where = (stretch.start, queries, first, plan.T, G, M, W, plan.N, plan.L, 1024)
    grid, head = (triton.cdiv(queries * plan.N, 1024), groups), stretch.chunks[0]
    _mark[grid](blocks, words, *where)
    _scan[(triton.cdiv(M, 32), groups)](words, before, M, W, 64, 32)
    _cut[(groups, len(stretch.chunks), 2)](
        words, before, start, lists, queries, first, M, W, plan.chunk // _WORD,
        stretch.pairs, *head.tables, head.known, *head.rooms, *plan.piece, plan.spill_rows,
        plan.N, plan.L, 256,
    )  # fmt: skip
    _place[grid](blocks, words, before, start, lists, *where)
