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


def in_a_wider_row(logits: torch.Tensor) -> torch.Tensor:
    """The same logits as the last columns of a fused projection's rows, the others of which are NaN."""
    B, T, H, _ = logits.shape
    wide = logits.new_full((B, T, 5 + 3 * H), torch.nan)
    wide[..., 5:] = logits.flatten(2)
    return wide[..., 5:].unflatten(-1, (H, 3))


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


def folded(
    inputs: list[torch.Tensor], softmax: bool, guard: Callable[[], AbstractContextManager[None]] = nullcontext
) -> list[str]:
    """Where `fold` is further from fp64 than a dtype's sums allow: lses, deltas and the gradient of the logits."""
    from nsa.kernels import combine as kernel

    cmp, sel, win, dout, logits = inputs
    generator = torch.Generator().manual_seed(5)
    lses = tuple(torch.randn(dout.shape[:3], generator=generator).to(dout.device) for _ in range(3))
    torch.use_deterministic_algorithms(True)
    try:
        with guard():
            d_logits, *rows = kernel.fold(dout, (cmp, sel, win), lses, logits, softmax)
    finally:
        torch.use_deterministic_algorithms(False)
    exact = logits.detach().double().requires_grad_()
    g = exact.softmax(-1) if softmax else exact.sigmoid()
    branches = torch.stack([x.double() for x in (cmp, sel, win)])
    products = (dout.double() * branches).sum(-1)
    wanted = torch.autograd.grad((g.movedim(-1, 0) * products).sum(), exact)[0]
    g = g.detach().movedim(-1, 0)
    logs = (exact.log_softmax(-1) if softmax else torch.nn.functional.logsigmoid(exact)).detach().movedim(-1, 0)
    # Of what is summed, a share of which may cancel.
    each = (dout.double() * branches).abs().sum(-1)
    most = (each * g).sum(0)
    found = []
    for name, got, want, size, eps in (
        ("lses", rows[0], torch.stack(lses).double() - logs, 1 + logs.abs(), 2e-6),
        ("deltas", rows[1], products, each, 2e-6),
        ("d_logits", d_logits, wanted, most.unsqueeze(-1), max(2e-6, torch.finfo(logits.dtype).eps)),
    ):
        want_dtype = logits.dtype if name == "d_logits" else torch.float32
        if (got.shape, got.dtype, got.is_contiguous()) != (want.shape, want_dtype, True):
            found.append(f"{name}: {tuple(got.shape)} {got.dtype}, strides {got.stride()}")
        elif not bool(((got.double() - want).abs() <= eps * size).all()):
            found.append(f"{name} off by {float(((got.double() - want).abs() / size).nan_to_num(torch.inf).max()):.1e}")
    return found


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
