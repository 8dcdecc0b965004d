"""The block choice on dense products: scores tile by tile from the known lse, and only the chosen indices are kept."""

from __future__ import annotations

import torch

from nsa.blocks import Pattern, n_compressed, n_selection, overlap_taps

# Scores of one chunk of queries, in elements a head: they should stay in the second-level cache.
_CHUNK = 1 << 18


def select(q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, p: Pattern, S: int) -> torch.Tensor:
    """q [B,T,H,Dk], the last T of S positions; k [B,>=C,G,Dk]; lse [B,T,H] -> int32 [B,T,G,N].

    Chunks of queries, each over the blocks that it can see.
    """
    B, T, H, D = q.shape
    if T == 1:
        return _select_one(q, k, lse, p, S)
    G = k.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    heads = (q.to(dtype) * D**-0.5).unflatten(2, (G, H // G)).permute(3, 0, 2, 1, 4)  # [R,B,G,T,D]
    shift = lse.to(dtype).unflatten(2, (G, H // G)).permute(3, 0, 2, 1).unsqueeze(-1)  # [R,B,G,T,1]
    keys = k.to(dtype).permute(0, 2, 3, 1)  # [B,G,D,C]
    chunk = max(16, _CHUNK // max(n_compressed(S, p), 1))
    blocks = q.new_empty(B, T, G, p.n_sel, dtype=torch.int32)
    for start in range(0, T, chunk):
        stop = min(start + chunk, T)
        t = torch.arange(S - T + start, S - T + stop, device=q.device)
        scores = _chunk_scores(heads[:, :, :, start:stop], keys, shift[:, :, :, start:stop], t, S - T + start, p)
        blocks[:, start:stop] = _top_blocks(scores.transpose(1, 2), t, p)
    return blocks


def _select_one(q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, pattern: Pattern, S: int) -> torch.Tensor:
    """The choice of the newest position alone: it sees every block, and all heads are one product."""
    B, G, M, C = len(q), k.shape[2], n_selection(S, pattern), n_compressed(S, pattern)
    m = torch.arange(M, device=q.device)
    if M <= pattern.n_sel:
        everything = torch.nn.functional.pad(m.to(torch.int32), (0, pattern.n_sel - M), value=-1)
        return everything.expand(B, 1, G, -1).contiguous()
    step, before = pattern.l_sel // pattern.d, pattern.l // pattern.d - 1
    dtype = torch.promote_types(q.dtype, torch.float32)
    p = torch.zeros(B, G, before + M * step, device=q.device, dtype=dtype)
    if C:
        heads = (q.to(dtype) * q.shape[-1] ** -0.5).view(B, G, -1, q.shape[-1])  # [B,G,R,D]
        scores = torch.matmul(heads, k[:, :C].to(dtype).permute(0, 2, 3, 1)).sub_(lse.to(dtype).view(B, G, -1, 1))
        for head in scores.exp_().unbind(2):
            p[..., before : before + C] += head
    total = p.new_zeros(B, G, M)
    for tap, (_, weight) in zip(p.unfold(-1, step + before, step).unbind(-1), overlap_taps(pattern), strict=True):
        total.add_(tap, alpha=weight)
    total[..., : pattern.init_blocks] = float("inf")
    total[..., M - pattern.local_blocks :] = float("inf")
    return _highest(total, pattern.n_sel, m).sort(dim=-1).values.to(torch.int32).unsqueeze(1)


def _chunk_scores(
    heads: torch.Tensor, keys: torch.Tensor, shift: torch.Tensor, t: torch.Tensor, first: int, pattern: Pattern
) -> torch.Tensor:
    """Scores [B,G,Tc,M] of one chunk whose first position is `first`; heads and taps are summed in ascending order."""
    R, B, G, rows, _ = heads.shape
    last = first + rows - 1
    C, M = n_compressed(last + 1, pattern), n_selection(last + 1, pattern)
    step, before = pattern.l_sel // pattern.d, pattern.l // pattern.d - 1
    # p starts `before` columns in, so that every tap of block m is the strided slice [tap + before :: step].
    padded = heads.new_zeros(B, G, rows, before + M * step)
    if C:
        p = padded[..., before : before + C]
        common = n_compressed(first + 1, pattern)  # blocks that every query of the chunk sees
        hidden = torch.arange(common, C, device=t.device) * pattern.d + pattern.l - 1 > t[:, None]
        for r in range(R):
            scores = torch.matmul(heads[r], keys[..., :C]).sub_(shift[r])
            scores[..., common:].masked_fill_(hidden, float("-inf"))
            p += scores.exp_()
    total = heads.new_zeros(B, G, rows, M)
    for offset, weight in overlap_taps(pattern):
        total.add_(padded[..., offset + before :: step][..., :M], alpha=weight)
    return total


def _top_blocks(scores: torch.Tensor, t: torch.Tensor, p: Pattern) -> torch.Tensor:
    """The n_sel blocks of each row: forced ones, then the highest scores, ties to the lower index (Eq. 11).

    scores [B,T,G,M], t [T] positions -> int32 [B,T,G,N], ascending, -1 at the end when there are fewer candidates.
    """
    M = scores.shape[-1]
    m = torch.arange(M, device=scores.device)
    cur = (t // p.l_sel)[:, None]
    candidate = m <= cur  # [T, M]
    forced = candidate & ((m < p.init_blocks) | (m > cur - p.local_blocks))
    # Forced blocks rank above every score and the future below every one, so budget is spent once a block.
    ranked = scores.masked_fill(forced[:, None], float("inf")).masked_fill(~candidate[:, None], float("-inf"))
    k = min(p.n_sel, M)
    chosen = _highest(ranked, k, m)
    chosen = chosen.masked_fill(chosen > cur[:, None], M).sort(dim=-1).values
    blocks = chosen.masked_fill(chosen == M, -1).to(torch.int32)
    return torch.nn.functional.pad(blocks, (0, p.n_sel - k), value=-1)


def _highest(ranked: torch.Tensor, k: int, m: torch.Tensor) -> torch.Tensor:
    """The k highest of [...,M] in any order, equal ones by index; m = arange(M)."""
    if ranked.dtype == torch.float32:
        # Scores are >= 0, so their bits order as they do; the index below them makes keys unique and topk exact.
        key = (ranked.view(torch.int32).to(torch.int64) << 32) - m
        chosen = key.topk(k, dim=-1, sorted=False).indices
    else:
        chosen = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return chosen
