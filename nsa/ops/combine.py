"""The gated sum of the branches (Eq. 5)."""

from __future__ import annotations

import torch

from nsa.config import NSAConfig


def gates(logits: torch.Tensor, cfg: NSAConfig) -> torch.Tensor:
    """Gate logits [B,T,H,3] (cmp, sel, win) -> gates [B,T,H,3]: a sigmoid each, or a softmax over the three."""
    return logits.sigmoid() if cfg.gate == "sigmoid" else logits.softmax(-1)


def apply_gate(out: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """Scale a branch's output [B,T,H,Dv] by its gate [B,T,H]; None leaves it as it is."""
    return out if gate is None else out * gate.unsqueeze(-1).to(out.dtype)


def combine(cmp: torch.Tensor, sel: torch.Tensor, win: torch.Tensor) -> torch.Tensor:
    """Sum of the three gated branch outputs [B,T,H,Dv], in this order."""
    return cmp + sel + win
