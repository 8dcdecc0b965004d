"""One call of the gated sum by its Triton kernels, forward and backward, beside the plain form and fp64.

The interpreter on a CPU and a GPU run the same cases; what a case demands is the same on both.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from nsa.config import NSAConfig
from nsa.ops.combine import combine
from nsa.testing import within_budget

NAMES = ("out", "d_cmp", "d_sel", "d_win", "d_logits")


def tensors(
    shape: tuple[int, ...], dtype: torch.dtype, *, contiguous: bool = True, device: str = "cpu", scale: float = 2.0
) -> list[torch.Tensor]:
    """Branch outputs, the output's gradient, each [B,T,H,D], and logits [B,T,H,3]; every one strided in another way
    unless contiguous."""
    generator = torch.Generator().manual_seed(3)
    *rows, D = shape
    made = [torch.randn(*rows, n, generator=generator) * (scale if n == 3 else 1) for n in (D, D, D, D, 3)]
    made = [x.to(device, dtype) for x in made]
    if contiguous:
        return made
    cmp, sel, win, dout, logits = made
    return [
        cmp.transpose(1, 2).contiguous().transpose(1, 2),
        sel.repeat_interleave(2, 3)[..., ::2],
        win.transpose(2, 3).contiguous().transpose(2, 3),
        dout[:, :, :1].expand(shape),
        logits.movedim(-1, 0).contiguous().movedim(0, -1),
    ]


def by_kernel(
    inputs: list[torch.Tensor], softmax: bool, guard: Callable[[], AbstractContextManager[None]] = nullcontext
) -> tuple[torch.Tensor, ...]:
    """Output and gradients. What torch.empty returns is NaN: a result that holds was written, all of it."""
    from nsa.kernels import combine as kernel

    cmp, sel, win, dout, logits = inputs
    torch.use_deterministic_algorithms(True)
    try:
        with guard():
            out = kernel.forward(cmp, sel, win, logits, softmax)
            return out, *kernel.backward(dout, cmp, sel, win, logits, softmax)
    finally:
        torch.use_deterministic_algorithms(False)


def by_autograd(
    inputs: list[torch.Tensor], softmax: bool, dtype: torch.dtype, backend: str | None
) -> list[torch.Tensor]:
    """Output and gradients of `combine` in a dtype."""
    cfg = NSAConfig(gate="softmax" if softmax else "sigmoid")
    cmp, sel, win, dout, logits = (x.detach().to(dtype) for x in inputs)
    leaves = [x.requires_grad_() for x in (cmp, sel, win, logits)]
    out = combine(cmp, sel, win, logits, cfg, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def complaints(inputs: list[torch.Tensor], got: tuple[torch.Tensor, ...], softmax: bool) -> list[str]:
    """Where `got` is further from fp64 than the plain form in the inputs' dtype, by the budget of semantics."""
    exact = by_autograd(inputs, softmax, torch.float64, "reference")
    plain = by_autograd(inputs, softmax, inputs[0].dtype, "reference")
    found = []
    for name, a, b, c in zip(NAMES, got, plain, exact, strict=True):
        if not a.is_contiguous():
            found.append(f"{name} has strides {a.stride()}")
        found += within_budget(a, b, c, name.removeprefix("d_"))
    return found
