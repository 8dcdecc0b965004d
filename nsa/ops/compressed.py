"""Compressed attention: each query attends to the compressed blocks that end at or before it (Eqs. 5 and 7)."""

from __future__ import annotations

import torch

from nsa.blocks import n_compressed
from nsa.config import NSAConfig
from nsa.ops.branch import attend
from nsa.ops.checks import by_row, check_keys, check_qkv, check_seq_len, exact, row_lengths


def visible_blocks(T: int, S: int, cfg: NSAConfig, device: torch.device) -> torch.Tensor:
    """[T, C] bool: which compressed blocks each of the last T of S positions sees."""
    t = torch.arange(S - T, S, device=device)
    j = torch.arange(n_compressed(S, cfg), device=device)
    return j * cfg.d + cfg.l - 1 <= t[:, None]


@exact
def compressed_attention_reference(
    q: torch.Tensor, k_cmp: torch.Tensor, v_cmp: torch.Tensor, cfg: NSAConfig, *, seq_len: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The specification, in plain differentiable torch. Shapes as `compressed_attention`; seq_len an int."""
    T, H, D = q.shape[1:]
    G, C = k_cmp.shape[2], n_compressed(seq_len, cfg)
    dtype = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(dtype).unflatten(2, (G, H // G))  # [B,T,G,R,D]
    visible = visible_blocks(T, seq_len, cfg, q.device)[None, :, None, None]  # [1,T,1,1,C]
    scores = torch.einsum("btgrd,bcgd->btgrc", grouped, k_cmp[:, :C].to(dtype)) * D**-0.5
    scores = scores.masked_fill(~visible, float("-inf"))
    lse = scores.logsumexp(-1)
    # Where nothing is visible lse is -inf; 0 there keeps exp(-inf - 0) = 0 and its gradient finite.
    p = torch.exp(scores - lse.masked_fill(lse.isneginf(), 0.0).unsqueeze(-1))
    p = p / p.sum(-1, keepdim=True).clamp(min=0.5)  # takes back the rounding of lse; a blind row stays 0
    out = torch.einsum("btgrc,bcgd->btgrd", p, v_cmp[:, :C].to(dtype))
    return out.flatten(2, 3).to(q.dtype), lse.flatten(2, 3).detach()


def compressed_attention(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    v_cmp: torch.Tensor,
    cfg: NSAConfig,
    *,
    seq_len: int | torch.Tensor,
    reads: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to the visible compressed blocks: query t sees block j iff j*d + l - 1 <= t.

    q [B,T,H,Dk], the last T of `seq_len` positions (an int, or int32 [B] for ragged rows); k_cmp [B,>=C,G,Dk],
    v_cmp [B,>=C,G,Dv] with C = n_compressed(seq_len). reads, int64 [B,G], gains the number of blocks read. Returns out
    [B,T,H,Dv] in q.dtype and lse [B,T,H], the natural logsumexp of the scaled scores (fp32; fp64 for fp64), which
    carries no gradient. A query that sees no block gets out 0 and lse -inf. Differentiable in q, k_cmp, v_cmp. Raises
    ValueError for inputs that do not fit, Unsupported for a named backend that cannot run.
    """
    name = "compressed_attention"
    check_qkv(name, q, k_cmp, v_cmp)
    S, rows = check_seq_len(name, q, seq_len)
    if rows is None:
        check_keys("compressed", name, k_cmp, S, q.shape[1], cfg)
    if backend == "reference":
        out, lse, count = _reference(q, k_cmp, v_cmp, cfg, S, rows)
    else:
        out, lse, count = attend("compressed", q, k_cmp, v_cmp, None, cfg.pattern, S, rows, reads is not None, backend)
    if reads is not None:
        reads += count
    return out, lse


def _reference(
    q: torch.Tensor, k_cmp: torch.Tensor, v_cmp: torch.Tensor, cfg: NSAConfig, S: int, rows: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """The specification's output and lse, and the blocks read; ragged rows one by one."""
    T = q.shape[1]
    if rows is None:
        out, lse = compressed_attention_reference(q, k_cmp, v_cmp, cfg, seq_len=S)
        return out, lse, visible_blocks(T, S, cfg, q.device).sum().expand(q.shape[0], k_cmp.shape[2])
    lengths = row_lengths("compressed", "compressed_attention", rows, k_cmp, T, cfg)
    return by_row(
        lambda row, at, S: _reference(q[row, at], k_cmp[row], v_cmp[row], cfg, S, None),
        T, lengths, 0.0, float("-inf"), None,
    )  # fmt: skip
