"""Inputs shared by tests and benchmarks: odd shapes, seeded factories, block lists that are given, not chosen."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.testing import oracle

# Patterns for a few dozen tokens, where a choice is a choice: every ratio of lengths, every number of forced blocks.
PATTERNS = {
    "small": NSAConfig(l=8, d=4, l_sel=16, n_sel=4, w=20),
    "paper": NSAConfig(l=32, d=16, l_sel=64, n_sel=2, w=48, init_blocks=0, local_blocks=1),
    "equal": NSAConfig(l=8, d=8, l_sel=8, n_sel=6, w=1, init_blocks=2, local_blocks=3),
    "wide": NSAConfig(l=24, d=4, l_sel=8, n_sel=5, w=7, init_blocks=0),
    "dense": NSAConfig(l=2, d=1, l_sel=3, n_sel=7, w=11, local_blocks=1),
}
HEADS_PER_GROUP = (1, 2, 3, 4, 6, 8, 16)
HEAD_DIMS = ((32, 32), (64, 64), (128, 128), (192, 128))  # (Dk, Dv)
TILES = (1, 5, 16, 77)
LONG_LENGTHS = (1000, 4097)
# (B, T, S, G, R, Dk, Dv) for kernels: every group size and head dim, T != S, lengths around a block, one query.
KERNEL_SHAPES = (
    (1, 111, 111, 1, 1, 64, 64),
    (2, 63, 64, 2, 2, 32, 32),
    (1, 65, 1000, 2, 3, 64, 64),
    (2, 1, 999, 2, 6, 64, 64),
    (1, 300, 300, 1, 4, 128, 128),
    (1, 257, 2049, 2, 6, 64, 64),
    (1, 130, 200, 1, 8, 192, 128),
    (1, 77, 333, 1, 16, 64, 32),
)
ONE_TOKEN = (1, 1, 1, 1, 2, 64, 64)  # forward only: its dQ and dK are exactly 0, and so is a relative budget for them


def lengths(cfg: NSAConfig) -> tuple[int, ...]:
    """Context lengths where something begins: the first token, the first compressed block, a selection block."""
    return (1, max(1, cfg.l - 1), cfg.l, cfg.l + 1, 63, 64, 65, 111)


class Inputs(NamedTuple):
    """q [B,T,H,Dk], k [B,S,G,Dk], v [B,S,G,Dv]."""

    q: Tensor
    k: Tensor
    v: Tensor


def inputs(
    B: int,
    T: int,
    S: int,
    *,
    G: int = 2,
    R: int = 2,
    Dk: int = 16,
    Dv: int = 16,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    seed: int = 0,
    contiguous: bool = True,
) -> Inputs:
    """Normal deviates, the same on every device. `contiguous=False` gives strided views of the same values."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tokens: int, heads: int, dim: int) -> Tensor:
        x = torch.randn(B, tokens, heads, dim, generator=generator, dtype=torch.float64).to(device, dtype)
        if contiguous:
            return x
        # [B, heads, tokens, 2*dim] storage, every second element: no axis is where a contiguous tensor has it
        return x.transpose(1, 2).repeat_interleave(2, dim=-1).contiguous()[..., ::2].transpose(1, 2)

    return Inputs(normal(T, G * R, Dk), normal(S, G, Dk), normal(S, G, Dv))


def fixed_selection(B: int, T: int, G: int, S: int, cfg: NSAConfig, *, seed: int = 0, device: str = "cpu") -> Tensor:
    """A legal block list [B,T,G,N] int32 that depends on no score: the forced blocks and random others."""
    draw = random.Random(seed)
    lists = torch.full((B, T, G, cfg.n_sel), -1, dtype=torch.int32)
    for i in range(T):
        t = S - T + i
        forced = oracle.forced_blocks(t, cfg)
        others = [m for m in range(len(oracle.selection_spans(t + 1, cfg))) if m not in forced]
        for b, g in itertools.product(range(B), range(G)):
            more = draw.sample(others, min(len(others), cfg.n_sel - len(forced)))
            picked = sorted(forced + more)
            lists[b, i, g, : len(picked)] = torch.tensor(picked, dtype=torch.int32)
    return lists.to(device)


def allowed_mask(seen: oracle.Seen, S: int, R: int, device: str = "cpu") -> Tensor:
    """The oracle's key lists as the bool mask [B,H,T,S] that `eager` takes."""
    B, T, G = len(seen), len(seen[0]), len(seen[0][0])
    mask = torch.zeros(B, G, T, S, dtype=torch.bool)
    for b, i, g in itertools.product(range(B), range(T), range(G)):
        mask[b, g, i, seen[b][i][g]] = True
    return mask.repeat_interleave(R, dim=1).to(device)


def pairwise(**axes: Sequence[Any]) -> list[dict[str, Any]]:
    """A short list of combinations in which every pair of values of any two axes occurs (greedy, deterministic)."""
    names = list(axes)
    todo = {
        (a, x, b, y)
        for (a, b) in itertools.combinations(range(len(names)), 2)
        for x in range(len(axes[names[a]]))
        for y in range(len(axes[names[b]]))
    }
    cases: list[dict[str, Any]] = []
    used: Counter[tuple[int, int]] = Counter()
    while todo:
        a, x, b, y = min(todo)
        case: dict[int, int] = {a: x, b: y}
        for axis in range(len(names)):
            if axis not in case:
                values = range(len(axes[names[axis]]))
                # Where no new pair is to be had, the value seen least.
                case[axis] = max(values, key=lambda v: (_gain(case, axis, v, todo), -used[axis, v]))
        todo -= {(p, case[p], q, case[q]) for p, q in itertools.combinations(range(len(names)), 2)}
        used.update(case.items())
        cases.append({name: axes[name][case[index]] for index, name in enumerate(names)})
    return cases


def _gain(case: dict[int, int], axis: int, value: int, todo: set[tuple[int, int, int, int]]) -> int:
    """Uncovered pairs that setting `axis` to `value` would cover."""
    pairs = ((axis, value, o, x) if axis < o else (o, x, axis, value) for o, x in case.items())
    return sum(pair in todo for pair in pairs)
