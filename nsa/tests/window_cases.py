"""One call of the window's Triton kernels, forward and backward, beside the specification in fp64.

The interpreter on a CPU and a GPU run the same cases; what a case demands is the same on both.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from nsa import NSAConfig
from nsa.kernels.flash.window import reads
from nsa.ops.window import sliding_window_attention_reference
from nsa.testing import inputs, oracle

# Of the norm of a result: fp32 arithmetic, or one rounding of the probabilities and of the result.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def run(
    shape: tuple[int, ...],
    w: int,
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    contiguous: bool = True,
    gated: bool = False,
    guard: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...], torch.Tensor]:
    """(q, k, v, gradient of out), (out, dq, dk, dv), lse for (B, T, S, G, R, Dk, Dv).

    What torch.empty returns is NaN: a result that holds was written, all of it. Gated, the kernels are handed
    the gate in lse, the gradient's products with the output, and no output.
    """
    from nsa.kernels import window

    B, T, S, G, R, Dk, Dv = shape
    p = NSAConfig(w=w).pattern
    q, k, v = inputs(B, T, S, G=G, R=R, Dk=Dk, Dv=Dv, dtype=dtype, contiguous=contiguous, device=device)
    dout = inputs(B, T, S, G=G, R=R, Dk=Dv, dtype=dtype, contiguous=contiguous, device=device, seed=1).q
    torch.use_deterministic_algorithms(True)
    try:
        with guard():
            out, lse, _ = window.forward(q, k, v, None, p, S, False, "triton")
            past, folded, delta = out, lse, None
            if gated:
                gate = gates(out)
                past, folded, delta = (
                    torch.full_like(out, torch.nan),
                    lse - gate.log(),
                    (dout.float() * out.float()).sum(-1),
                )
            grads = window.backward(dout, q, k, v, None, past, folded, p, S, "triton", None, delta)
    finally:
        torch.use_deterministic_algorithms(False)
    upstream = dout.double() * gates(out).double().unsqueeze(-1) if gated else dout
    return (q, k, v, upstream), (out, *grads), lse


def gates(out: torch.Tensor) -> torch.Tensor:
    """Gates of the rows, closed ones and open ones among them, [B,T,H] fp32."""
    gate = torch.rand(out.shape[:3], generator=torch.Generator().manual_seed(2)).to(out.device)
    gate.flatten()[::5], gate.flatten()[1::7] = 0.0, 1.0
    return gate


def excess(shape: tuple[int, ...], w: int, dtype: torch.dtype, patience: float = 1.0, **more: Any) -> dict[str, float]:
    """By name, errors above the tolerance of output, gradients and lse against the specification's in fp64."""
    tensors, got, lse = run(shape, w, dtype, **more)
    q, k, v, dout = (x.cpu().double() for x in tensors)
    leaves = tuple(x.requires_grad_() for x in (q, k, v))
    T, S, R = shape[1], shape[2], shape[4]
    want = sliding_window_attention_reference(q, k, v, NSAConfig(w=w), seq_len=S)
    wanted = (want, *torch.autograd.grad(want, leaves, dout))
    with torch.no_grad():
        scores = torch.einsum("bthd,bshd->bths", q, k.repeat_interleave(R, 2)) * shape[5] ** -0.5
        t, s = torch.arange(S - T, S)[:, None], torch.arange(S)
        want_lse = scores.masked_fill(~((s <= t) & (s > t - w))[:, None], float("-inf")).logsumexp(-1)
    assert reads(T, S, w) == int(oracle.count(oracle.seen_window(T, 1, 1, NSAConfig(w=w), S)))
    # Where a window is one key, dq and dk are 0 but for rounding: held against dout's norm.
    scale = float(dout.norm()) if w == 1 or S == 1 else 0.0
    pairs = zip(("out", "dq", "dk", "dv", "lse"), (*got, lse), (*wanted, want_lse), strict=True)
    errors = {
        name: float((a.cpu().double() - b.detach()).norm() / max(float(b.detach().norm()), scale))
        for name, a, b in pairs
    }
    return {name: error for name, error in errors.items() if not error <= patience * TOLERANCE[dtype]}
