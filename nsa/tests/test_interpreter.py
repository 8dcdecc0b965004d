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
