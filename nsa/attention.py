"""The NSA layer: project, rotate, three branches, gate, project (arXiv 2502.11089, Figure 2)."""

from __future__ import annotations

import torch
from torch import nn

from nsa.blocks import n_compressed
from nsa.cache import LayerCache
from nsa.config import ModelConfig
from nsa.ops.attention import sparse_attention
from nsa.ops.compress import compress, make_phi
from nsa.rope import Rope


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

    def forward(self, x: torch.Tensor, rope: Rope, cache: LayerCache | None = None) -> torch.Tensor:
        """x [B,T,dim], the T tokens at rope's positions -> [B,T,dim].

        Without a cache they are the whole sequence; with one they follow its `length` positions and are added to it.
        """
        cfg, nsa = self.cfg, self.cfg.nsa
        B, T, _ = x.shape
        if cache is not None:
            cache.check_room(T)
        q = rope.tokens(self.q_proj(x).view(B, T, cfg.n_heads, cfg.d_k))
        k_raw, k_sel, k_win = self._keys(x, rope)
        v_raw, v_sel, v_win = self._values(x)

        if cache is None:
            S, reads = T, None
            k_cmp, v_cmp = self._compress(k_raw, v_raw, rope, 0)
        else:
            S, reads = cache.length + T, cache.reads
            k_cmp, v_cmp = self._compress_onto(cache, k_raw, v_raw, rope)
            k_sel, v_sel = cache.sel.write(cache.length, k_sel, v_sel)
            k_win, v_win = cache.win.append(k_win, v_win)
            cache.length = S

        logits = self.gate_proj(x).view(B, T, cfg.n_heads, 3)
        out = sparse_attention(q, (k_cmp, v_cmp), (k_sel, v_sel), (k_win, v_win), logits, nsa, seq_len=S, reads=reads)
        return self.o_proj(out.flatten(2))

    def _keys(self, x: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, ...]:
        """x [B,T,dim] -> the keys of cmp, not rotated, and those of sel and win, rotated; each [B,T,G,Dk]."""
        G, keys = self.cfg.n_kv_groups, self.k_proj(x).unflatten(-1, (-1, self.cfg.d_k))
        if self.cfg.nsa.shared_kv:
            rotated = rope.tokens(keys)
            return keys, rotated, rotated
        return keys[:, :, :G], *rope.tokens(keys[:, :, G:]).split(G, 2)

    def _values(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x [B,T,dim] -> the values of cmp, sel, win; each [B,T,G,Dv]."""
        values = self.v_proj(x).unflatten(-1, (-1, self.cfg.d_v))
        return (values,) * 3 if self.cfg.nsa.shared_kv else values.split(self.cfg.n_kv_groups, 2)

    def _compress(
        self, k_raw: torch.Tensor, v_raw: torch.Tensor, rope: Rope, first: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compress raw rows that begin with block `first`; the compressed key is rotated at its block's start."""
        nsa = self.cfg.nsa
        k_cmp = rope.strided(compress(k_raw, self.phi_k, nsa), first * nsa.d, nsa.d)
        return k_cmp, compress(v_raw, self.phi_v, nsa)

    def _compress_onto(
        self, cache: LayerCache, k_raw: torch.Tensor, v_raw: torch.Tensor, rope: Rope
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compress the blocks that these rows complete, and add them to the cache."""
        T = k_raw.shape[1]
        first = n_compressed(cache.length, self.cfg.nsa)
        k_raw, v_raw = cache.tail.append(k_raw, v_raw)
        if n_compressed(cache.length + T, self.cfg.nsa) == first:  # as on d - 1 of d decode steps
            return cache.cmp.k[:, :first], cache.cmp.v[:, :first]
        skip = first * self.cfg.nsa.d - (cache.length + T - k_raw.shape[1])
        return cache.cmp.write(first, *self._compress(k_raw[:, skip:], v_raw[:, skip:], rope, first))
