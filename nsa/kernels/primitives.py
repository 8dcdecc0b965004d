"""What the Triton kernels share: predicates and bit counts on the device, padding and launch devices on the host."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

LOG2E = 1.4426950408889634
# Triton 3.0's pipeliner overlooks what is used inside a branch: "operation scheduled before its operands".
BLIND_TO_BRANCHES = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 2)
# Strides and head dims are whole multiples of it, so that every load is of 16 bytes and overlaps arithmetic. Loads of
# single elements gave a wrong dq on an H200.
_EVEN = 16


@triton.jit
def visible(block, t, L: tl.constexpr):
    """Whether a listed block is one that the query at position t may see; -1 and any index out of range are not.

    Compared in blocks: block * L may pass 2^31 for an index that is no block at all.
    """
    return (block >= 0) & (block <= t // L)


@triton.jit
def far(block, t, L: tl.constexpr):
    """Whether a listed block is visible and neither block 0 nor the query's own nor the one before."""
    return (block > 0) & (block < t // L - 1)


@triton.jit
def popcount(x):
    """Bits set in each int32."""
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def exp2(x, IP: tl.constexpr):
    """2^x for x <= 0, -inf included; for fp32 inputs to about one rounding, where the hardware's own is off by four."""
    if IP == "ieee":
        n = tl.floor(tl.maximum(x, -126.0) + 0.5)
        f = (tl.maximum(x, -126.0) - n) * 0.6931471805599453
        y = 1.0 + f * (1.0 + f * (1 / 2 + f * (1 / 6 + f * (1 / 24 + f * (1 / 120 + f * (1 / 720 + f * (1 / 5040)))))))
        power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
        return tl.where(x < -126.0, 0.0, y * power)
    else:
        return tl.exp2(x)


@triton.jit
def load_rows(at, ok, d, D: tl.constexpr):
    """Vectors at the pointers [n, padded D], 0 where `ok` [n] is not."""
    return tl.load(at, mask=ok[:, None] & (d[None, :] < D), other=0.0)


@triton.jit
def in_units(lse, IP: tl.constexpr):
    """A natural lse in units of log 2, but for fp32: its product would be rounded, and a row's error with it."""
    return lse if IP == "ieee" else lse * 1.4426950408889634


@triton.jit
def weights(s, lse, scale, IP: tl.constexpr):
    """Probabilities of scores s; lse as `in_units` left it, broadcast beside them."""
    if IP == "ieee":
        return exp2((s * scale - lse) * 1.4426950408889634, IP)
    else:
        return exp2(s * (scale * 1.4426950408889634) - lse, IP)


def padded(size: int) -> int:
    """The least extent of a `tl.dot` operand that holds `size`: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(size))


def on_device(x: torch.Tensor) -> AbstractContextManager[object]:
    """Launches inside go to x's device, not to the process's current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def capability(x: torch.Tensor) -> int:
    """Compute capability of x's card, as 90 for 9.0; of the newest card with an entry where there is no card."""
    if not x.is_cuda:
        return 90
    major, minor = torch.cuda.get_device_capability(x.device)
    return major * 10 + minor


def precision(dtype: torch.dtype) -> str:
    """`input_precision` of every dot: fp32 inputs are multiplied as fp32, not as tf32."""
    return "ieee" if dtype == torch.float32 else "tf32"


def operand(x: torch.Tensor) -> torch.Tensor:
    """x [.,.,.,D] as a kernel loads it: zero columns change neither scores nor output. A copy only where it is not."""
    if short := -x.shape[-1] % _EVEN:
        return F.pad(x, (0, short)).contiguous()
    a, b, c = strides(x)
    if x.stride(-1) == 1 and all(step % _EVEN == 0 for step in (a, b, c, x.storage_offset())):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def strides(x: torch.Tensor) -> tuple[int, int, int]:
    """All but the last, which is 1; that of an axis of one element, which is never walked, may be anything else."""
    (m, n, o, _), (a, b, c, _) = x.shape, x.stride()
    return a if m > 1 else 0, b if n > 1 else 0, c if o > 1 else 0
