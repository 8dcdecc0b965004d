"""The sliding window by kernels that skip the keys outside the band: Triton's, or torch's fused operators."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from nsa.kernels import fused

# Queries that the backward makes one problem of, in windows and at least: where equal runs must give equal bits, FA-2
# walks the keys of a problem one after the other, so many problems keep the card busy.
_PROBLEM_WINDOWS, _PROBLEM_QUERIES = 4, 1024


def unsupported(backend: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[str]:
    """Reasons against a backend for q [B,T,H,Dk], k [B,K,G,Dk], v [B,K,G,Dv]."""
    if backend == "triton":
        from nsa.kernels import banded

        return banded.unsupported(q, v)
    return fused.unsupported(backend, q, v)


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
    backend: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, w: int
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """out [B,T,H,Dv], lse [B,T,H] fp32, and the keys read by one batch row and group.

    q [B,T,H,Dk] are the last T of the K positions that k [B,K,G,Dk] and v [B,K,G,Dv] hold.
    """
    T, D = q.shape[1], q.shape[3]
    if backend == "triton":
        from nsa.kernels import banded

        return *banded.forward(q, k, v, w), reads(T, k.shape[1], w)
    first_key = max(0, k.shape[1] - T - w + 1)
    k, v = k[:, first_key:], v[:, first_key:]
    # One query sees just its own keys: without a band FA-2 spreads them over the card.
    out, lse = fused.forward(backend, q, k, v, D**-0.5, causal=True, window=None if T == 1 else w)
    return out.contiguous(), lse.transpose(1, 2).contiguous(), reads(T, k.shape[1], w)


def backward(
    backend: str,
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    w: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv of `forward`'s out; keys that two problems share are summed in fp32."""
    if backend == "triton":
        from nsa.kernels import banded

        return banded.backward(dout, q, k, v, out, lse, w)
    B, T, H, D = q.shape
    rows = max(_PROBLEM_WINDOWS * w, _PROBLEM_QUERIES)
    most = max(1, fused.CALL_ELEMENTS // (B * rows * H * D))
    dq = q.new_empty(q.shape)
    dk, dv = (x.new_zeros(x.shape, dtype=torch.float32) for x in (k, v))
    for part in stretches(T, k.shape[1], w, rows, most):
        grads = fused.backward(
            backend,
            part.queries(dout).flatten(0, 1),
            part.queries(q).flatten(0, 1),
            part.shared_keys(k).flatten(0, 1),
            part.shared_keys(v).flatten(0, 1),
            part.queries(out).flatten(0, 1),
            part.queries(lse).flatten(0, 1).transpose(1, 2),
            D**-0.5,
            causal=True,
            window=w,
        )
        part_dq, part_dk, part_dv = (x.unflatten(0, (B, part.count)) for x in grads)
        part.queries(dq).copy_(part_dq)
        part.add(dk, part_dk)
        part.add(dv, part_dv)
    return dq, dk.to(k.dtype), dv.to(v.dtype)
