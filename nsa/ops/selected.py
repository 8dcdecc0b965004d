"""Selected attention: one softmax over the tokens of the chosen blocks up to the query's own (Eqs. 11-12)."""

from __future__ import annotations

import torch

from nsa.config import NSAConfig
from nsa.ops.branch import attend
from nsa.ops.checks import by_row, check_keys, check_qkv, check_seq_len, exact, row_lengths


@exact
def selected_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor, cfg: NSAConfig, *, seq_len: int
) -> torch.Tensor:
    """The specification, in plain differentiable torch. Shapes as `selected_attention`; seq_len an int."""
    return _gathered(q, k, v, blocks, cfg.l_sel, seq_len)[0]


@exact
def _gathered(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor, l_sel: int, S: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out [B,T,H,Dv], lse [B,T,H], tokens read [B,G]; plain differentiable torch."""
    B, T, H, D = q.shape
    G, N = blocks.shape[2:]
    dtype = torch.promote_types(q.dtype, torch.float32)
    t = torch.arange(S - T, S, device=q.device)[None, :, None, None]
    inside = torch.arange(l_sel, device=q.device)
    tokens = (blocks.long().unsqueeze(-1) * l_sel + inside).flatten(3)  # [B,T,G,N*l']
    valid = (blocks >= 0).unsqueeze(-1).expand(-1, -1, -1, -1, l_sel).flatten(3) & (tokens <= t)

    index = tokens.clamp(0, S - 1) * G + torch.arange(G, device=q.device)[:, None]

    def take(x: torch.Tensor) -> torch.Tensor:
        """[B,S,G,D] -> [B,T,G,N*l',D]; index_select's backward is repeatable, and by batch row it copies no cache."""
        x = x.to(dtype) if x.requires_grad else x  # so that the rows of a token's gradient are summed in fp32
        flat = (one[:S].reshape(S * G, x.shape[3]) for one in x)
        rows = [one.index_select(0, i.flatten()) for one, i in zip(flat, index, strict=True)]
        return torch.stack(rows).view(B, T, G, N * l_sel, x.shape[3])

    scores = torch.einsum("btgrd,btgsd->btgrs", q.to(dtype).unflatten(2, (G, H // G)), take(k).to(dtype)) * D**-0.5
    scores = scores.masked_fill(~valid.unsqueeze(3), float("-inf"))
    lse = scores.logsumexp(-1)
    p = torch.exp(scores - lse.masked_fill(lse.isneginf(), 0.0).unsqueeze(-1))
    p = p / p.sum(-1, keepdim=True).clamp(min=0.5)  # takes back the rounding of lse; a blind row stays 0
    out = torch.einsum("btgrs,btgsd->btgrd", p, take(v).to(dtype))
    return out.flatten(2, 3).to(q.dtype), lse.flatten(2, 3), valid.sum((1, 3))


def selected_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor,
    cfg: NSAConfig,
    *,
    seq_len: int | torch.Tensor | None = None,
    reads: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Attend to the tokens of each query's chosen blocks that are not in its future.

    q [B,T,H,Dk], the last T of `seq_len` positions (an int, int32 [B] for ragged rows, or k's length);
    k [B,>=S,G,Dk], v [B,>=S,G,Dv], row s at position s; blocks [B,T,G,N] int32 from `select_blocks`: unique in a row,
    -1 in any slot that is empty. reads, int64 [B,G], gains the tokens read. Returns [B,T,H,Dv] in q.dtype; a query
    with no block gets 0. Differentiable in q, k, v. Raises ValueError for inputs that do not fit (on a CPU also for a
    block outside [-1, M)), Unsupported for a named backend that cannot run.
    """
    name = "selected_attention"
    check_qkv(name, q, k, v)
    S, rows = check_seq_len(name, q, k.shape[1] if seq_len is None else seq_len)
    if blocks.dtype != torch.int32 or blocks.shape[:3] != (*q.shape[:2], k.shape[2]):
        raise ValueError(
            f"{name}: blocks are {blocks.dtype} {tuple(blocks.shape)}; "
            f"expected int32 [{q.shape[0]}, {q.shape[1]}, {k.shape[2]}, N]"
        )
    if rows is None:
        check_keys("selected", name, k, S, q.shape[1], cfg)
    if backend == "reference":
        out, _, count = _reference(q, k, v, blocks, cfg, S, rows)
    else:
        out, _, count = attend("selected", q, k, v, blocks, cfg.pattern, S, rows, reads is not None, backend)
    if reads is not None:
        reads += count
    return out


def _reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor, cfg: NSAConfig, S: int,
    rows: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """The specification's output and lse, and the tokens read; ragged rows one by one."""
    if rows is None:
        return _gathered(q, k, v, blocks, cfg.l_sel, S)
    T = q.shape[1]
    lengths = row_lengths("selected", "selected_attention", rows, k, T, cfg)
    return by_row(
        lambda row, at, S: _reference(q[row, at], k[row], v[row], blocks[row, at], cfg, S, None),
        T, lengths, 0.0, float("-inf"), None,
    )  # fmt: skip
