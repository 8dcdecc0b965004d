"""One call of the compressed branch's Triton kernels, forward and backward, beside the specification in fp64.

The interpreter on a CPU and a GPU run the same cases; what a case demands is the same on both.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

from nsa import NSAConfig
from nsa.blocks import n_compressed
from nsa.ops.compressed import compressed_attention_reference
from nsa.testing import inputs, oracle

# Of the norm of a result: fp32 arithmetic, or one rounding of the probabilities and of the result.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
PAPER = NSAConfig(l=32, d=16, l_sel=64, n_sel=4)
SMALL = NSAConfig(l=8, d=4, l_sel=16, n_sel=4, w=20)


class Case(NamedTuple):
    """Tensors of one call: queries, the compressed keys that the lengths have, upstream gradient, gate or None."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    gate: torch.Tensor | None


@contextmanager
def settings(**values: Any) -> Iterator[None]:
    """Other bounds, or another launch table, for the kernels' host code."""
    from nsa.kernels import compressed

    stock = {name: vars(compressed)[name] for name in values}
    vars(compressed).update(values)
    compressed._pieces.cache_clear()
    compressed._sizes.cache_clear()
    try:
        yield
    finally:
        vars(compressed).update(stock)
        compressed._pieces.cache_clear()
        compressed._sizes.cache_clear()


def case(
    shape: tuple[int, ...], cfg: NSAConfig, dtype: torch.dtype, gated: bool, device: str, contiguous: bool = True
) -> Case:
    """Of (B, T, S, G, R, Dk, Dv)."""
    B, T, S, G, R, Dk, Dv = shape
    C = n_compressed(S, cfg)
    more: dict[str, Any] = {"G": G, "R": R, "dtype": dtype, "contiguous": contiguous, "device": device}
    q, k, v = inputs(B, T, C, Dk=Dk, Dv=Dv, **more)
    dout = inputs(B, T, C, Dk=Dv, seed=1, **more).q
    gate = torch.rand(B, T, G * R, generator=torch.Generator().manual_seed(2)).to(device) if gated else None
    return Case(q, k, v, dout, gate)


def run(
    given: Case, cfg: NSAConfig, S: int, lengths: torch.Tensor | None = None,
    guard: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """out, dq, dk, dv, lse, reads. What torch.empty returns is NaN: a result that holds was written, all of it."""
    from nsa.kernels import compressed

    q, k, v, dout, gate = given
    torch.use_deterministic_algorithms(True)
    try:
        with guard():
            out, lse, reads = compressed.forward(q, k, v, None, cfg.pattern, S, True, "triton", lengths=lengths)
            past, delta, folded = out, None, lse
            if gate is not None:
                past, delta = torch.full_like(out, torch.nan), (dout.float() * out.float()).sum(-1)
                folded = lse - gate.log()
            grads = compressed.backward(
                dout, q, k, v, None, past, folded, cfg.pattern, S, "triton", None, delta, lengths=lengths
            )
    finally:
        torch.use_deterministic_algorithms(False)
    return out, *grads, lse, reads


def wanted(given: Case, cfg: NSAConfig, lengths: list[int]) -> tuple[torch.Tensor, ...]:
    """out, dq, dk, dv, lse of the specification in fp64, each batch row by itself."""
    q, k, v, dout = (x.cpu().double() for x in given[:4])
    gate = torch.ones(q.shape[:3]) if given.gate is None else given.gate.cpu().double()
    out, lse = q.new_zeros(dout.shape), q.new_full(q.shape[:3], -torch.inf)
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for b, S in enumerate(lengths):
        at, C = slice(max(0, q.shape[1] - S), None), n_compressed(S, cfg)
        if not S:
            continue
        leaves = tuple(x[b : b + 1].clone().requires_grad_() for x in (q[:, at], k[:, :C], v[:, :C]))
        row_out, row_lse = compressed_attention_reference(leaves[0], leaves[1], leaves[2], cfg, seq_len=S)
        upstream = (dout * gate.unsqueeze(-1))[b : b + 1, at]
        grads = torch.autograd.grad(row_out, leaves, upstream)
        out[b, at], lse[b, at], dq[b, at] = row_out[0].detach(), row_lse[0], grads[0][0]
        dk[b, :C], dv[b, :C] = grads[1][0], grads[2][0]
    return out, dq, dk, dv, lse


def excess(
    shape: tuple[int, ...], cfg: NSAConfig, dtype: torch.dtype, patience: float = 1.0, *, gated: bool = False,
    lengths: list[int] | None = None, device: str = "cpu", contiguous: bool = True,
    guard: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> dict[str, float]:  # fmt: skip
    """By name, errors above the tolerance of output, gradients and lse; reads that are not the oracle's."""
    B, T, S, G, _, _, _ = shape
    given = case(shape, cfg, dtype, gated, device, contiguous)
    rows = None if lengths is None else torch.tensor(lengths, dtype=torch.int32, device=device)
    *got, reads = run(given, cfg, S, rows, guard)
    each = lengths or [S] * B
    want = wanted(given, cfg, each)
    found = dict(zip(("out", "dq", "dk", "dv", "lse"), map(_error, got, want), strict=True))
    if max(map(n_compressed, each, [cfg] * B)) <= 1:
        # A softmax over one key has no gradient but rounding: held against dout's norm.
        found |= {name: found[name] * float(want[i].norm() / given.dout.norm()) for i, name in ((1, "dq"), (2, "dk"))}
    counts = [oracle.count(oracle.seen_compressed(min(T, n), 1, G, cfg, n))[0] if n else [0] * G for n in each]
    return {name: error for name, error in found.items() if not error <= patience * TOLERANCE[dtype]} | (
        {} if reads.tolist() == [list(map(int, row)) for row in counts] else {"reads": float(reads.sum())}
    )


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Of want's norm; rows without a block must be -inf in both."""
    got = got.cpu().double()
    if not torch.equal(got.isneginf(), want.isneginf()):
        return torch.inf
    got, want = (x.masked_fill(x.isneginf(), 0.0) for x in (got, want))
    norm = float(want.norm())
    return float((got - want).norm()) / norm if norm else float(got.norm())
