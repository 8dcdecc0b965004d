"""Rotary position embedding, half-split pairs, each head by itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nsa.config import ModelConfig


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [B,T,heads,D] by the tables [T,1,D] of `_angles`."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of head dim D for the T positions from `start` on, angle position / scale * theta^(-2i/D).

    A pair's cosine stands in both halves of a row; its sine too, negative in the first.
    """

    cos: torch.Tensor  # [T, 1, D]
    sin: torch.Tensor
    start: int
    theta: float
    scale: float

    @staticmethod
    def of(cfg: ModelConfig, start: int, T: int, device: torch.device, dtype: torch.dtype) -> Rope:
        """Tables for positions start .. start+T-1, fp32 (fp64 where dtype is fp64)."""
        cos, sin = _angles(start, 1, T, cfg.d_k, cfg.rope_theta, cfg.rope_scale, device, dtype)
        return Rope(cos, sin, start, cfg.rope_theta, cfg.rope_scale)

    def covers(self, start: int, T: int, x: torch.Tensor) -> bool:
        """Whether it has the T positions from `start` on, on x's device and in the type of x's tables."""
        fits = self.cos.device == x.device and self.cos.dtype == torch.promote_types(x.dtype, torch.float32)
        return fits and self.start <= start and start + T <= self.start + len(self.cos)

    def part(self, start: int, T: int) -> Rope:
        """The T positions from `start` on, of those that this one has."""
        rows = slice(start - self.start, start - self.start + T)
        return Rope(self.cos[rows], self.sin[rows], start, self.theta, self.scale)

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate x [B,T,heads,D] at this rope's own positions."""
        return rotate(x, self.cos, self.sin)

    def strided(self, x: torch.Tensor, first: int, step: int) -> torch.Tensor:
        """Rotate x [B,n,heads,D] at positions first, first + step, ..."""
        n, D = x.shape[1], x.shape[3]
        return rotate(x, *_angles(first, step, n, D, self.theta, self.scale, x.device, self.cos.dtype))


def _angles(
    first: int, step: int, n: int, dim: int, theta: float, scale: float, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    # In fp64: at position 65,536 an fp32 product is already off by thousandths of a radian.
    positions = (torch.arange(n, device=device, dtype=torch.float64) * step + first) / scale
    frequencies = theta ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float64) / dim)
    angles = positions[:, None, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    table = torch.promote_types(dtype, torch.float32)
    return torch.cat([cos, cos], -1).to(table), torch.cat([-sin, sin], -1).to(table)
