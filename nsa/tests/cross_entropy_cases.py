"""One call of the cross-entropy kernel beside fp64; the interpreter on a CPU and a GPU run the same cases."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F

from nsa.ops.linear_cross_entropy import padded


def tensors(rows: int, V: int, dtype: torch.dtype, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [rows, padded(V)], NaN in the padding, and targets of which the second does not count."""
    generator = torch.Generator().manual_seed(V)
    logits = torch.full((rows, padded(V)), float("nan"))
    logits[:, :V] = 3 * torch.randn(rows, V, generator=generator)
    targets = torch.randint(V, (rows,), generator=generator)
    targets[0] = V - 1
    targets[1:2] = -100
    return logits.to(device, dtype), targets.to(device)


def by_kernel(
    logits: torch.Tensor,
    targets: torch.Tensor,
    V: int,
    guard: Callable[[], AbstractContextManager[None]] = nullcontext,
    *,
    gradient: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses, NaN where the kernel wrote none, and the buffer after it; `logits` stay as they are."""
    from nsa.kernels import cross_entropy as kernel

    buffer, losses = logits.clone(), torch.full((len(logits),), float("nan"), device=logits.device)
    with guard():
        kernel.losses_(buffer, targets, V, losses, gradient=gradient)
    return losses, buffer


def complaints(
    logits: torch.Tensor, targets: torch.Tensor, V: int, got: tuple[torch.Tensor, torch.Tensor | None]
) -> list[str]:
    """Where losses, fp32, or the gradient, rounded once to the logits' type, are not fp64's."""
    wide = logits[:, :V].double().requires_grad_()
    exact = F.cross_entropy(wide, targets, reduction="none")
    losses, gradient = got
    found = []
    if not torch.allclose(losses.double(), exact, rtol=1e-5, atol=1e-5):
        found.append(f"losses are off by {(losses - exact).abs().max():.2e}")
    if gradient is None:
        return found
    (want,) = torch.autograd.grad(exact.sum(), wide)
    eps = torch.finfo(logits.dtype).eps
    smallest = torch.finfo(logits.dtype).smallest_normal
    off = (gradient[:, :V].double() - want).abs() - (eps * want.abs() + 1e-5 * want.abs() + smallest)
    if not bool((off <= 0).all()):
        found.append(f"the gradient is off by {off.max():.2e} more than its rounding")
    if not bool((gradient[:, V:] == 0).all()):
        found.append("the padding has a gradient")
    return found
