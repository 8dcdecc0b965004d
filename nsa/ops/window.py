"""Sliding-window attention: each query attends to the w tokens that end at itself."""

from __future__ import annotations

import torch

from nsa.config import NSAConfig
from nsa.ops.branch import attend
from nsa.ops.checks import by_row, check_keys, check_qkv, check_seq_len, exact, row_lengths


def _visible(t: torch.Tensor, s: torch.Tensor, w: int) -> torch.Tensor:
    """[rows, keys] bool: exactly the tokens t-w+1 .. t."""
    return (s <= t[:, None]) & (s > t[:, None] - w)


@exact
def sliding_window_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cfg: NSAConfig, *, seq_len: int
) -> torch.Tensor:
    """The specification, in plain differentiable torch. Shapes as `sliding_window_attention`; seq_len an int."""
    T, H, D = q.shape[1:]
    G = k.shape[2]
    first = max(seq_len - k.shape[1], 0)  # position of k's first row
    k, v = k[:, : seq_len - first], v[:, : seq_len - first]
    dtype = torch.promote_types(q.dtype, torch.float32)
    t = torch.arange(seq_len - T, seq_len, device=q.device)
    visible = _visible(t, torch.arange(first, seq_len, device=q.device), cfg.w)[None, :, None, None]
    scores = torch.einsum("btgrd,bsgd->btgrs", q.to(dtype).unflatten(2, (G, H // G)), k.to(dtype)) * D**-0.5
    p = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("btgrs,bsgd->btgrd", p, v.to(dtype)).flatten(2, 3).to(q.dtype)


def sliding_window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cfg: NSAConfig,
    *,
    seq_len: int | torch.Tensor | None = None,
    reads: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Attend to exactly the last w tokens, the query's own included.

    q [B,T,H,Dk], the last T of `seq_len` positions (an int, int32 [B] for ragged rows, or k's length); k [B,K,G,Dk],
    v [B,K,G,Dv]. With K >= seq_len row s of k is position s; a shorter k holds the last K positions, and K must be at
    least min(seq_len, w + T - 1). reads, int64 [B,G], gains the tokens read. Returns [B,T,H,Dv] in q.dtype.
    Differentiable in q, k, v. Raises ValueError for inputs that do not fit.
    """
    name = "sliding_window_attention"
    check_qkv(name, q, k, v)
    S, rows = check_seq_len(name, q, k.shape[1] if seq_len is None else seq_len)
    if rows is None:
        check_keys("window", name, k, S, q.shape[1], cfg)
    if backend == "reference":
        out, count = _reference(q, k, v, cfg, S, rows)
    else:
        out, _, count = attend("window", q, k, v, None, cfg.pattern, S, rows, reads is not None, backend)
    if reads is not None:
        reads += count
    return out


def _reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cfg: NSAConfig, S: int, rows: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """The specification's output and the tokens read; ragged rows one by one."""
    T = q.shape[1]
    if rows is None:
        t = torch.arange(S - T, S, device=q.device)
        s = torch.arange(max(S - k.shape[1], 0), S, device=q.device)
        count = _visible(t, s, cfg.w).sum().expand(q.shape[0], k.shape[2])
        return sliding_window_attention_reference(q, k, v, cfg, seq_len=S), count
    lengths = row_lengths("window", "sliding_window_attention", rows, k, T, cfg)
    return by_row(lambda row, at, S: _reference(q[row, at], k[row], v[row], cfg, S, None), T, lengths, 0.0, None)
