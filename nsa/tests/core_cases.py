"""One call of a layer's core by its Triton kernels, forward and backward, beside the specification in fp64.

The interpreter on a CPU and a GPU run the same cases; what a case demands is the same on both.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from nsa import NSAConfig, sparse_attention
from nsa.blocks import n_compressed
from nsa.testing import fixed_selection, inputs

SMALL = NSAConfig(l=8, d=4, l_sel=16, n_sel=4, w=20)
# Of the norm of a result: fp32 arithmetic, or one rounding of each partial, of three results and of their sum.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
NAMES = ("out", "dq", "dk_cmp", "dv_cmp", "dk_sel", "dv_sel", "dk_win", "dv_win", "dlogits")


def tensors(shape: tuple[int, ...], cfg: NSAConfig, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """q, keys and values of cmp, sel and win, gate logits, and the gradient of out, for (B, T, S, G, R, Dk, Dv)."""
    B, T, S, G, R, Dk, Dv = shape
    more: dict[str, Any] = {"G": G, "R": R, "Dk": Dk, "Dv": Dv, "dtype": dtype, "device": device}
    q, k_sel, v_sel = inputs(B, T, S, **more)
    _, k_win, v_win = inputs(B, T, S, seed=1, **more)
    _, k_cmp, v_cmp = inputs(B, T, n_compressed(S, cfg), seed=2, **more)
    generator = torch.Generator().manual_seed(3)
    logits, dout = (torch.randn(B, T, G * R, n, generator=generator).to(device, dtype) for n in (3, Dv))
    return [q, k_cmp, v_cmp, k_sel, v_sel, k_win, v_win, logits, dout]


def excess(
    shape: tuple[int, ...], cfg: NSAConfig, dtype: torch.dtype, *, lengths: list[int] | None = None,
    choose: bool = False, device: str = "cpu", guard: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> dict[str, float]:  # fmt: skip
    """By name, errors above the tolerance of the output and of every gradient, as shares of their norms.

    lengths: of ragged rows. choose: the core chooses its own blocks, so all must be chosen for the two to agree.
    """
    B, T, S, G, *_ = shape
    *given, dout = tensors(shape, cfg, dtype, device)
    each = lengths or [S] * B
    blocks = None if choose else torch.cat([fixed_selection(1, T, G, n, cfg) for n in each])

    def run(values: list[torch.Tensor], dout: torch.Tensor, backend: str) -> list[torch.Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in values]
        q, k_cmp, v_cmp, k_sel, v_sel, k_win, v_win, logits = leaves
        seq_len = S if lengths is None else torch.tensor(lengths, dtype=torch.int32, device=q.device)
        listed = None if blocks is None else blocks.to(q.device)
        pairs = (k_cmp, v_cmp), (k_sel, v_sel), (k_win, v_win)
        out = sparse_attention(q, *pairs, logits, cfg, seq_len=seq_len, blocks=listed, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    with guard():
        got = run(given, dout, "triton")
    want = run([x.cpu().double() for x in given], dout.cpu().double(), "reference")
    errors = {
        name: float((a.cpu().double() - b).norm() / b.norm().clamp(min=1e-30))
        for name, a, b in zip(NAMES, got, want, strict=True)
    }
    return {name: error for name, error in errors.items() if not error <= TOLERANCE[dtype]}
