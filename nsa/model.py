"""A decoder-only transformer over NSA layers or their dense twins: RMSNorm, attention, SwiGLU, tied embeddings; how it
generates, and how its blocks are compiled."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import checkpoint

from nsa.attention import DenseAttention, NativeSparseAttention
from nsa.cache import KVCache, LayerCache
from nsa.config import ModelConfig
from nsa.ops.linear_cross_entropy import linear_cross_entropy, padded_linear
from nsa.rope import Rope

_TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
_NEVER = (99, 0)
# Cards, as 90 for sm_90, and the oldest torch where compiled blocks were measured.
_COMPILED = {90: (2, 11)}


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B,T,dim]
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(cfg.dim, eps=cfg.norm_eps)
        self.attention = NativeSparseAttention(cfg) if cfg.attention == "nsa" else DenseAttention(cfg)
        self.ffn_norm = nn.RMSNorm(cfg.dim, eps=cfg.norm_eps)
        self.ffn = SwiGLU(cfg.dim, cfg.hidden_dim)

    def forward(self, x: torch.Tensor, rope: Rope, cache: LayerCache | None = None) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), rope, cache)
        return x + self.ffn(self.ffn_norm(x))


class Transformer(nn.Module):
    """Tokens to logits. Weights are fp32; bf16 is torch.autocast's business.

    `gradient_checkpointing` recomputes each block's activations in the backward, all but the block choice: the
    gradient must flow through the blocks that the forward chose. `compile_blocks` puts compiled forms in the place of
    `run_block` and `run_norm`.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.gradient_checkpointing = False
        self.run_block, self.run_norm = _run_block, _run_norm
        self.embed = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.norm = nn.RMSNorm(cfg.dim, eps=cfg.norm_eps)
        self.head = nn.Linear(cfg.dim, cfg.vocab_size, bias=False)
        self._init_weights()
        if cfg.tie_embeddings:
            self.head.weight = self.embed.weight

    def _init_weights(self) -> None:
        """Normal(0.02); projections into the residual stream scaled by 1/sqrt(2 * layers), as GPT-2's."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                residual = name.endswith(("o_proj", "down"))
                nn.init.normal_(module.weight, std=0.02 / (2 * self.cfg.n_layers) ** 0.5 if residual else 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def hidden(self, ids: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """ids [B,T] int64 -> final normalised states [B,T,dim]; with a cache the ids follow what it holds."""
        if ids.dim() != 2 or not ids.numel():
            raise ValueError(f"ids have shape {tuple(ids.shape)}; expected [B, T] with at least one row and one token")
        if cache is not None:
            cache.check_fits(self.cfg, len(ids))
        x = self.embed(ids)
        rope = Rope.of(self.cfg, 0 if cache is None else cache.length, ids.shape[1], ids.device, x.dtype)
        for i, block in enumerate(self.blocks):
            if cache is not None:
                x = block(x, rope, cache.layers[i])
            else:
                x = self.run_block(block, x, rope, self.gradient_checkpointing and torch.is_grad_enabled())
        return self.norm(x) if cache is not None else self.run_norm(self.norm, x)

    def forward(self, ids: torch.Tensor, cache: KVCache | None = None, last_only: bool = False) -> torch.Tensor:
        """ids [B,T] int64 -> logits [B,T,V], or [B,1,V] of the last position."""
        x = self.hidden(ids, cache)
        return padded_linear(x[:, -1:] if last_only else x, self.head.weight)

    def loss(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy (nats, at least fp32) of targets [B,T] given ids [B,T]; targets of -100 do not count."""
        x, y = self.hidden(ids).flatten(0, 1), targets.flatten()
        return linear_cross_entropy(x, self.head.weight, y) / (y != -100).sum().clamp(min=1)

    @torch.no_grad()
    def generate(
        self,
        ids: torch.Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Continue ids [B,T] by max_new_tokens: greedily at temperature 0, else by sampling -> [B,T+max_new_tokens]."""
        if max_new_tokens < 0 or not temperature >= 0:
            raise ValueError(f"max_new_tokens = {max_new_tokens}, temperature = {temperature}: neither may be below 0")
        dtype = (
            torch.get_autocast_dtype(ids.device.type)
            if torch.is_autocast_enabled(ids.device.type)
            else self.embed.weight.dtype
        )
        cache = KVCache(self.cfg, len(ids), ids.shape[1] + max_new_tokens, device=ids.device, dtype=dtype)
        step = ids
        for _ in range(max_new_tokens):
            logits = self(step, cache, last_only=True)[:, -1].float()
            if temperature > 0:
                step = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            else:
                step = logits.argmax(-1, keepdim=True)
            ids = torch.cat([ids, step], dim=1)
        return ids


def _run_block(block: nn.Module, x: torch.Tensor, rope: Rope, checkpointing: bool) -> torch.Tensor:
    if checkpointing:
        return checkpoint.checkpoint(block, x, rope, use_reentrant=False, context_fn=_keep_block_choice)
    return block(x, rope)


def _run_norm(norm: nn.RMSNorm, x: torch.Tensor) -> torch.Tensor:
    return norm(x)


def compile_blocks(
    model: Transformer, mode: Literal["auto", "on"] = "auto", *, backend: str | Callable[..., Any] = "inductor"
) -> str | None:
    """Run every block, and the last norm, compiled from now on; returns None, or in one line why they stay eager.

    One block is compiled for each shape, and serves all layers: their weights are its inputs. A model with a cache
    stays eager. `auto` compiles on a GPU where that was measured, `on` wherever the compiler works.
    """
    reason = _eager_by_default(model.embed.weight.device) if mode == "auto" else None
    reason = reason or _no_compiler(model.embed.weight.device, backend)
    if reason is None:
        # It would cut a block at the edges of DDP's buckets. A block is small, and gradients leave it layer by layer.
        torch._dynamo.config.optimize_ddp = False
        model.run_block = torch.compile(_run_block, dynamic=False, backend=backend)
        model.run_norm = torch.compile(_run_norm, dynamic=False, backend=backend)
    return reason


def _eager_by_default(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "blocks are compiled by default on CUDA alone"
    major, minor = torch.cuda.get_device_capability(device)
    if _COMPILED.get(10 * major + minor, _NEVER) <= _TORCH:
        return None
    return f"compiled blocks are not measured on sm_{major}{minor} with torch {torch.__version__}"


def _no_compiler(device: torch.device, backend: str | Callable[..., Any]) -> str | None:
    """Why nothing can be compiled here, as a small function of the same device finds out; None if it can."""
    if _TORCH < (2, 5):
        return f"torch {torch.__version__} compiles each layer anew: blocks need 2.5"
    try:
        torch.compile(lambda x: 2 * x + 1, dynamic=False, backend=backend)(torch.zeros(64, device=device))
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = next((line for line in lines if not line.endswith(":")), type(error).__name__)
        return f"torch.compile does not work here: {said}"
    return None


def _keep_block_choice() -> Any:
    """Selective checkpointing: save what the core of a layer gives, its branches' outputs too, so that nothing of it is
    computed or chosen twice; recompute the rest."""

    def kept(op: Any) -> bool:
        return op is torch.ops.nsa.attention.default

    if not hasattr(checkpoint, "create_selective_checkpoint_contexts"):  # torch 2.4 has it under a private name
        contexts = vars(checkpoint)["_pt2_selective_checkpoint_context_fn_gen"]
        return contexts(lambda _mode, op, *_args, **_kwargs: kept(op))

    def policy(_ctx: Any, op: Any, *_args: Any, **_kwargs: Any) -> checkpoint.CheckpointPolicy:
        return checkpoint.CheckpointPolicy.MUST_SAVE if kept(op) else checkpoint.CheckpointPolicy.PREFER_RECOMPUTE

    return checkpoint.create_selective_checkpoint_contexts(policy)
