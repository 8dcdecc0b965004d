"""The sliding window by torch's fused operators, which skip the keys outside the band."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from nsa.blocks import Pattern
from nsa.kernels.flash import operators
from nsa.kernels.plain.dense import gated
from nsa.kernels.plain.window import all_rows, held

# Queries that the backward makes one problem of, in windows and at least: where equal runs must give equal bits, FA-2
# walks the keys of a problem one after the other, so many problems keep the card busy.
_PROBLEM_WINDOWS, _PROBLEM_QUERIES = 4, 1024


def unsupported(
    backend: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, seq_len: int | None = None
) -> list[str]:
    """Reasons against a backend for q [B,T,H,Dk], k [B,K,G,Dk], v [B,K,G,Dv]."""
    return operators.unsupported(backend, q, v)


@dataclass(frozen=True)
class Stretch:
    """`count` problems of `rows` queries each, one after the other, and of the `keys` keys that those see together.

    The first has the queries from `start` and the keys from `first_key` on; the next ones begin `rows` further on.
    """

    count: int
    rows: int
    keys: int
    start: int
    first_key: int

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """[B,T,...] -> [B,count,rows,...], a view."""
        return x[:, self.start : self.start + self.count * self.rows].unflatten(1, (self.count, self.rows))

    def shared_keys(self, x: torch.Tensor) -> torch.Tensor:
        """[B,K,G,D] -> [B,count,keys,G,D], a view in which neighbours overlap."""
        stop = self.first_key + (self.count - 1) * self.rows + self.keys
        return x[:, self.first_key : stop].unfold(1, self.keys, self.rows).movedim(-1, 2)

    def add(self, total: torch.Tensor, part: torch.Tensor) -> None:
        """Add part [B,count,keys,G,D] to total [B,K,G,D]: the first `rows` keys, then what runs into the next."""
        middle, stop = self.first_key + self.rows, self.first_key + self.count * self.rows
        total[:, self.first_key : stop].unflatten(1, (self.count, self.rows)).add_(part[:, :, : self.rows])
        if over := self.keys - self.rows:
            total[:, middle : stop + over].unfold(1, over, self.rows).movedim(-1, 2).add_(part[:, :, self.rows :])


def stretches(T: int, K: int, w: int, rows: int, most: int) -> list[Stretch]:
    """Cut the last T of K positions into problems of `rows` >= w queries, at most `most` equal ones to a stretch."""
    found: list[Stretch] = []
    for start in range(0, T, rows):
        stop = min(start + rows, T)
        first_key = max(0, K - T + start - w + 1)
        one = Stretch(1, stop - start, K - T + stop - first_key, start, first_key)
        last = found[-1] if found else None
        if last and (last.rows, last.keys) == (one.rows, one.keys) and last.count < most:
            found[-1] = replace(last, count=last.count + 1)
        else:
            found.append(one)
    return found


def reads(T: int, K: int, w: int) -> int:
    """Keys that T queries at the end of K are handed: each its own and those before it, w at most."""
    shortest = K - T + 1
    short = min(max(w - shortest, 0), T)
    return short * shortest + short * (short - 1) // 2 + (T - short) * w


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: None, p: Pattern, S: int, count: bool, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out [B,T,H,Dv], lse [B,T,H] fp32, and the keys read [B,G] or []. Shapes as the op's."""
    _, k, v = held(k, v, S)
    T, K, D = q.shape[1], k.shape[1], q.shape[3]
    first_key = max(0, K - T - p.w + 1)
    k, v = k[:, first_key:], v[:, first_key:]
    # One query sees just its own keys: without a band FA-2 spreads them over the card.
    out, lse = operators.forward(backend, q, k, v, D**-0.5, causal=True, window=None if T == 1 else p.w)
    n = reads(T, K, p.w) if count else 0
    return out, lse.transpose(1, 2), q.new_full((q.shape[0], k.shape[2]) if count else (0,), n, dtype=torch.int64)


def backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: None, out: torch.Tensor,
    lse: torch.Tensor, p: Pattern, S: int, backend: str, gate: torch.Tensor | None, delta: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """dq, dk, dv of `forward`'s out; keys that two problems share are summed in fp32."""
    dout, (_, k_held, v_held) = gated(dout, gate), held(k, v, S)
    B, T, H, D = q.shape
    rows = max(_PROBLEM_WINDOWS * p.w, _PROBLEM_QUERIES)
    most = max(1, operators.CALL_ELEMENTS // (B * rows * H * D))
    dq = q.new_empty(q.shape)
    dk, dv = (x.new_zeros(x.shape, dtype=torch.float32) for x in (k_held, v_held))
    for part in stretches(T, k_held.shape[1], p.w, rows, most):
        grads = operators.backward(
            backend,
            part.queries(dout).flatten(0, 1),
            part.queries(q).flatten(0, 1),
            part.shared_keys(k_held).flatten(0, 1),
            part.shared_keys(v_held).flatten(0, 1),
            part.queries(out).flatten(0, 1),
            part.queries(lse).flatten(0, 1).transpose(1, 2),
            D**-0.5,
            causal=True,
            window=p.w,
        )
        part_dq, part_dk, part_dv = (x.unflatten(0, (B, part.count)) for x in grads)
        part.queries(dq).copy_(part_dq)
        part.add(dk, part_dk)
        part.add(dv, part_dv)
    return dq, all_rows(dk.to(k.dtype), k), all_rows(dv.to(v.dtype), v)
