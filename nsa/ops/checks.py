"""What every attention op asks of its inputs, how ragged rows are walked, and products that autocast leaves alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from nsa.blocks import Pattern, n_compressed
from nsa.config import NSAConfig

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

F = TypeVar("F", bound=Callable[..., Any])


def exact(function: F) -> F:
    """Run `function` outside autocast, of the device of its first argument: autocast would take the operands of a
    product that is written in fp32, or in fp64, down to bf16."""

    @functools.wraps(function)
    def run(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_autocast_enabled(x.device.type):
            return function(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **kwargs)

    return run  # type: ignore[return-value]


def check_qkv(op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """q [B,T,H,Dk], k [B,*,G,Dk], v [B,*,G,Dv]: one dtype, one device, H a multiple of G; else ValueError."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}; expected [B, T, heads, D]")
        if x.dtype not in FLOATS:
            raise ValueError(f"{op}: {name} is {x.dtype}; use float16, bfloat16, float32 or float64")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{op}: {name} is {x.dtype} on {x.device} but q is {q.dtype} on {q.device}")
        if x.shape[0] != q.shape[0]:
            raise ValueError(f"{op}: {name} has batch {x.shape[0]} but q has {q.shape[0]}")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"{op}: k {tuple(k.shape)} and v {tuple(v.shape)} differ before the head dim")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"{op}: q has head dim {q.shape[3]} but k has {k.shape[3]}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{op}: {q.shape[2]} query heads are not a multiple of {k.shape[2]} groups")


def check_seq_len(op: str, q: torch.Tensor, seq_len: int | torch.Tensor) -> tuple[int, torch.Tensor | None]:
    """Split `seq_len` into (int, None), or (0, int32 [B]) for ragged rows; ValueError for an int below T, for no
    query at all, or for a tensor that is not a length a batch row. What the lengths are, `row_lengths` looks at."""
    B, T = q.shape[:2]
    if not B * T:
        raise ValueError(f"{op}: q has shape {tuple(q.shape)}: no query; give at least one row and one token")
    if isinstance(seq_len, torch.Tensor):
        if seq_len.shape != (B,) or seq_len.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{op}: seq_len is {seq_len.dtype} {tuple(seq_len.shape)}; expected int32 [{B}]")
        return 0, seq_len
    if seq_len < T:
        raise ValueError(f"{op}: seq_len = {seq_len} is below the {T} queries, which are the last of its positions")
    return seq_len, None


def keys_needed(op: str, S: int, T: int, p: Pattern | NSAConfig) -> int:
    """Rows that k must have for T queries at the end of S positions; `op` as routing names it."""
    if op in ("compressed", "selection"):
        return n_compressed(S, p)
    return min(S, p.w + T - 1) if op == "window" else S


def check_keys(op: str, name: str, k: torch.Tensor, S: int, T: int, p: Pattern | NSAConfig) -> None:
    """ValueError, by the public `name`, if k has fewer rows than S positions need."""
    needed = keys_needed(op, S, T, p)
    if k.shape[1] < needed:
        what = "compressed keys" if op in ("compressed", "selection") else "keys"
        raise ValueError(f"{name}: {k.shape[1]} {what}, but {T} queries at seq_len = {S} need {needed}")


def row_lengths(op: str, name: str, rows: torch.Tensor, k: torch.Tensor, T: int, p: Pattern | NSAConfig) -> list[int]:
    """Ragged lengths as ints. ValueError for one below 0 or beyond what k holds, wherever they lie: walking rows waits
    for them in any case, and a kernel would read past k's end."""
    lengths = rows.tolist()
    for b, S in enumerate(lengths):
        if S < 0:
            raise ValueError(f"{name}: seq_len = {S} in row {b} is below 0")
        check_keys(op, name, k, S, min(T, S), p)
    return lengths


def by_row(
    run: Callable[[slice, slice, int], tuple[torch.Tensor, ...]], T: int, lengths: list[int], *fills: float | None
) -> tuple[torch.Tensor, ...]:
    """Run `run(row, queries, S)` for every ragged row and stack the results; `queries` are the row's last min(T, S).

    A result with a fill is padded with it in front to T queries.
    """
    results = []
    for b, S in enumerate(lengths):
        found = run(slice(b, b + 1), slice(T - min(T, S), T), S)
        results.append([x if f is None else pad_front(x, T, f) for x, f in zip(found, fills, strict=True)])
    return tuple(torch.cat(column) for column in zip(*results, strict=True))


def pad_front(x: torch.Tensor, T: int, value: float) -> torch.Tensor:
    """Pad [B,t,...] in front to [B,T,...]."""
    missing = T - x.shape[1]
    if not missing:
        return x
    return torch.cat([x.new_full((x.shape[0], missing, *x.shape[2:]), value), x], dim=1)
