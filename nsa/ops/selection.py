"""Block choice: compressed scores, summed over Eq. 9's overlaps and the group's heads, top-n (Eqs. 8-11)."""

from __future__ import annotations

from typing import Any

import torch

from nsa import routing
from nsa.blocks import Pattern, n_compressed, n_selection, overlap_taps
from nsa.config import NSAConfig
from nsa.ops import operator
from nsa.ops.checks import by_row, check_keys, check_qkv, check_seq_len, exact, row_lengths
from nsa.ops.compressed import visible_blocks


@exact
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


def top_blocks_reference(scores: torch.Tensor, t: torch.Tensor, cfg: NSAConfig) -> torch.Tensor:
    """The n_sel blocks of each row: forced ones, then the highest scores, ties to the lower index (Eq. 11).

    scores [B,T,G,M], t [T] positions -> int32 [B,T,G,N], ascending, -1 at the end when there are fewer candidates.
    """
    M = scores.shape[-1]
    m = torch.arange(M, device=scores.device)
    cur = (t // cfg.l_sel)[:, None]
    candidate = m <= cur  # [T, M]
    forced = candidate & ((m < cfg.init_blocks) | (m > cur - cfg.local_blocks))
    # Forced blocks rank above every score and the future below every one, so budget is spent once a block. A stable
    # descending sort keeps equal scores in index order.
    ranked = scores.masked_fill(forced[:, None], float("inf")).masked_fill(~candidate[:, None], float("-inf"))
    k = min(cfg.n_sel, M)
    chosen = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    chosen = chosen.masked_fill(chosen > cur[:, None], M).sort(dim=-1).values
    blocks = chosen.masked_fill(chosen == M, -1).to(torch.int32)
    return torch.nn.functional.pad(blocks, (0, cfg.n_sel - k), value=-1)


def select_blocks_reference(
    q: torch.Tensor, k_cmp: torch.Tensor, lse: torch.Tensor, cfg: NSAConfig, *, seq_len: int
) -> torch.Tensor:
    """The specification: every score at once. Shapes as `select_blocks`; seq_len an int."""
    scores = block_scores_reference(q, k_cmp, lse, cfg, seq_len=seq_len)
    t = torch.arange(seq_len - q.shape[1], seq_len, device=q.device)
    return top_blocks_reference(scores, t, cfg)


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
    if rows is None:
        check_keys("selection", "select_blocks", k_cmp, S, q.shape[1], cfg)
    if lse.shape != q.shape[:3]:
        raise ValueError(f"select_blocks: lse has shape {tuple(lse.shape)}; expected {tuple(q.shape[:3])}")
    q, k_cmp, lse = q.detach(), k_cmp.detach(), lse.detach()
    if backend == "reference":
        return _reference(q, k_cmp, lse, cfg, S, rows)
    return _select(q, k_cmp, lse, list(cfg.pattern), S, rows, backend)


def _reference(
    q: torch.Tensor, k_cmp: torch.Tensor, lse: torch.Tensor, cfg: NSAConfig, S: int, rows: torch.Tensor | None
) -> torch.Tensor:
    """The specification's choice; ragged rows one by one."""
    if rows is None:
        return select_blocks_reference(q, k_cmp, lse, cfg, seq_len=S)
    lengths = row_lengths("selection", "select_blocks", rows, k_cmp, q.shape[1], cfg)

    def one(row: slice, at: slice, S: int) -> tuple[torch.Tensor]:
        return (_reference(q[row, at], k_cmp[row], lse[row, at], cfg, S, None),)

    return by_row(one, q.shape[1], lengths, -1)[0]


def choose(
    form: Any, backend: str, q: torch.Tensor, k_cmp: torch.Tensor, lse: torch.Tensor, p: Pattern, S: int, rows: Any
) -> torch.Tensor:
    """Run a form's `select(q, k, lse, pattern, S)`, ragged rows one by one."""
    if rows is None:
        blocks = form.select(q, k_cmp, lse, p, S)
    else:
        lengths = row_lengths("selection", "select_blocks", rows, k_cmp, q.shape[1], p)

        def one(row: slice, at: slice, S: int) -> tuple[torch.Tensor]:
            return (form.select(q[row, at], k_cmp[row], lse[row, at], p, S),)

        (blocks,) = by_row(one, q.shape[1], lengths, -1)
    routing.launches["selection", backend] += 1
    return blocks


def _body(q, k_cmp, lse, pattern, seq_len, rows, backend):
    p = Pattern(*pattern)
    facts = {} if rows is not None else {"blocks": n_compressed(seq_len, p)}
    route = routing.choose("selection", q, k_cmp, backend=backend, **facts)
    form = routing.form("selection", route.backend, q)
    return choose(form, route.backend, q, k_cmp, lse, p, seq_len, rows)


def _fake(q, k_cmp, lse, pattern, seq_len, rows, backend):
    return q.new_empty(q.shape[0], q.shape[1], k_cmp.shape[2], Pattern(*pattern).n_sel, dtype=torch.int32)


_select = operator.define(
    "select_blocks(Tensor q, Tensor k_cmp, Tensor lse, int[] pattern, SymInt seq_len, Tensor? rows, str? backend) "
    "-> Tensor",
    _body,
    _fake,
)
