"""Inputs that a sparse attention may like or dislike: q [B,S,H,D], k and v [B,S,G,D] by kind, and what was chosen.

random   normal deviates: choices near uniform, the easiest balance and the hardest locality
local    q and k drift with the position, so that neighbouring queries agree on their blocks
popular  one early block is chosen by every later query: the longest list that there can be
FILE.pt  q, k, v of a trained model: a dict of [S,heads,D] or [1,S,heads,D], of which the first S rows are taken
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from nsa.config import NSAConfig

# Tokens over which `local` drifts to an unrelated direction, and the share of its variance that drifts.
_DRIFT_TOKENS, _DRIFT_SHARE = 256, 0.8
# By how much the popular block's scores, in units of their deviation elsewhere, exceed the others.
_POPULAR_SCORE = 12.0


class Layout(NamedTuple):
    """Query heads, key/value groups, head dim."""

    heads: int
    groups: int
    dim: int

    def __str__(self) -> str:
        return "/".join(map(str, self))


class QKV(NamedTuple):
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


class InputsError(ValueError):
    """A file of inputs that is not as described above, or too short."""


Normal = Callable[[int, int], torch.Tensor]


def make(
    kind: str, S: int, layout: Layout, cfg: NSAConfig, device: torch.device, dtype: torch.dtype, batch: int = 1
) -> QKV:
    """Inputs of a kind, or the first S rows of a file; InputsError where the file has fewer. Batch rows are equal but
    for `random`'s."""
    if kind.endswith(".pt"):
        loaded = load(Path(kind))
        if loaded.q.shape[1] < S:
            raise InputsError(f"{kind} holds {loaded.q.shape[1]} positions")
        return QKV(*(x[:, :S].to(device, dtype).repeat(batch, 1, 1, 1) for x in loaded))
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int, heads: int) -> torch.Tensor:
        return torch.randn(
            batch if kind == "random" else 1,
            rows,
            heads,
            layout.dim,
            device=device,
            dtype=torch.float32,
            generator=generator,
        )

    q, k, v = KINDS[kind](normal, S, layout, cfg)
    return QKV(*(x.to(dtype).repeat(batch // len(x), 1, 1, 1) for x in (q, k, v)))


def _random(normal: Normal, S: int, layout: Layout, cfg: NSAConfig) -> QKV:
    return QKV(normal(S, layout.heads), normal(S, layout.groups), normal(S, layout.groups))


def _local(normal: Normal, S: int, layout: Layout, cfg: NSAConfig) -> QKV:
    def drifting(heads: int) -> torch.Tensor:
        corners = normal(-(-S // _DRIFT_TOKENS) + 1, heads)[0].permute(1, 2, 0)  # [heads,D,n]
        n = (corners.shape[-1] - 1) * _DRIFT_TOKENS + 1
        path = F.interpolate(corners, size=n, mode="linear", align_corners=True)[..., :S].permute(2, 0, 1)[None]
        # Halfway between two corners a mean of them has less variance; scores should not breathe with it.
        path = path / path.square().mean(-1, keepdim=True).sqrt()
        return path.mul_(_DRIFT_SHARE**0.5).add_(normal(S, heads), alpha=(1 - _DRIFT_SHARE) ** 0.5)

    return QKV(drifting(layout.heads), drifting(layout.groups), normal(S, layout.groups))


def _popular(normal: Normal, S: int, layout: Layout, cfg: NSAConfig) -> QKV:
    q, k, v = _random(normal, S, layout, cfg)
    # q.k / sqrt(D) grows by the square of this along one axis.
    push = math.sqrt(_POPULAR_SCORE * math.sqrt(layout.dim))
    first = popular_block(S, cfg) * cfg.l_sel
    q[..., 0] += push
    k[:, first : first + cfg.l_sel, :, 0] += push
    return QKV(q, k, v)


KINDS: dict[str, Callable[[Normal, int, Layout, NSAConfig], QKV]] = {
    "random": _random,
    "local": _local,
    "popular": _popular,
}


def popular_block(S: int, cfg: NSAConfig) -> int:
    """The block that `popular` makes everyone choose: an early one, but none that is forced on everyone."""
    return max(cfg.init_blocks, S // cfg.l_sel // 16)


def load(path: Path) -> QKV:
    """q [1,S,H,D], k and v [1,S,G,D] of a file, on the CPU; InputsError names what is wrong with it."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputsError(f"{path} cannot be read ({error.strerror}); name a file that torch.save wrote") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise InputsError(f"{path} is no file that torch.save wrote, or holds more than tensors") from error
    if not isinstance(found, dict) or not {"q", "k", "v"} <= found.keys():
        raise InputsError(f"{path} is not a dict with q, k and v")
    q, k, v = (x if x.dim() == 4 else x.unsqueeze(0) for x in (found["q"], found["k"], found["v"]))
    if any(x.dim() != 4 or x.shape[0] != 1 for x in (q, k, v)):
        raise InputsError(f"{path}: q, k and v should be [S,heads,D] or [1,S,heads,D]")
    if k.shape != v.shape or q.shape[1] != k.shape[1] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise InputsError(f"{path}: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together")
    return QKV(q, k, v)


def layout_of(inputs: QKV) -> Layout:
    return Layout(inputs.q.shape[2], inputs.k.shape[2], inputs.q.shape[3])


class Choices(NamedTuple):
    """What the first row of blocks [B,S,G,N] says of the inputs, forced blocks left out.

    agreement: the share of a query's blocks that the query before it chose too. heaviest: the share of queries that
    chose the block chosen most often.
    """

    agreement: float
    heaviest: float


def choices(blocks: torch.Tensor, cfg: NSAConfig) -> Choices:
    blocks = blocks[:1]
    S, G = blocks.shape[1:3]
    own = (torch.arange(S, device=blocks.device) // cfg.l_sel)[None, :, None, None]
    free = (blocks >= cfg.init_blocks) & (blocks <= own - cfg.local_blocks)
    shared = total = 0
    step = 8192
    for start in range(1, S, step):
        now, before = blocks[:, start : start + step], blocks[:, start - 1 : start - 1 + step][:, : S - start]
        also = (now.unsqueeze(-1) == before.unsqueeze(-2)).any(-1)
        shared += int((also & free[:, start : start + step]).sum())
        total += int(free[:, start : start + step].sum())
    M = -(-S // cfg.l_sel)
    group = torch.arange(G, device=blocks.device)[:, None] * M
    counts = torch.bincount((blocks.long() + group)[free], minlength=G * M)
    return Choices(shared / max(total, 1), int(counts.max()) / S)
