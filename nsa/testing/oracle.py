"""The specification as plain loops over tokens, differentiable, sharing nothing with the code that it judges.

Every question ("which tokens does block j cover", "which may query t see") is answered by listing tokens, never by the
arithmetic of `nsa.blocks`. Made for fp64 and up to about two hundred tokens. The T queries are the last T of the S
positions; `seq_len` is S, or one S for each batch row. `Seen[b][t][g]` lists the keys that a query may attend to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nsa.config import NSAConfig

Seen = list[list[list[list[int]]]]
SeqLen = int | Sequence[int] | Tensor
Phi = Callable[[Tensor], Tensor]


def _lengths(seq_len: SeqLen, batch: int) -> list[int]:
    return [seq_len] * batch if isinstance(seq_len, int) else [int(S) for S in seq_len]


def compressed_spans(S: int, cfg: NSAConfig) -> list[range]:
    """Tokens of each compressed block that is whole within S positions (Eq. 7)."""
    spans = []
    start = 0
    while start + cfg.l <= S:
        spans.append(range(start, start + cfg.l))
        start += cfg.d
    return spans


def selection_spans(S: int, cfg: NSAConfig) -> list[range]:
    """Tokens of each selection block that holds one of S positions (Eq. 9); the last may reach past S."""
    spans = []
    start = 0
    while start < S:
        spans.append(range(start, start + cfg.l_sel))
        start += cfg.l_sel
    return spans


def overlap(S: int, cfg: NSAConfig) -> list[list[float]]:
    """[M][C]: the tokens that selection block m and compressed block j share, in strides."""
    blocks = compressed_spans(S, cfg)
    return [[len(set(m) & set(j)) / cfg.d for j in blocks] for m in selection_spans(S, cfg)]


# phi: one block [l, D] -> [D]


def phi_avg() -> Phi:
    return lambda block: sum(block.unbind(0), torch.zeros_like(block[0])) / block.shape[0]


def phi_linear(weight: Tensor) -> Phi:
    """weight [l*D, D]: token-major rows."""
    return lambda block: torch.cat(list(block.unbind(0))) @ weight


def phi_mlp(pos: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Phi:
    """pos [l, D], w1 [D, l*D], b1 [D], w2 [D, D], b2 [D] (torch's Linear layout)."""

    def phi(block: Tensor) -> Tensor:
        hidden = w1 @ torch.cat(list((block + pos).unbind(0))) + b1
        gelu = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        return w2 @ gelu + b2

    return phi


def compress(x: Tensor, phi: Phi, cfg: NSAConfig) -> Tensor:
    """x [B,S,G,D] -> [B,C,G,D], each block by itself."""
    B, S, G, D = x.shape
    spans = compressed_spans(S, cfg)
    if not spans:
        return x.new_zeros(B, 0, G, D)
    rows = [
        torch.stack([torch.stack([phi(x[b, span.start : span.stop, g]) for g in range(G)]) for span in spans])
        for b in range(B)
    ]
    return torch.stack(rows)


def rotate(x: Tensor, positions: Sequence[int], theta: float, scale: float) -> Tensor:
    """RoPE of x [B,T,heads,D] at the positions: pair i, (x[i], x[i + D/2]), turns by p/scale * theta^(-2i/D)."""
    half = x.shape[-1] // 2
    turned = []
    for index, position in enumerate(positions):
        angles = [position / scale * theta ** (-2 * i / x.shape[-1]) for i in range(half)]
        angle = torch.tensor(angles, dtype=torch.float64, device=x.device)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        first, second = x[:, index, :, :half], x[:, index, :, half:]
        turned.append(torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1))
    return torch.stack(turned, dim=1) if turned else x


# Which keys a query may see


def seen_compressed(T: int, B: int, G: int, cfg: NSAConfig, seq_len: SeqLen) -> Seen:
    """Compressed blocks whose last token is not in the query's future."""

    def row(S: int, i: int) -> list[int]:
        t = S - T + i
        return [j for j, span in enumerate(compressed_spans(S, cfg)) if max(span) <= t]

    return [[[row(S, i)] * G for i in range(T)] for S in _lengths(seq_len, B)]


def seen_selected(blocks: Tensor, cfg: NSAConfig, seq_len: SeqLen) -> Seen:
    """Tokens up to the query in the blocks [B,T,G,N] listed for it; a negative slot lists nothing."""
    B, T, G, _ = blocks.shape

    def row(S: int, i: int, chosen: list[int]) -> list[int]:
        t = S - T + i
        spans = selection_spans(S, cfg)
        tokens = {s for m in chosen if m >= 0 for s in spans[m] if s <= t}
        return sorted(tokens)

    lists = blocks.tolist()
    lengths = _lengths(seq_len, B)
    return [[[row(lengths[b], i, lists[b][i][g]) for g in range(G)] for i in range(T)] for b in range(B)]


def seen_window(T: int, B: int, G: int, cfg: NSAConfig, seq_len: SeqLen) -> Seen:
    """The query's own token and the w - 1 before it."""

    def row(S: int, i: int) -> list[int]:
        t = S - T + i
        return [s for s in range(S) if s <= t and t - s < cfg.w]

    return [[[row(S, i)] * G for i in range(T)] for S in _lengths(seq_len, B)]


def count(seen: Seen) -> Tensor:
    """Keys read, int64 [B,G], summed over the queries."""
    return torch.tensor([[sum(len(row[g]) for row in rows) for g in range(len(rows[0]))] for rows in seen])


# Attention


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> tuple[Tensor, Tensor]:
    """One softmax a query and head over the keys it may see: q [B,T,H,Dk] -> out [B,T,H,Dv], lse [B,T,H].

    A query that sees nothing gives 0 and -inf.
    """
    B, T, H, Dk = q.shape
    G, Dv = k.shape[2], v.shape[3]
    outs, lses = [], []
    for b in range(B):
        for i in range(T):
            for g in range(G):
                heads = q[b, i, g * (H // G) : (g + 1) * (H // G)]  # [R,Dk]
                if not seen[b][i][g]:
                    outs.append(heads.sum(1, keepdim=True) * 0 + v.new_zeros(H // G, Dv))  # a function of q, yet 0
                    lses.append(q.new_full((H // G,), -torch.inf))
                    continue
                keys = torch.tensor(seen[b][i][g], dtype=torch.int64, device=q.device)
                scores = heads @ k[b, :, g].index_select(0, keys).T * Dk**-0.5  # [R,keys]
                lse = scores.logsumexp(1)
                outs.append((scores - lse[:, None]).exp() @ v[b, :, g].index_select(0, keys))
                lses.append(lse)
    return torch.stack(outs).view(B, T, H, Dv), torch.stack(lses).view(B, T, H)


def compressed_attention(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, cfg: NSAConfig, *, seq_len: SeqLen
) -> tuple[Tensor, Tensor]:
    """Eq. 7's branch: out [B,T,H,Dv], lse [B,T,H]."""
    return attend(q, k_cmp, v_cmp, seen_compressed(q.shape[1], q.shape[0], k_cmp.shape[2], cfg, seq_len))


def selected_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, cfg: NSAConfig, *, seq_len: SeqLen | None = None
) -> Tensor:
    """The selected branch on a given list of blocks."""
    return attend(q, k, v, seen_selected(blocks, cfg, k.shape[1] if seq_len is None else seq_len))[0]


def sliding_window_attention(
    q: Tensor, k: Tensor, v: Tensor, cfg: NSAConfig, *, seq_len: SeqLen | None = None
) -> Tensor:
    """The window branch on all S keys."""
    S = k.shape[1] if seq_len is None else seq_len
    return attend(q, k, v, seen_window(q.shape[1], q.shape[0], k.shape[2], cfg, S))[0]


# Selection


@torch.no_grad()
def selection_scores(q: Tensor, k_cmp: Tensor, cfg: NSAConfig, *, seq_len: SeqLen) -> Tensor:
    """Eqs. 8-10: p_slc summed over the heads of a group, [B,T,G,M] fp64, -inf where a block is no candidate."""
    B, T, H, Dk = q.shape
    G = k_cmp.shape[2]
    lengths = _lengths(seq_len, B)
    seen = seen_compressed(T, B, G, cfg, seq_len)
    scores = torch.full((B, T, G, len(selection_spans(max(lengths), cfg))), -torch.inf, dtype=torch.float64)
    for b, S in enumerate(lengths):
        shared = torch.tensor(overlap(S, cfg), dtype=torch.float64)  # [M,C]
        for i in range(T):
            t = S - T + i
            candidates = [m for m, span in enumerate(selection_spans(S, cfg)) if min(span) <= t]
            for g in range(G):
                total = torch.zeros(len(candidates), dtype=torch.float64)
                keys = torch.tensor(seen[b][i][g], dtype=torch.int64)
                for h in range(g * (H // G), (g + 1) * (H // G)):
                    logits = k_cmp[b, keys, g].double() @ q[b, i, h].double() * Dk**-0.5
                    total = total + shared[: len(candidates), : len(keys)] @ logits.softmax(0)
                scores[b, i, g, : len(candidates)] = total
    return scores


def forced_blocks(t: int, cfg: NSAConfig) -> list[int]:
    """Blocks that the query at position t always selects: the first ones, its own and those before it."""
    own = next(m for m, span in enumerate(selection_spans(t + 1, cfg)) if t in span)
    first = [m for m in range(cfg.init_blocks) if m <= own]
    local = [m for m in range(own + 1) if own - m < cfg.local_blocks]
    return sorted({*first, *local})


def choose_blocks(scores: Tensor, cfg: NSAConfig, *, seq_len: SeqLen) -> Tensor:
    """Eq. 11 on `selection_scores`: [B,T,G,N] int32, ascending, padded with -1; ties to the lower block."""
    B, T, G, _ = scores.shape
    chosen = torch.full((B, T, G, cfg.n_sel), -1, dtype=torch.int32)
    for b, S in enumerate(_lengths(seq_len, B)):
        for i in range(T):
            forced = forced_blocks(S - T + i, cfg)
            for g in range(G):
                row = scores[b, i, g].tolist()
                others = [m for m, score in enumerate(row) if score > -torch.inf and m not in forced]
                best = sorted(others, key=lambda m: (-row[m], m))[: cfg.n_sel - len(forced)]
                picked = sorted(forced + best)
                chosen[b, i, g, : len(picked)] = torch.tensor(picked, dtype=torch.int32)
    return chosen


def select_blocks(q: Tensor, k_cmp: Tensor, cfg: NSAConfig, *, seq_len: SeqLen) -> Tensor:
    """[B,T,G,N] int32, as the op of the same name, from the queries and the compressed keys alone."""
    return choose_blocks(selection_scores(q, k_cmp, cfg, seq_len=seq_len), cfg, seq_len=seq_len)


# The layer


def gates(logits: Tensor, kind: str) -> Tensor:
    """Eq. 5: logits [B,T,H,3] -> weights of cmp, sel, win."""
    if kind == "sigmoid":
        return 1 / (1 + (-logits).exp())
    exp = logits.exp()
    return exp / exp.sum(-1, keepdim=True)


def phi_of(module: nn.Module, kind: str) -> Phi:
    """The phi that a module of this kind holds, from its parameters alone."""
    if kind == "avg":
        return phi_avg()
    weights = dict(module.named_parameters())
    if kind == "linear":
        return phi_linear(weights["weight"])
    names = ("position", "inner.weight", "inner.bias", "outer.weight", "outer.bias")
    return phi_mlp(*(weights[name] for name in names))


def layer(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """A whole `NativeSparseAttention` on x [B,T,dim] from position 0 -> out [B,T,dim], blocks [B,T,G,N].

    Reads the module's configuration and its parameters by their documented names; runs none of its code.
    """
    cfg: Any = module.cfg
    nsa, G = cfg.nsa, cfg.n_kv_groups
    weights = dict(module.named_parameters())
    B, T, _ = x.shape

    def heads(name: str, count: int, dim: int, first: int = 0) -> Tensor:
        rows = weights[f"{name}.weight"][first * dim : (first + count) * dim]
        return torch.stack([x @ rows[h * dim : (h + 1) * dim].T for h in range(count)], dim=2)

    def turned(y: Tensor, positions: Sequence[int]) -> Tensor:
        return rotate(y, positions, cfg.rope_theta, cfg.rope_scale)

    def branch(index: int) -> tuple[Tensor, Tensor]:
        first = 0 if nsa.shared_kv else index * G
        return heads("k_proj", G, cfg.d_k, first), heads("v_proj", G, cfg.d_v, first)

    q = turned(heads("q_proj", cfg.n_heads, cfg.d_k), range(T))
    (k_raw, v_raw), (k_sel, v_sel), (k_win, v_win) = (branch(index) for index in range(3))
    starts = [span.start for span in compressed_spans(T, nsa)]
    k_cmp = turned(compress(k_raw, phi_of(module.get_submodule("phi_k"), nsa.phi), nsa), starts)
    v_cmp = compress(v_raw, phi_of(module.get_submodule("phi_v"), nsa.phi), nsa)

    cmp, _ = compressed_attention(q, k_cmp, v_cmp, nsa, seq_len=T)
    blocks = select_blocks(q.detach(), k_cmp.detach(), nsa, seq_len=T)
    sel = selected_attention(q, turned(k_sel, range(T)), v_sel, blocks, nsa)
    win = sliding_window_attention(q, turned(k_win, range(T)), v_win, nsa)

    logits = x @ weights["gate_proj.weight"].T + weights["gate_proj.bias"]
    gate = gates(logits.view(B, T, cfg.n_heads, 3), nsa.gate)
    out = gate[..., 0, None] * cmp + gate[..., 1, None] * sel + gate[..., 2, None] * win
    return out.flatten(2) @ weights["o_proj.weight"].T, blocks
