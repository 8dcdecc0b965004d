"""The attention layers: project, rotate, attend, project.

NSA has three branches and gates (arXiv 2502.11089, Figure 2); its dense twin is causal softmax attention.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsa.blocks import n_compressed
from nsa.cache import DenseCache, SparseCache
from nsa.config import ModelConfig
from nsa.ops.attention import sparse_attention
from nsa.ops.compress import compress, make_phi
from nsa.rope import Rope

# Columns of the one product are a multiple of this, so that every row of its result begins at an aligned address.
_COLUMNS = 64
_TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
# cuDNN was measured ahead of FA-2 on sm_90; the others where it cannot run.
_DENSE = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def project(x: torch.Tensor, layers: Sequence[nn.Linear], widths: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """The products of x [B,T,dim] with several linear maps, as one: views [B,T,width] of the maps' columns laid side by
    side and cut into `widths`, biases left out.

    The parameters stay separate; what is joined is made for one call. For training, where it costs as much as the maps
    hold and saves the launches of three products each way. A decode step would read and write every weight once more
    for it, and what is kept between steps goes stale when weights are loaded or cast: there each map is called alone.
    """
    weights = [layer.weight for layer in layers]
    missing = -sum(widths) % _COLUMNS
    if missing:
        weights.append(weights[0].new_zeros(missing, x.shape[-1]))
    return F.linear(x, torch.cat(weights)).split([*widths, missing], -1)[: len(widths)]


class NativeSparseAttention(nn.Module):
    """Compressed, selected and sliding-window attention over one projection of queries, summed by learned gates.

    Weights: q_proj [H*Dk, dim]; k_proj [3*G*Dk, dim] and v_proj [3*G*Dv, dim], rows ordered branch (cmp, sel, win),
    group, dim (one branch's worth with shared_kv); phi_k, phi_v; gate_proj [3*H, dim] with bias, rows ordered head,
    branch; o_proj [dim, H*Dv].
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        branches = 1 if cfg.nsa.shared_kv else 3
        self.q_proj = nn.Linear(cfg.dim, cfg.n_heads * cfg.d_k, bias=False)
        self.k_proj = nn.Linear(cfg.dim, branches * cfg.n_kv_groups * cfg.d_k, bias=False)
        self.v_proj = nn.Linear(cfg.dim, branches * cfg.n_kv_groups * cfg.d_v, bias=False)
        self.phi_k = make_phi(cfg.nsa, cfg.d_k)
        self.phi_v = make_phi(cfg.nsa, cfg.d_v)
        self.gate_proj = nn.Linear(cfg.dim, 3 * cfg.n_heads)
        self.o_proj = nn.Linear(cfg.n_heads * cfg.d_v, cfg.dim, bias=False)

    def forward(self, x: torch.Tensor, rope: Rope, cache: SparseCache | None = None) -> torch.Tensor:
        """x [B,T,dim], the T tokens at rope's positions -> [B,T,dim].

        Without a cache they are the whole sequence; with one they follow its `length` positions and are added to it.
        """
        nsa, T = self.cfg.nsa, x.shape[1]
        if cache is not None:
            cache.check_room(T)
        q, keys, values, logits = self._projected(x, alone=cache is not None)
        q, (k_raw, k_sel, k_win) = rope.tokens(q), self._rotated(keys, rope)
        v_raw, v_sel, v_win = values if len(values) == 3 else values * 3

        if cache is None:
            S, reads = T, None
            k_cmp, v_cmp = self._compress(k_raw, v_raw, rope, 0)
        else:
            S, reads = cache.length + T, cache.reads
            k_cmp, v_cmp = self._compress_onto(cache, k_raw, v_raw, rope)
            k_sel, v_sel = cache.sel.write(cache.length, k_sel, v_sel)
            k_win, v_win = cache.win.append(k_win, v_win)
            cache.length = S

        out = sparse_attention(q, (k_cmp, v_cmp), (k_sel, v_sel), (k_win, v_win), logits, nsa, seq_len=S, reads=reads)
        return self.o_proj(out.flatten(2))

    def _projected(
        self, x: torch.Tensor, *, alone: bool
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...], torch.Tensor]:
        """x [B,T,dim] -> q [B,T,H,Dk]; keys, cmp's [B,T,G,Dk] and those of sel and win as one [B,T,2G,Dk] (all one with
        shared_kv); values of cmp, sel, win (one with shared_kv), each [B,T,G,Dv]; gate logits [B,T,H,3]."""
        H, G, Dk, Dv = self.cfg.n_heads, self.cfg.n_kv_groups, self.cfg.d_k, self.cfg.d_v
        shared = self.cfg.nsa.shared_kv
        k_widths, v_widths = ([G * Dk], [G * Dv]) if shared else ([G * Dk, 2 * G * Dk], [G * Dv] * 3)
        if alone:
            q, logits = self.q_proj(x), self.gate_proj(x)
            keys, values = self.k_proj(x).split(k_widths, -1), self.v_proj(x).split(v_widths, -1)
        else:
            maps = (self.q_proj, self.k_proj, self.v_proj, self.gate_proj)
            q, *parts, logits = project(x, maps, [H * Dk, *k_widths, *v_widths, 3 * H])
            keys, values = tuple(parts[: len(k_widths)]), tuple(parts[len(k_widths) :])
            logits = logits + self.gate_proj.bias.to(logits.dtype)
        return (
            q.unflatten(-1, (H, Dk)),
            tuple(k.unflatten(-1, (-1, Dk)) for k in keys),
            tuple(v.unflatten(-1, (-1, Dv)) for v in values),
            logits.unflatten(-1, (H, 3)),
        )

    def _rotated(self, keys: tuple[torch.Tensor, ...], rope: Rope) -> tuple[torch.Tensor, ...]:
        """The keys of cmp, not rotated, and those of sel and win, rotated; each [B,T,G,Dk]."""
        if len(keys) == 1:
            rotated = rope.tokens(keys[0])
            return keys[0], rotated, rotated
        return keys[0], *rope.tokens(keys[1]).split(self.cfg.n_kv_groups, 2)

    def _compress(
        self, k_raw: torch.Tensor, v_raw: torch.Tensor, rope: Rope, first: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compress raw rows that begin with block `first`; the compressed key is rotated at its block's start."""
        nsa = self.cfg.nsa
        return rope.blocks(compress(k_raw, self.phi_k, nsa), first), compress(v_raw, self.phi_v, nsa)

    def _compress_onto(
        self, cache: SparseCache, k_raw: torch.Tensor, v_raw: torch.Tensor, rope: Rope
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compress the blocks that these rows complete, and add them to the cache."""
        T = k_raw.shape[1]
        first = n_compressed(cache.length, self.cfg.nsa)
        k_raw, v_raw = cache.tail.append(k_raw, v_raw)
        if n_compressed(cache.length + T, self.cfg.nsa) == first:  # as on d - 1 of d decode steps
            return cache.cmp.k[:, :first], cache.cmp.v[:, :first]
        skip = first * self.cfg.nsa.d - (cache.length + T - k_raw.shape[1])
        return cache.cmp.write(first, *self._compress(k_raw[:, skip:], v_raw[:, skip:], rope, first))


class DenseAttention(nn.Module):
    """Causal softmax attention, for comparison: q_proj [H*Dk, dim], k_proj [G*Dk, dim], v_proj [G*Dv, dim], o_proj
    [dim, H*Dv]; no compression, no gates."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.q_proj = nn.Linear(cfg.dim, cfg.n_heads * cfg.d_k, bias=False)
        self.k_proj = nn.Linear(cfg.dim, cfg.n_kv_groups * cfg.d_k, bias=False)
        self.v_proj = nn.Linear(cfg.dim, cfg.n_kv_groups * cfg.d_v, bias=False)
        self.o_proj = nn.Linear(cfg.n_heads * cfg.d_v, cfg.dim, bias=False)

    def forward(self, x: torch.Tensor, rope: Rope, cache: DenseCache | None = None) -> torch.Tensor:
        """x [B,T,dim], the T tokens at rope's positions -> [B,T,dim]; with a cache they follow what it holds."""
        maps, T = (self.q_proj, self.k_proj, self.v_proj), x.shape[1]
        if cache is None:
            q, k, v = project(x, maps, [layer.out_features for layer in maps])
        else:
            cache.check_room(T)
            q, k, v = (layer(x) for layer in maps)
        q, k = (rope.tokens(y.unflatten(-1, (-1, self.cfg.d_k))) for y in (q, k))
        v = v.unflatten(-1, (-1, self.cfg.d_v))
        if cache is not None:
            k, v = cache.kv.write(cache.length, k, v)
            cache.length += T
        return self.o_proj(causal_attention(q, k, v).flatten(2))


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Softmax attention of q [B,T,H,Dk], the last T of S positions, to k [B,S,G,Dk] and v [B,S,G,Dv] up to each query's
    own position -> [B,T,H,Dv]. torch's operators, none of which copies its operands where T is S or 1."""
    T, S, H, G = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if T == S:
        return _square(q, k, v).transpose(1, 2)
    if T == 1:  # nothing is masked, and the heads of a group can stand as rows: no key is read twice
        return F.scaled_dot_product_attention(q.reshape(len(q), G, H // G, -1), k, v).reshape(len(q), 1, H, -1)
    # `is_causal` would align the triangle with the first key, not with the last.
    visible = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    k, v = (x.repeat_interleave(H // G, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2)


def _square(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q [B,H,S,Dk], k [B,G,S,Dk], v [B,G,S,Dv] -> [B,H,S,Dv], the whole sequence at once."""
    if _TORCH < (2, 5):  # every head wants a key of its own there
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if not q.is_cuda or _TORCH < (2, 6):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    with sdpa_kernel(_DENSE, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
