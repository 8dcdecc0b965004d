"""Softmax cross-entropy of a buffer of logits, turned in place into its gradient: a program owns a row.

One pass finds the row's maximum and the sum of its exponentials, a second writes p - onehot over the logits. All fp32,
rounded once, when it is written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nsa.kernels.primitives import LOG2E, on_device

# Columns that a program holds at a time, and its warps: 16 columns a thread, few enough that four rows share an SM.
_COLUMNS, _WARPS = 4096, 8
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def cross_entropy(
    Logits, Targets, Losses, stride, V, width,
    LOG2E: tl.constexpr, GRAD: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    Logits += row * stride
    target = tl.load(Targets + row)
    counts = target != -100
    known = (target >= 0) & (target < V)
    x_target = tl.load(Logits + target, mask=known, other=0.0).to(tl.float32)
    columns = tl.arange(0, COLUMNS)

    # In powers of two. The first columns are never all padding, so the maximum is a number from then on.
    top = tl.full((), float("-inf"), tl.float32)
    sums = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, V, COLUMNS):
        inside = first + columns < V
        x = tl.load(Logits + first + columns, mask=inside, other=float("-inf")).to(tl.float32) * LOG2E
        higher = tl.maximum(top, tl.max(x, 0))
        sums = sums * tl.exp2(top - higher) + tl.exp2(x - higher)
        top = higher
    total = tl.sum(sums, 0)
    loss = (top + tl.log2(total)) / LOG2E - x_target
    # A target that is no column has no loss to speak of: the trainer stops at the NaN.
    loss = tl.where(known, loss, float("nan"))
    tl.store(Losses + row, tl.where(counts, loss, 0.0))

    if GRAD:
        scale = tl.where(counts, 1.0 / total, 0.0)
        for first in range(0, width, COLUMNS):
            at = first + columns
            x = tl.load(Logits + at, mask=at < V, other=float("-inf")).to(tl.float32) * LOG2E
            p = tl.exp2(x - top) * scale
            p = tl.where((at == target) & counts, p - 1.0, p)
            # A row that does not count is 0 whatever its logits are; so is padding.
            p = tl.where(counts & (at < V), p, 0.0)
            tl.store(Logits + at, p.to(Logits.dtype.element_ty), mask=at < width)


def unsupported(backend: str, logits: torch.Tensor) -> list[str]:
    """Reasons why these logits cannot be taken; none if they can."""
    if logits.dtype in _DTYPES:
        return []
    return [f"{backend} takes bf16, fp16 or fp32, not {logits.dtype}"]


def losses_(logits: torch.Tensor, targets: torch.Tensor, V: int, losses: torch.Tensor, *, gradient: bool) -> None:
    """Write every row's loss and, with `gradient`, the loss's gradient over the logits.

    Losses are in nats, fp32, 0 where the target is -100. logits [rows, width], last stride 1, of which the first V
    columns are real: the rest is never read, and gets 0.
    targets [rows] int64; losses [rows] fp32.
    """
    rows, width = logits.shape
    if rows:
        with on_device(logits):
            cross_entropy[(rows,)](
                logits, targets, losses, logits.stride(0), V, width,
                LOG2E=LOG2E, GRAD=gradient, COLUMNS=_COLUMNS, num_warps=_WARPS,
            )  # fmt: skip
