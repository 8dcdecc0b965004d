"""Rotary position embedding, half-split pairs, each head by itself."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch

from nsa.config import ModelConfig


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [B,T,heads,D] by tables [T,1,D] of at least fp32; the products are in their type, also under autocast,
    and the result is in x's."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of T tokens, the first at position `start`, and of every compressed key among or before them.

    The angle is position / rope_scale * rope_theta^(-2i/D); compressed key j stands at position j*d. A pair's cosine
    stands in both halves of a row; its sine too, negative in the first. All are views of one table.
    """

    cos: torch.Tensor  # [T, 1, D]
    sin: torch.Tensor
    block_cos: torch.Tensor  # [ceil((start+T) / d), 1, D]
    block_sin: torch.Tensor
    start: int

    @staticmethod
    def of(cfg: ModelConfig, start: int, T: int, device: torch.device | str, dtype: torch.dtype) -> Rope:
        """For positions start .. start+T-1, fp32 (fp64 where dtype is fp64)."""
        end = start + T
        # Lengths in powers of two: a sequence that grows by a token at a time must not bring a table a token.
        rows = 1 << max(end - 1, 255).bit_length()
        wide = torch.promote_types(dtype, torch.float32)
        cos, sin = _table(rows, cfg.d_k, cfg.rope_theta, cfg.rope_scale, torch.device(device), wide)
        step = cfg.nsa.d
        return Rope(cos[start:end], sin[start:end], cos[:end:step], sin[:end:step], start)

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate x [B,T,heads,D], the tokens."""
        return rotate(x, self.cos, self.sin)

    def blocks(self, x: torch.Tensor, first: int) -> torch.Tensor:
        """Rotate x [B,n,heads,D], the compressed keys from block `first` on, each at its block's start."""
        rows = slice(first, first + x.shape[1])
        return rotate(x, self.block_cos[rows], self.block_sin[rows])


@lru_cache(maxsize=8)
def _table(
    rows: int, dim: int, theta: float, scale: float, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [rows,1,dim] of positions 0 .. rows-1."""
    # It outlives the mode that the first caller runs in.
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
        # In fp64: at position 65,536 an fp32 product is already off by thousandths of a radian.
        positions = torch.arange(rows, device=device, dtype=torch.float64) / scale
        frequencies = theta ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float64) / dim)
        angles = positions[:, None, None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)
