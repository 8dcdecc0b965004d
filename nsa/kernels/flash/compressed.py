"""The compressed branch as plain causal attention, for torch's fused operators: no mask, no copied keys.

With u = t - (l-1) = d*a + r, query t sees exactly the blocks j <= a, whatever its residue r. The queries of one residue
are therefore one bottom-right causal problem against the same keys, and the residues are its batch. Residues that span
the same rows go into one call; a span that ends inside a row of d makes at most three such runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from nsa.blocks import Pattern
from nsa.kernels.flash import operators
from nsa.kernels.plain.dense import gated

# From this many elements of q on cuDNN was measured ahead of FA-2 (sm_90). Below, what it costs on the host outweighs
# that, and it builds a new plan, 0.1 s and more, for every new length.
_CUDNN_ELEMENTS = 1 << 25


def unsupported(
    backend: str, q: torch.Tensor, k_cmp: torch.Tensor, v_cmp: torch.Tensor, *, seq_len: int | None = None
) -> list[str]:
    """Reasons against flash or cudnn for q [B,T,H,Dk], k_cmp [B,C,G,Dk], v_cmp [B,C,G,Dv]; seq_len T unless given."""
    reasons = operators.unsupported(backend, q, v_cmp)
    if backend == "cudnn":
        if seq_len not in (None, q.shape[1]):
            reasons.append("cudnn wants whole sequences: as many queries as positions")
        elif q.numel() < _CUDNN_ELEMENTS:
            reasons.append(f"cudnn pays from {_CUDNN_ELEMENTS} elements of q on, not at {q.numel()}")
    return reasons


@dataclass(frozen=True)
class Run:
    """`residues` neighbouring residues of `rows` rows each, which see up to `keys` keys; `start` is the first query.

    Queries that follow one another in a single row see the same keys: one problem without a mask.
    """

    start: int
    residues: int
    rows: int
    keys: int
    d: int

    @property
    def causal(self) -> bool:
        return self.rows > 1

    def problems(self, x: torch.Tensor) -> torch.Tensor:
        """View of [B,T,...] as [B,residues,rows,...]; [B,1,residues,...] for a single row."""
        part = x[:, self.start : self.start + (self.rows - 1) * self.d + self.residues]
        if not self.causal:
            return part.unsqueeze(1)
        return part.unfold(1, self.residues, self.d).movedim(-1, 1)

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """[B,T,...] -> [N,rows,...]; a view for B = 1."""
        return self.problems(x).flatten(0, 1)

    def shared_keys(self, x: torch.Tensor) -> torch.Tensor:
        """[B,C,G,D] -> [N or 1,keys,G,D]; a view for B = 1."""
        x = x[:, : self.keys]
        if x.shape[0] == 1 or not self.causal:
            return x
        return x.unsqueeze(1).expand(-1, self.residues, -1, -1, -1).flatten(0, 1)

    def reads(self) -> int:
        """Keys handed to the queries of one batch row and group."""
        if not self.causal:
            return self.residues * self.keys
        return self.residues * (self.rows * (self.keys - self.rows) + self.rows * (self.rows + 1) // 2)


def blind_queries(T: int, S: int, l: int) -> int:  # noqa: E741
    """How many of the last T of S positions, the first ones, see no block."""
    return min(max(l - 1 - (S - T), 0), T)


@lru_cache(maxsize=256)
def runs(T: int, S: int, l: int, d: int) -> tuple[Run, ...]:  # noqa: E741
    """The runs that cover every query that sees a block, each once; the last T of S positions."""
    u_first, u_last, blind = max(S - T - (l - 1), 0), S - l, blind_queries(T, S, l)
    # (rows, keys) of the r-th query that sees anything together with all those d apart from it.
    spans = [
        ((u_last - u) // d + 1, u // d + (u_last - u) // d + 1) for u in range(u_first, u_first + min(d, T - blind))
    ]
    found, start = [], blind
    for (rows, keys), equal in itertools.groupby(spans):
        residues = len(list(equal))
        found.append(Run(start, residues, rows, keys, d))
        start += residues
    return tuple(found)


def _calls(q: torch.Tensor, S: int, l: int, d: int) -> Iterator[Run]:  # noqa: E741
    """The runs, cut so that no call holds more than `operators.CALL_ELEMENTS` of q."""
    B, T, H, D = q.shape
    for run in runs(T, S, l, d):
        step = max(1, operators.CALL_ELEMENTS // (B * run.rows * H * D)) if run.causal else run.residues
        if step >= run.residues:
            yield run
            continue
        for r in range(0, run.residues, step):
            yield replace(run, start=run.start + r, residues=min(step, run.residues - r))


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: None, p: Pattern, S: int, count: bool, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out [B,T,H,Dv], lse [B,T,H] fp32, and the keys read [B,G] or []. Shapes as the op's."""
    B, T, H, D = q.shape
    out, lse, n = q.new_empty(B, T, H, v.shape[3]), q.new_empty(B, T, H, dtype=torch.float32), 0
    blind = blind_queries(T, S, p.l)
    if blind:
        out[:, :blind], lse[:, :blind] = 0.0, float("-inf")
    for run in _calls(q, S, p.l, p.d):
        part, part_lse = operators.forward(
            backend, run.queries(q), run.shared_keys(k), run.shared_keys(v), D**-0.5, causal=run.causal
        )
        for whole, piece in ((out, part), (lse, part_lse.transpose(1, 2))):
            whole_part = run.problems(whole)
            whole_part.copy_(piece.unflatten(0, whole_part.shape[:2]))
        n += run.reads()
    return out, lse, q.new_full((B, k.shape[2]) if count else (0,), n, dtype=torch.int64)


def backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: None, out: torch.Tensor,
    lse: torch.Tensor, p: Pattern, S: int, backend: str, gate: torch.Tensor | None, delta: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """dq, dk, dv of `forward`'s out; the residues' shares of dk and dv are summed in fp32."""
    B, D, dout = q.shape[0], q.shape[3], gated(dout, gate)
    dq = q.new_empty(q.shape)
    dq[:, : blind_queries(q.shape[1], S, p.l)] = 0.0
    dk, dv = (x.new_zeros(x.shape, dtype=torch.float32) for x in (k, v))
    for run in _calls(q, S, p.l, p.d):
        part_dq, part_dk, part_dv = operators.backward(
            backend,
            run.queries(dout),
            run.queries(q),
            run.shared_keys(k),
            run.shared_keys(v),
            run.queries(out),
            run.queries(lse).transpose(1, 2),
            D**-0.5,
            causal=run.causal,
        )
        whole_part = run.problems(dq)
        whole_part.copy_(part_dq.unflatten(0, whole_part.shape[:2]))
        for whole, piece in ((dk, part_dk), (dv, part_dv)):
            whole[:, : run.keys] += piece.unflatten(0, (B, -1)).sum(1, dtype=torch.float32)
    return dq, dk.to(k.dtype), dv.to(v.dtype)
