"""Block choice: compressed scores, summed over Eq. 9's overlaps and the group's heads, top-n (Eqs. 8-11)."""

import torch

from nsa import routing
from nsa.blocks import n_compressed, n_selection, overlap_taps
from nsa.config import NSAConfig
from nsa.ops.checks import check_blocks, check_qkv, check_seq_len, each_row, longest, pad_front
from nsa.ops.compressed import visible_blocks

# Scores of one chunk of queries, in elements a head: they should stay in the second-level cache.
_CHUNK = 1 << 18


def block_scores_reference(
    q: torch.Tensor, k_cmp: torch.Tensor, lse: torch.Tensor, cfg: NSAConfig, *, seq_len: int
) -> torch.Tensor:
    """Score of every selection block for every query and group, [B,T,G,M], in at least fp32 (Eqs. 8-10).

    q [B,T,H,Dk], k_cmp [B,>=C,G,Dk], lse [B,T,H] of the compressed attention. Blocks of the future score 0.
    """
    B, T, H, D = q.shape
    G, C, M = k_cmp.shape[2], n_compressed(seq_len, cfg), n_selection(seq_len, cfg)
    dtype = torch.promote_types(q.dtype, torch.float32)
    heads = q.to(dtype).unflatten(2, (G, H // G))
    scores = torch.einsum("btgrd,bcgd->btgrc", heads, k_cmp[:, :C].to(dtype)) * D**-0.5
    visible = visible_blocks(T, seq_len, cfg, q.device)[None, :, None, None]
    # Masked before exp: a query that sees no block has lse = -inf.
    scores = (scores - lse.to(dtype).unflatten(2, (G, H // G)).unsqueeze(-1)).masked_fill(~visible, float("-inf"))
    p = scores.exp().sum(3)  # Eq. 10 [B,T,G,C]
    step = cfg.l_sel // cfg.d
    total = p.new_zeros(B, T, G, M)
    for offset, weight in overlap_taps(cfg):  # Eq. 9
        j = torch.arange(M, device=q.device) * step + offset
        inside = (j >= 0) & (j < C)
        total[..., inside] += weight * p[..., j[inside]]
    return total


def top_blocks(
    scores: torch.Tensor, t: torch.Tensor, l_sel: int, n: int, init_blocks: int, local_blocks: int
) -> torch.Tensor:
    """The n blocks of each row: forced ones, then the highest scores, ties to the lower index (Eq. 11).

    scores [B,T,G,M], t [T] positions -> int32 [B,T,G,n], ascending, -1 at the end when there are fewer candidates.
    """
    M = scores.shape[-1]
    m = torch.arange(M, device=scores.device)
    cur = (t // l_sel)[:, None]
    candidate = m <= cur  # [T, M]
    forced = candidate & ((m < init_blocks) | (m > cur - local_blocks))
    # Forced blocks rank above every score and the future below every one, so budget is spent once a block. A stable
    # descending sort keeps equal scores in index order.
    ranked = scores.masked_fill(forced[:, None], float("inf")).masked_fill(~candidate[:, None], float("-inf"))
    k = min(n, M)
    chosen = _highest(ranked, k, m)
    chosen = chosen.masked_fill(chosen > cur[:, None], M).sort(dim=-1).values
    blocks = chosen.masked_fill(chosen == M, -1).to(torch.int32)
    return torch.nn.functional.pad(blocks, (0, n - k), value=-1)


def _highest(ranked: torch.Tensor, k: int, m: torch.Tensor) -> torch.Tensor:
    """The k highest of [...,M] in any order, equal ones by index; m = arange(M)."""
    if ranked.dtype == torch.float32:
        # Scores are >= 0, so their bits order as they do; the index below them makes keys unique and topk exact.
        key = (ranked.view(torch.int32).to(torch.int64) << 32) - m
        chosen = key.topk(k, dim=-1, sorted=False).indices
    else:
        chosen = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return chosen


def select_blocks_reference(
    q: torch.Tensor, k_cmp: torch.Tensor, lse: torch.Tensor, cfg: NSAConfig, *, seq_len: int
) -> torch.Tensor:
    """The specification: every score at once. Shapes as `select_blocks`; seq_len an int."""
    scores = block_scores_reference(q, k_cmp, lse, cfg, seq_len=seq_len)
    t = torch.arange(seq_len - q.shape[1], seq_len, device=q.device)
    return top_blocks(scores, t, cfg.l_sel, cfg.n_sel, cfg.init_blocks, cfg.local_blocks)


def _reference(
    q: torch.Tensor, k_cmp: torch.Tensor, lse: torch.Tensor, cfg: NSAConfig, S: int, rows: torch.Tensor | None
) -> torch.Tensor:
    """The reference's choice; ragged rows one by one."""
    if rows is None:
        return select_blocks_reference(q, k_cmp, lse, cfg, seq_len=S)
    T = q.shape[1]

    def one(b: int, S: int, t: int) -> tuple[torch.Tensor, ...]:
        row, last = slice(b, b + 1), slice(T - t, T)
        return (pad_front(select_blocks_reference(q[row, last], k_cmp[row], lse[row, last], cfg, seq_len=S), T, -1),)

    (blocks,) = each_row(one, T, rows)
    return blocks


def select_blocks(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    lse: torch.Tensor,
    cfg: NSAConfig,
    *,
    seq_len: int | torch.Tensor,
    backend: str | None = None,
) -> torch.Tensor:
    """Choose n_sel selection blocks for each query and group; all heads of a group share them (Eqs. 8-11).

    q [B,T,H,Dk], the last T of `seq_len` positions (an int, or int32 [B]); k_cmp [B,>=C,G,Dk] and lse [B,T,H] as
    given to and by `compressed_attention`. Returns int32 [B,T,G,N]: ascending, unique, -1 at the end where there are
    fewer than N candidates. The first `init_blocks`, the query's own block and the `local_blocks` - 1 before it are
    always chosen. No gradient flows through the choice.
    """
    check_qkv("select_blocks", q, k_cmp, k_cmp)
    S, rows = check_seq_len("select_blocks", q, seq_len)
    check_blocks("select_blocks", k_cmp, longest(S, rows), cfg)
    if lse.shape != q.shape[:3]:
        raise ValueError(f"select_blocks: lse has shape {tuple(lse.shape)}; expected {tuple(q.shape[:3])}")
    q, k_cmp, lse = q.detach(), k_cmp.detach(), lse.detach()
    if backend == "reference":
        return _reference(q, k_cmp, lse, cfg, S, rows)
    pattern = (cfg.l, cfg.d, cfg.l_sel, cfg.n_sel, cfg.init_blocks, cfg.local_blocks)
    return _select(q, k_cmp, lse, *pattern, S, rows, backend)


@torch.library.custom_op("nsa::select_blocks", mutates_args=())
def _select(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    lse: torch.Tensor,
    l: int,  # noqa: E741
    d: int,
    l_sel: int,
    n_sel: int,
    init_blocks: int,
    local_blocks: int,
    seq_len: int,
    rows: torch.Tensor | None,
    backend: str | None,
) -> torch.Tensor:
    route = routing.choose("selection", q, k_cmp, backend=backend)
    routing.launches["selection", route.backend] += 1
    cfg = NSAConfig(l=l, d=d, l_sel=l_sel, n_sel=n_sel, init_blocks=init_blocks, local_blocks=local_blocks)
    choose = _select_triton if route.backend == "triton" else _select_chunks
    if rows is None:
        return choose(q, k_cmp, lse, cfg, seq_len)
    T = q.shape[1]

    def one(b: int, S: int, t: int) -> tuple[torch.Tensor, ...]:
        row = slice(b, b + 1)
        return (pad_front(choose(q[row, T - t :], k_cmp[row], lse[row, T - t :], cfg, S), T, -1),)

    (blocks,) = each_row(one, T, rows)
    return blocks


@_select.register_fake
def _(q, k_cmp, lse, l, d, l_sel, n_sel, init_blocks, local_blocks, seq_len, rows, backend):  # noqa: E741
    return q.new_empty(q.shape[0], q.shape[1], k_cmp.shape[2], n_sel, dtype=torch.int32)


def _select_triton(q: torch.Tensor, k_cmp: torch.Tensor, lse: torch.Tensor, cfg: NSAConfig, S: int) -> torch.Tensor:
    from nsa.kernels.selection import select

    return select(
        q,
        k_cmp,
        lse,
        l=cfg.l,
        d=cfg.d,
        l_sel=cfg.l_sel,
        n_sel=cfg.n_sel,
        init_blocks=cfg.init_blocks,
        local_blocks=cfg.local_blocks,
        seq_len=S,
    )


def _select_chunks(q: torch.Tensor, k_cmp: torch.Tensor, lse: torch.Tensor, cfg: NSAConfig, S: int) -> torch.Tensor:
    """`select_blocks_reference` in chunks of queries, each over the blocks that it can see."""
    B, T, H, D = q.shape
    if T == 1:
        return _select_one(q, k_cmp, lse, cfg, S)
    G = k_cmp.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    heads = (q.to(dtype) * D**-0.5).unflatten(2, (G, H // G)).permute(3, 0, 2, 1, 4)  # [R,B,G,T,D]
    shift = lse.to(dtype).unflatten(2, (G, H // G)).permute(3, 0, 2, 1).unsqueeze(-1)  # [R,B,G,T,1]
    keys = k_cmp.to(dtype).permute(0, 2, 3, 1)  # [B,G,D,C]
    chunk = max(16, _CHUNK // max(n_compressed(S, cfg), 1))
    blocks = q.new_empty(B, T, G, cfg.n_sel, dtype=torch.int32)
    for start in range(0, T, chunk):
        stop = min(start + chunk, T)
        t = torch.arange(S - T + start, S - T + stop, device=q.device)
        scores = _chunk_scores(heads[:, :, :, start:stop], keys, shift[:, :, :, start:stop], t, S - T + start, cfg)
        blocks[:, start:stop] = top_blocks(
            scores.transpose(1, 2), t, cfg.l_sel, cfg.n_sel, cfg.init_blocks, cfg.local_blocks
        )
    return blocks


def _select_one(q: torch.Tensor, k_cmp: torch.Tensor, lse: torch.Tensor, cfg: NSAConfig, S: int) -> torch.Tensor:
    """The choice of the newest position alone: it sees every block, and all heads are one product."""
    B, G, M, C = len(q), k_cmp.shape[2], n_selection(S, cfg), n_compressed(S, cfg)
    m = torch.arange(M, device=q.device)
    if M <= cfg.n_sel:
        everything = torch.nn.functional.pad(m.to(torch.int32), (0, cfg.n_sel - M), value=-1)
        return everything.expand(B, 1, G, -1).contiguous()
    step, before = cfg.l_sel // cfg.d, cfg.l // cfg.d - 1
    dtype = torch.promote_types(q.dtype, torch.float32)
    p = torch.zeros(B, G, before + M * step, device=q.device, dtype=dtype)
    if C:
        heads = (q.to(dtype) * q.shape[-1] ** -0.5).view(B, G, -1, q.shape[-1])  # [B,G,R,D]
        scores = torch.matmul(heads, k_cmp[:, :C].to(dtype).permute(0, 2, 3, 1)).sub_(lse.to(dtype).view(B, G, -1, 1))
        for head in scores.exp_().unbind(2):
            p[..., before : before + C] += head
    total = p.new_zeros(B, G, M)
    for tap, (_, weight) in zip(p.unfold(-1, step + before, step).unbind(-1), overlap_taps(cfg), strict=True):
        total.add_(tap, alpha=weight)
    total[..., : cfg.init_blocks] = float("inf")
    total[..., M - cfg.local_blocks :] = float("inf")
    return _highest(total, cfg.n_sel, m).sort(dim=-1).values.to(torch.int32).unsqueeze(1)


def _chunk_scores(
    heads: torch.Tensor, keys: torch.Tensor, shift: torch.Tensor, t: torch.Tensor, first: int, cfg: NSAConfig
) -> torch.Tensor:
    """Scores [B,G,Tc,M] of one chunk whose first position is `first`; heads and taps are summed in ascending order."""
    R, B, G, rows, _ = heads.shape
    last = first + rows - 1
    C, M = n_compressed(last + 1, cfg), n_selection(last + 1, cfg)
    step, before = cfg.l_sel // cfg.d, cfg.l // cfg.d - 1
    # p starts `before` columns in, so that every tap of block m is the strided slice [tap + before :: step].
    padded = heads.new_zeros(B, G, rows, before + M * step)
    if C:
        p = padded[..., before : before + C]
        common = n_compressed(first + 1, cfg)  # blocks that every query of the chunk sees
        hidden = torch.arange(common, C, device=t.device) * cfg.d + cfg.l - 1 > t[:, None]
        for r in range(R):
            scores = torch.matmul(heads[r], keys[..., :C]).sub_(shift[r])
            scores[..., common:].masked_fill_(hidden, float("-inf"))
            p += scores.exp_()
    total = heads.new_zeros(B, G, rows, M)
    for offset, weight in overlap_taps(cfg):
        total.add_(padded[..., offset + before :: step][..., :M], alpha=weight)
    return total
