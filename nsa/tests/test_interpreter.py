"""The mended interpreter computes bfloat16 and fp16 as a GPU does: exact products, fp32 sums, round to nearest even."""

from typing import Any

import pytest
import torch

tl: Any = None  # Triton looks for it among a kernel's globals


def _arithmetic(dtype):
    """Products, a sum, a power and a cast of random values, interpreted, beside torch's own -> largest difference."""
    global tl
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(a, b, out, dot, N: tl.constexpr):
        i = tl.arange(0, N)
        at = i[:, None] * N + i[None, :]
        x, y = tl.load(a + at), tl.load(b + at)
        tl.store(out + at, x * y + x)
        tl.store(dot + at, tl.dot(x, tl.trans(y)))

    x, y = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    out, dot = torch.empty_like(x), torch.empty(16, 16)
    kernel[(1,)](x, y, out, dot, N=16)
    return float((out - (x * y + x)).abs().max()), float((dot - x.float() @ y.float().T).abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_arithmetic_is_that_of_the_type(interpreted, dtype):
    elementwise, product = interpreted(_arithmetic, dtype)
    assert elementwise == 0
    assert product < 1e-5


def _integer_sums():
    """Sums and running sums of 16 rows of int32, stored at the head of buffers twice as long -> (sums, runs)."""
    global tl
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(a, sums, runs, N: tl.constexpr):
        i = tl.arange(0, N)
        at = i[:, None] * N + i[None, :]
        x = tl.load(a + at)
        tl.store(sums + i, tl.sum(x, 1))
        tl.store(runs + at, tl.cumsum(x, 1))

    x = torch.arange(256, dtype=torch.int32).view(16, 16)
    sums, runs = torch.full((32,), -7, dtype=torch.int32), torch.full((512,), -7, dtype=torch.int32)
    kernel[(1,)](x, sums, runs, N=16)
    return sums, runs


def test_integer_sums_are_stored_in_their_own_width(interpreted):
    sums, runs = interpreted(_integer_sums)
    x = torch.arange(256).view(16, 16)
    assert sums.tolist() == [*x.sum(1).tolist(), *[-7] * 16]
    assert runs.tolist() == [*x.cumsum(1).flatten().tolist(), *[-7] * 256]


def _scalar_masks():
    """A store and an atomic addition, each under a scalar mask that holds for the first of two programs -> buffer."""
    global tl
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(out):
        first = tl.program_id(0) == 0
        tl.store(out + tl.program_id(0), 5, mask=first)
        tl.atomic_add(out + 2, 1, mask=first)

    out = torch.zeros(3, dtype=torch.int32)
    kernel[(2,)](out)
    return out


def test_a_scalar_mask_that_is_false_keeps_the_memory(interpreted):
    assert interpreted(_scalar_masks).tolist() == [5, 0, 1]
