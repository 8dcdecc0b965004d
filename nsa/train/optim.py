"""AdamW's two groups of parameters, and the learning rate over optimizer steps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from nsa.train.config import LoopConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices that multiply activations decay; norms, biases and embeddings (also tied, also of positions) do not."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    decay: list[nn.Parameter] = []
    keep: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        still = parameter.ndim < 2 or id(parameter) in embeddings or "position" in name.rpartition(".")[2]
        (keep if still else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": keep, "weight_decay": 0.0}]


def build_optimizer(
    model: nn.Module, cfg: LoopConfig, device: torch.device, *, fused: bool | None = None
) -> torch.optim.AdamW:
    """AdamW over the model's two groups; `fused` (default: on CUDA) updates all of a group in one kernel."""
    return torch.optim.AdamW(
        parameter_groups(model, cfg.weight_decay),
        lr=cfg.lr,
        betas=(cfg.beta1, cfg.beta2),
        fused=device.type == "cuda" if fused is None else fused,
    )


def restore(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put a saved state back. Whether the update is fused is this run's device's affair, not the checkpoint's."""
    groups = [{**group, "fused": optimizer.defaults["fused"]} for group in state["param_groups"]]
    optimizer.load_state_dict({**state, "param_groups": groups})


def lr_factor(step: int, cfg: LoopConfig) -> float:
    """Share of cfg.lr for optimizer step `step` (0 is the first): linear warmup, then constant or cosine.

    The cosine ends at min_lr_ratio on the last step.
    """
    if step < cfg.warmup_steps:
        return (step + 1) / cfg.warmup_steps
    if cfg.lr_schedule == "constant":
        return 1.0
    span = max(1, cfg.steps - 1 - cfg.warmup_steps)
    progress = min(1.0, (step - cfg.warmup_steps) / span)
    return cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def lr_at(step: int, cfg: LoopConfig) -> float:
    """The rate of optimizer step `step` (0 is the first): a function of the step alone, so nothing of it is saved."""
    return cfg.lr * lr_factor(step, cfg)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
