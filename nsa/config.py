"""What a Native Sparse Attention layer and model are made of: plain frozen dataclasses, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from nsa.blocks import Pattern

PHIS = ("avg", "linear", "mlp")
GATES = ("sigmoid", "softmax")
ATTENTIONS = ("nsa", "dense")


@dataclass(frozen=True)
class NSAConfig:
    """The sparse pattern (arXiv 2502.11089, section 3). Lengths are in tokens, counts in blocks.

    l, d          compression block length and stride (Eq. 7); d divides l
    l_sel         selection block length l' (Eq. 9); d divides l_sel
    n_sel         selected blocks a query, the forced ones included (Eq. 11)
    w             sliding window, the query's own token included
    init_blocks   always selected at the start of the sequence
    local_blocks  always selected at the query: its own block and the ones before it
    phi           compression: mean, one linear map, or the paper's MLP with position embedding
    gate          a sigmoid per branch (Eq. 5), or a softmax over the three
    shared_kv     one K and V projection for all branches instead of one each (3.3.3)

    Raises ValueError naming the numbers that do not fit together.
    """

    l: int = 32  # noqa: E741 - the paper's symbol
    d: int = 16
    l_sel: int = 64
    n_sel: int = 16
    w: int = 512
    init_blocks: int = 1
    local_blocks: int = 2
    phi: Literal["avg", "linear", "mlp"] = "avg"
    gate: Literal["sigmoid", "softmax"] = "sigmoid"
    shared_kv: bool = False

    def __post_init__(self) -> None:
        for name, least in (("l", 1), ("d", 1), ("l_sel", 1), ("w", 1), ("init_blocks", 0), ("local_blocks", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"nsa.{name} = {getattr(self, name)}: must be at least {least}")
        if self.l % self.d:
            raise ValueError(f"nsa.l = {self.l} is not a multiple of the stride nsa.d = {self.d}; change one of them")
        if self.l_sel % self.d:
            raise ValueError(
                f"nsa.l_sel = {self.l_sel} is not a multiple of the stride nsa.d = {self.d}; change one of them"
            )
        forced = self.init_blocks + self.local_blocks
        if self.n_sel < forced:
            raise ValueError(
                f"nsa.n_sel = {self.n_sel} is below the {forced} forced blocks "
                f"(init_blocks {self.init_blocks} + local_blocks {self.local_blocks}); raise n_sel"
            )
        if self.phi not in PHIS:
            raise ValueError(f"nsa.phi = {self.phi!r}: choose one of {', '.join(PHIS)}")
        if self.gate not in GATES:
            raise ValueError(f"nsa.gate = {self.gate!r}: choose one of {', '.join(GATES)}")

    @property
    def pattern(self) -> Pattern:
        """The numbers alone, without phi, gate and projections."""
        return Pattern(self.l, self.d, self.l_sel, self.n_sel, self.w, self.init_blocks, self.local_blocks)


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Raises ValueError naming what does not fit.

    attention is NSA, or dense: the twin to compare it with, the same model with causal softmax attention over one K and
    V projection, to which the sparse pattern `nsa` does not apply.
    n_heads H query heads share n_kv_groups G key/value heads; d_k and d_v are head dims; ffn_dim defaults to
    3 * dim (SwiGLU); rope_scale divides positions (linear interpolation).
    """

    vocab_size: int = 256
    dim: int = 128
    n_layers: int = 1
    n_heads: int = 8
    n_kv_groups: int = 2
    d_k: int = 16
    d_v: int = 16
    ffn_dim: int | None = None
    rope_theta: float = 10_000.0
    rope_scale: float = 1.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    attention: Literal["nsa", "dense"] = "nsa"
    nsa: NSAConfig = field(default_factory=NSAConfig)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_groups", "d_k", "d_v"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} = {getattr(self, name)}: must be at least 1")
        if self.ffn_dim is not None and self.ffn_dim < 1:
            raise ValueError(f"model.ffn_dim = {self.ffn_dim}: must be at least 1, or None for 3 * dim")
        if self.n_heads % self.n_kv_groups:
            raise ValueError(
                f"model.n_heads = {self.n_heads} is not a multiple of model.n_kv_groups = {self.n_kv_groups}; "
                "every group needs the same number of heads"
            )
        if self.d_k % 2:
            raise ValueError(f"model.d_k = {self.d_k} is odd; rotary embedding turns pairs, choose an even d_k")
        for name in ("rope_theta", "rope_scale", "norm_eps"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"model.{name} = {getattr(self, name)}: must be a positive number")
        if self.attention not in ATTENTIONS:
            raise ValueError(f"model.attention = {self.attention!r}: choose one of {', '.join(ATTENTIONS)}")
        if self.attention == "dense":
            for key in fields(NSAConfig):
                if (value := getattr(self.nsa, key.name)) != key.default:
                    raise ValueError(
                        f"nsa.{key.name} = {value!r}: model.attention = dense has no sparse pattern; "
                        "leave the nsa section out, or choose model.attention = nsa"
                    )

    @property
    def hidden_dim(self) -> int:
        """Width of the SwiGLU."""
        return 3 * self.dim if self.ffn_dim is None else self.ffn_dim
