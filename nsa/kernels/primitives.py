"""What the Triton kernels share: predicates and bit counts on the device, padding and launch devices on the host."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl

LOG2E = 1.4426950408889634


@triton.jit
def visible(block, t, L: tl.constexpr):
    """Whether a listed block is one that the query at position t may see; -1 and any index out of range are not.

    Compared in blocks: block * L may pass 2^31 for an index that is no block at all.
    """
    return (block >= 0) & (block <= t // L)


@triton.jit
def popcount(x):
    """Bits set in each int32."""
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


def padded(size: int) -> int:
    """The least extent of a `tl.dot` operand that holds `size`: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(size))


def on_device(x: torch.Tensor) -> AbstractContextManager[object]:
    """Launches inside go to x's device, not to the process's current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def precision(dtype: torch.dtype) -> str:
    """`input_precision` of every dot: fp32 inputs are multiplied as fp32, not as tf32."""
    return "ieee" if dtype == torch.float32 else "tf32"
