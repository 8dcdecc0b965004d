"""What counts as equal: the low-precision error budget, the regret of a selection, the shape of a block list."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nsa.config import NSAConfig

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
_TIE = 1e-6  # relative difference of two scores


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The yardstick: matmul, softmax, matmul in the input dtype, scores rounded to it. -> [B,T,H,Dv]

    q [B,T,H,Dk], k [B,S,G,Dk], v [B,S,G,Dv]; mask bool, broadcastable to [B,H,T,S], True where a query may look.
    A query that may look nowhere gives 0.
    """
    group = q.shape[2] // k.shape[2]
    query = q.transpose(1, 2)
    key = k.repeat_interleave(group, dim=2).transpose(1, 2)
    value = v.repeat_interleave(group, dim=2).transpose(1, 2)
    scores = (query @ key.transpose(-1, -2)) * q.shape[-1] ** -0.5
    hidden = ~mask.expand(scores.shape)
    blind = hidden.all(-1, keepdim=True)
    p = scores.masked_fill(hidden & ~blind, -torch.inf).softmax(-1).masked_fill(blind, 0)
    return (p @ value).transpose(1, 2)


def within_budget(got: Tensor, yardstick: Tensor, exact: Tensor, name: str) -> list[str]:
    """Complaints if `got` is further from `exact` (fp64) than the yardstick allows: rms 1.5x, max-abs 2x, each plus
    eps(dtype)/8 of the tensor's rms. Non-finite values, another shape or another dtype are complaints too.

    fp32 has two allowances that in half precision would be nothing. The sum is its only rounding, and a matmul sums as
    its shape suggests: for one query, or one head, a GPU splits it, and the yardstick is two to three times nearer than
    for the next shape. So 4 eps of the rms is added, 16 eps to the largest error. And a gradient ("dQ") may be four
    times as far: a backward from a saved fp32 logsumexp has its rounding, |lse| * eps/2, in every weight, which eager's
    softmax has not.
    """
    if got.shape != exact.shape or got.dtype != yardstick.dtype:
        return [f"{name}: {tuple(got.shape)} {got.dtype}, expected {tuple(exact.shape)} {yardstick.dtype}"]
    if not got.isfinite().all():
        return [f"{name}: {int((~got.isfinite()).sum())} non-finite values"]
    single = got.dtype == torch.float32
    ulp = torch.finfo(got.dtype).eps * float(exact.square().mean().sqrt())
    error, allowed = (got.double() - exact).abs(), (yardstick.double() - exact).abs()
    patience = 4 if single and name.startswith("d") else 1
    complaints = []
    for what, ours, theirs, factor, ulps in (
        ("rms", error.square().mean().sqrt(), allowed.square().mean().sqrt(), 1.5, 4 if single else 1 / 8),
        ("max-abs", error.max(), allowed.max(), 2.0, 16 if single else 1 / 8),
    ):
        if float(ours) > patience * (factor * float(theirs) + ulps * ulp):
            limit = f"{patience} x ({factor} x {float(theirs):.3e} + {ulps * ulp:.1e})"
            complaints.append(f"{name}: {what} error {float(ours):.3e}, budget {limit}")
    return complaints


def assert_within_budget(run: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, seed: int = 0) -> None:
    """Output and all gradients of `run(q, k, v)` -> [B,T,H,Dv] stay within the budget of `eager` under `mask`.

    Errors are against fp64 on the same rounded inputs, with one random upstream gradient in the inputs' dtype.
    """
    shape = (*q.shape[:3], v.shape[-1])
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(q)

    def tensors(attention: Attention, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = attention(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]

    def yardstick(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return eager(q, k, v, mask)

    exact = tensors(yardstick, torch.float64)
    theirs = tensors(yardstick, q.dtype)
    ours = tensors(run, q.dtype)
    complaints = [
        complaint
        for name, a, b, c in zip(("out", "dQ", "dK", "dV"), ours, theirs, exact, strict=True)
        for complaint in within_budget(a, b, c, name)
    ]
    assert not complaints, "; ".join(complaints)


def assert_same(
    run: Callable[..., Tensor], expected: Callable[..., Tensor], *leaves: Tensor, tol: float = 1e-12
) -> None:
    """Output and the gradient of every leaf agree to `tol`, under one random upstream gradient."""

    def tensors(function: Callable[..., Tensor]) -> list[Tensor]:
        fresh = [leaf.detach().requires_grad_() for leaf in leaves]
        out = function(*fresh)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(out)
        return [out.detach(), *torch.autograd.grad(out, fresh, grad, materialize_grads=True)]

    for index, (got, want) in enumerate(zip(tensors(run), tensors(expected), strict=True)):
        name = "output" if index == 0 else f"gradient of input {index - 1}"
        assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
        assert got.dtype == want.dtype, f"{name}: {got.dtype}, expected {want.dtype}"
        assert torch.allclose(got, want, rtol=tol, atol=tol), f"{name}: off by {(got - want).abs().max():.3e}"


def check_blocks(blocks: Tensor, S: int, T: int, cfg: NSAConfig) -> list[str]:
    """Every property of a block list [B,T,G,N] that does not hold, with the first place where it fails."""
    if blocks.dim() != 4 or blocks.shape[1] != T or blocks.shape[3] != cfg.n_sel:
        return [f"shape {tuple(blocks.shape)}, expected [B, {T}, G, {cfg.n_sel}]"]
    complaints = [] if blocks.dtype == torch.int32 else [f"dtype {blocks.dtype}, expected torch.int32"]
    listed = blocks.long().cpu()
    own = torch.arange(S - T, S).div(cfg.l_sel, rounding_mode="floor").view(1, T, 1, 1)
    empty = listed < 0
    later, earlier = listed[..., 1:], listed[..., :-1]
    first = torch.arange(cfg.init_blocks).expand(1, T, 1, -1)
    local = own - torch.arange(cfg.local_blocks)
    held = (listed[..., None] == torch.cat([first, local], -1)[..., None, :]).any(-2)
    wanted = torch.cat([first <= own, local >= 0], -1)
    expected = (own + 1).clamp(max=cfg.n_sel)[..., 0]
    violations = {
        "empty slots are -1": empty & (listed != -1),
        "empty slots come last": empty[..., :-1] & ~empty[..., 1:],
        "ascending": ~empty[..., 1:] & ~empty[..., :-1] & (later < earlier),
        "unique": ~empty[..., 1:] & ~empty[..., :-1] & (later == earlier),
        "no block beyond the query's own": ~empty & (listed > own),
        "forced blocks are there": wanted & ~held,
        "as many blocks as there are candidates, up to n_sel": (~empty).sum(-1) != expected,
    }
    for name, bad in violations.items():
        if bad.any():
            b, i, g = bad.nonzero()[0][:3].tolist()
            row = blocks[b, i, g].tolist()
            complaints.append(f"{name}: {int(bad.sum())} times, first at b={b} t={S - T + i} g={g}: {row}")
    return complaints


def regrets(blocks: Tensor, scores: Tensor, reference: Tensor) -> tuple[float, float]:
    """(share of rows that lose score by a swap, largest relative loss of one).

    blocks, reference [B,T,G,N]; scores [B,T,G,M] fp64, from the same compressed keys. A loss of `_TIE` or less is the
    rounding of fp32, which no kernel can tell from a tie: on another machine other rows have one.
    """
    differing, worst = 0, 0.0
    ours, theirs = blocks.flatten(0, 2).tolist(), reference.flatten(0, 2).tolist()
    for row, ref, score in zip(ours, theirs, scores.flatten(0, 2).tolist(), strict=True):
        gained = sorted(score[m] for m in set(row) - set(ref))
        lost = sorted(score[m] for m in set(ref) - set(row))
        pairs = zip(gained, lost, strict=True)
        loss = max([(displaced - got) / displaced if displaced > 0 else 0.0 for got, displaced in pairs], default=0.0)
        differing, worst = differing + (loss > _TIE), max(worst, loss)
    return differing / max(1, len(ours)), worst


def assert_low_regret(blocks: Tensor, scores: Tensor, reference: Tensor) -> None:
    """A choice on random inputs may swap near-ties only: within 1e-3 relative, in at most 0.2% of the rows."""
    share, worst = regrets(blocks, scores, reference)
    assert worst <= 1e-3, f"a chosen block scores {worst:.2e} (relative) below the one it displaced"
    assert share <= 2e-3, f"{share:.2%} of the rows differ"
