"""What a model's mathematics costs, and what a card could do: MFU is the first times tokens/s over the second."""

from __future__ import annotations

from functools import lru_cache

from nsa.blocks import Reads, reads_range
from nsa.config import ModelConfig

# Dense bf16 products with fp32 sums, FLOP/s, from the makers' data sheets; the first name that is part of the card's.
_PEAKS = (
    ("H200", 989.4e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989.4e12),
    ("A100", 312e12),
    ("4090", 165.2e12),
)


def flops_per_token(cfg: ModelConfig, S: int) -> float:
    """Floating point operations that training on sequences of S tokens takes per token: 3 x forward.

    Forward is 2 * (weights that multiply activations, the head's among them) + the attention of every layer,

        2 * H * (Dk + Dv) * keys,   keys = (S + 1) / 2 a query where attention is dense,

    and for NSA the mean over the queries of what its branches read: compressed blocks (about S/d/2), tokens of chosen
    blocks (at most n_sel * l_sel, fewer while the sequence is short) and of the window; all as `nsa.blocks.reads`.
    NSA's choice adds 2 * H * Dk for every compressed block read, which has no backward and counts once. Norms,
    rotation, gates' products and softmax count nothing, nor does anything computed twice.
    """
    H, Dk, Dv = cfg.n_heads, cfg.d_k, cfg.d_v
    keys, scores = (S + 1) / 2, 0.0
    if cfg.attention == "nsa":
        read = _reads(cfg, S)
        keys, scores = read.total / S, read.cmp / S
    attention = 2 * H * (Dk + Dv) * keys
    forward = 2 * (cfg.n_layers * _weights(cfg) + cfg.vocab_size * cfg.dim) + cfg.n_layers * attention
    return 3 * forward + cfg.n_layers * 2 * H * Dk * scores


@lru_cache(maxsize=64)
def _reads(cfg: ModelConfig, S: int) -> Reads:
    return reads_range(0, S, cfg.nsa)


def _weights(cfg: ModelConfig) -> float:
    """Of one layer, per token; phi's work is done once in d tokens for every group."""
    H, G, Dk, Dv, nsa = cfg.n_heads, cfg.n_kv_groups, cfg.d_k, cfg.d_v, cfg.nsa
    ffn, out = 3 * cfg.dim * cfg.hidden_dim, cfg.dim * H * Dv
    if cfg.attention == "dense":
        return ffn + out + cfg.dim * (H * Dk + G * (Dk + Dv))
    branches = 1 if nsa.shared_kv else 3
    phi = {"avg": 0, "linear": nsa.l, "mlp": nsa.l + 1}[nsa.phi] * (Dk**2 + Dv**2) * G / nsa.d
    return ffn + out + cfg.dim * (H * Dk + branches * G * (Dk + Dv) + 3 * H) + phi


def peak_flops(device_name: str) -> float | None:
    """bf16 FLOP/s of a card by its name, as torch.cuda.get_device_name gives it; None for one that is not known."""
    return next((peak for name, peak in _PEAKS if name in device_name), None)
