"""The compressed branch on dense products: with u = t - (l-1) = d*a + r query t sees the blocks j <= a, whatever r, so
long inputs are d independent causal problems of S/d rows against the same compressed keys. No mask is T x C."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nsa.blocks import Pattern, n_compressed
from nsa.kernels.plain import dense

# Below this many rows a residue, one small mask is cheaper than d problems.
_MIN_ROWS = 32


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: None, p: Pattern, S: int, count: bool, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out [B,T,H,Dv], lse [B,T,H], blocks read [B,G] or []; q [B,T,H,Dk], k [B,>=C,G,Dk], v [B,>=C,G,Dv]."""
    B, T, H, D = q.shape
    C = n_compressed(S, p)
    if T == 1 and C:  # it sees every block
        k, v = (x[:, :C].transpose(1, 2) for x in (k, v))
        out, lse = dense.forward(q.transpose(1, 2), k, v, D**-0.5)
        return out.transpose(1, 2), lse.transpose(1, 2), _reads(q, k.shape[1], C, count)
    lay = _Layout(T, S, p.l, p.d, q.device)
    if not lay.n:
        lse = q.new_full((B, T, H), float("-inf"), dtype=torch.promote_types(q.dtype, torch.float32))
        return q.new_zeros(B, T, H, v.shape[3]), lse, _reads(q, k.shape[2], 0, count)
    out, lse = dense.forward(
        lay.queries(q), lay.keys(k), lay.keys(v), D**-0.5, causal=lay.causal, mask=lay.mask(q.dtype)
    )
    out = lay.queries_back(out, 0.0)
    lse = lay.queries_back(lse.unsqueeze(-1), float("-inf")).squeeze(-1)
    return out, lse, _reads(q, k.shape[2], lay.count() if count else 0, count)


def backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: None, out: torch.Tensor,
    lse: torch.Tensor, p: Pattern, S: int, backend: str, gate: torch.Tensor | None, delta: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """dq, dk, dv of `forward`'s out."""
    dout = dense.gated(dout, gate)
    lay = _Layout(q.shape[1], S, p.l, p.d, q.device)
    if not lay.n:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    dq, dk, dv = dense.backward(
        lay.queries(dout),
        lay.queries(q),
        lay.keys(k),
        lay.keys(v),
        lay.queries(out),
        lay.queries(lse.unsqueeze(-1)).squeeze(-1),
        q.shape[-1] ** -0.5,
        causal=lay.causal,
        mask=lay.mask(q.dtype),
    )
    return lay.queries_back(dq, 0.0), lay.keys_back(dk, k), lay.keys_back(dv, v)


def _reads(q: torch.Tensor, groups: int, n: int, count: bool) -> torch.Tensor:
    return q.new_full((q.shape[0], groups) if count else (0,), n, dtype=torch.int64)


def _pad_front(x: torch.Tensor, T: int, value: float) -> torch.Tensor:
    """Pad [B,t,...] in front to [B,T,...]."""
    return F.pad(x, [0, 0] * (x.dim() - 2) + [T - x.shape[1], 0], value=value)


class _Layout:
    """How the T queries that see a block are laid out as dense problems, and back again.

    Either one problem a batch row with a [T, C] mask, or d problems of A rows (row a, residue r) against C blocks.
    """

    def __init__(self, T: int, S: int, l: int, d: int, device: torch.device) -> None:  # noqa: E741
        self.C = 0 if l > S else (S - l) // d + 1
        self.blind = min(max(l - 1 - (S - T), 0), T) if self.C else T
        self.T, self.n = T, T - self.blind
        u_first, u_last = S - self.n - (l - 1), S - l
        a_first, a_last = u_first // d, u_last // d
        self.d = d if self.n and a_last - a_first + 1 >= _MIN_ROWS else 1
        if self.d == 1:
            self.before = self.after = 0
            a = (torch.arange(u_first, u_last + 1, device=device) // d)[:, None]
        else:
            self.before, self.after = u_first - a_first * d, (a_last + 1) * d - 1 - u_last
            a = torch.arange(a_first, a_last + 1, device=device)[:, None]
        self.visible = torch.arange(self.C, device=device) <= a  # [A, C]
        # The whole prefix from block 0 on is a square causal problem, which needs no mask.
        self.causal = self.d > 1 and a_first == 0

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """[B,T,H,D] -> [B*d,H,A,D]."""
        x = F.pad(x[:, self.blind :], (0, 0, 0, 0, self.before, self.after))
        return x.unflatten(1, (-1, self.d)).permute(0, 2, 3, 1, 4).flatten(0, 1)

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        """[B,C,G,D] -> [B*d,G,C,D], every residue the same keys."""
        x = x[:, : self.C].transpose(1, 2).unsqueeze(1)
        return x.expand(-1, self.d, -1, -1, -1).flatten(0, 1)

    def queries_back(self, x: torch.Tensor, blind: float) -> torch.Tensor:
        """[B*d,H,A,D] -> [B,T,H,D], `blind` where nothing was visible."""
        x = x.unflatten(0, (-1, self.d)).permute(0, 3, 1, 2, 4).flatten(1, 2)
        return _pad_front(x[:, self.before : self.before + self.n], self.T, blind)

    def keys_back(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """[B*d,G,C,D] -> [B,>=C,G,D], the residues summed."""
        x = x.unflatten(0, (-1, self.d))
        total = x.sum(1, dtype=torch.promote_types(x.dtype, torch.float32)).to(like.dtype).transpose(1, 2)
        return F.pad(total, (0, 0, 0, 0, 0, like.shape[1] - self.C)).contiguous()

    def mask(self, dtype: torch.dtype) -> torch.Tensor | None:
        return None if self.causal else dense.additive(self.visible, dtype)

    def count(self) -> int:
        """Blocks handed to the real queries."""
        per_query = self.visible.sum(-1).repeat_interleave(self.d)
        return int(per_query[self.before : self.before + self.n].sum())
