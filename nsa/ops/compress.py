"""phi (Eq. 7): the tokens of a compression block become one key or value."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from nsa.config import NSAConfig


class MeanPhi(nn.Module):
    """phi = the mean of the block."""

    def forward(self, blocks: torch.Tensor) -> torch.Tensor:  # [..., l, D] -> [..., D]
        return blocks.mean(-2)


class LinearPhi(nn.Module):
    """phi = one linear map of the block laid flat; starts as the mean."""

    def __init__(self, l: int, dim: int) -> None:  # noqa: E741
        super().__init__()
        self.weight = nn.Parameter(torch.eye(dim).repeat(l, 1) / l)  # [l*D, D]

    def forward(self, blocks: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(blocks.flatten(-2), self.weight.t())


class MlpPhi(nn.Module):
    """phi = the paper's MLP: position embedding within the block, Linear(l*D, D), GELU, Linear(D, D)."""

    def __init__(self, l: int, dim: int) -> None:  # noqa: E741
        super().__init__()
        self.position = nn.Parameter(0.02 * torch.randn(l, dim))
        self.inner = nn.Linear(l * dim, dim)
        self.outer = nn.Linear(dim, dim)

    def forward(self, blocks: torch.Tensor) -> torch.Tensor:
        return self.outer(nn.functional.gelu(self.inner((blocks + self.position).flatten(-2))))


def make_phi(cfg: NSAConfig, dim: int) -> nn.Module:
    """The phi that cfg names, for head dim `dim`; shared by the groups."""
    if cfg.phi == "avg":
        return MeanPhi()
    return LinearPhi(cfg.l, dim) if cfg.phi == "linear" else MlpPhi(cfg.l, dim)


def compress(x: torch.Tensor, phi: Callable[[torch.Tensor], torch.Tensor], cfg: NSAConfig) -> torch.Tensor:
    """Compress whole blocks of keys or values (Eq. 7): x [B,S,G,D] -> [B,C,G,D], C = n_compressed(S).

    Keys come un-rotated; the caller rotates the compressed key j at position j*d. With S < l there is no block and
    the result is empty, yet still a function of phi's parameters.
    """
    B, S, G, D = x.shape
    if cfg.l > S:
        return phi(x.new_empty(B, 0, G, cfg.l, D))
    if isinstance(phi, MeanPhi):
        return _means(x, cfg.l, cfg.d)
    return phi(x.unfold(1, cfg.l, cfg.d).transpose(-1, -2))  # [B,C,G,l,D]


def _means(x: torch.Tensor, l: int, d: int) -> torch.Tensor:  # noqa: E741
    """The mean of every block, summed in at least fp32: d tokens at a time, then l/d neighbouring sums. Blocks overlap,
    and the gradient of `unfold` is one more tensor of x's size, filled and added into."""
    blocks = (x.shape[1] - l) // d + 1
    pieces = blocks - 1 + l // d
    whole = x if pieces * d == x.shape[1] else x[:, : pieces * d]
    sums = whole.unflatten(1, (pieces, d)).sum(2, dtype=torch.promote_types(x.dtype, torch.float32))  # [B,pieces,G,D]
    total = sums[:, :blocks]
    for first in range(1, l // d):
        total = total + sums[:, first : first + blocks]
    return (total / l).to(x.dtype)
