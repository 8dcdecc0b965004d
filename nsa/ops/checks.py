"""What every attention op asks of its inputs, and how ragged rows are walked."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nsa.blocks import n_compressed
from nsa.config import NSAConfig

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
    query at all, or for a tensor that is not a length a batch row."""
    B, T = q.shape[:2]
    if not B * T:
        raise ValueError(f"{op}: q has shape {tuple(q.shape)}: no query; give at least one row and one token")
    if isinstance(seq_len, torch.Tensor):
        if seq_len.shape != (B,) or seq_len.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{op}: seq_len is {seq_len.dtype} {tuple(seq_len.shape)}; expected int32 [{B}]")
        if _is_at_hand(seq_len) and int(seq_len.min()) < 0:
            raise ValueError(f"{op}: seq_len = {int(seq_len.min())} in row {int(seq_len.argmin())} is below 0")
        return 0, seq_len
    if seq_len < T:
        raise ValueError(f"{op}: seq_len = {seq_len} is below the {T} queries, which are the last of its positions")
    return seq_len, None


def check_blocks(op: str, k_cmp: torch.Tensor, S: int, cfg: NSAConfig) -> None:
    """ValueError if k_cmp [B,*,G,D] lacks compressed keys of S positions."""
    C = n_compressed(S, cfg)
    if k_cmp.shape[1] < C:
        raise ValueError(f"{op}: {k_cmp.shape[1]} compressed keys, but seq_len = {S} has {C} blocks")


def longest(S: int, rows: torch.Tensor | None) -> int:
    """The positions that keys must cover; 0 where only a device knows, which a check does not wait for."""
    if rows is None:
        return S
    return int(rows.max()) if _is_at_hand(rows) else 0


def _is_at_hand(rows: torch.Tensor) -> bool:
    return rows.device.type == "cpu" and not torch.compiler.is_compiling()


def each_row(
    one: Callable[[int, int, int], tuple[torch.Tensor, ...]], T: int, rows: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Run `one(b, S, T_b)` for every ragged row and stack the results; T_b = min(T, S), the row's real queries.

    Results of a row with fewer queries than T are the caller's to pad.
    """
    results = [one(b, S, min(T, S)) for b, S in enumerate(rows.tolist())]
    return tuple(torch.cat(column) for column in zip(*results, strict=True))


def pad_front(x: torch.Tensor, T: int, value: float) -> torch.Tensor:
    """Pad [B,t,...] in front to [B,T,...]."""
    missing = T - x.shape[1]
    if not missing:
        return x
    return torch.cat([x.new_full((x.shape[0], missing, *x.shape[2:]), value), x], dim=1)
