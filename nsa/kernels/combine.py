"""The gated sum of the branches in one pass over memory each way: a program owns some rows, a row being one head of one
query. Gates and products are fp32, the result is rounded once, and nothing of a branch output's size is stored besides
the results themselves.

Strides are named by tensor and axis: ss_t is the selected branch's over tokens. FLAT: the rows of every tensor lie
evenly, its sx_h apart.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from nsa.kernels.primitives import on_device

# Elements of a program, and its warps. Those tried, from 1,024 to 8,192 and 2 to 8, are within 2% of each other.
_LAUNCH = {"forward": (4096, 8), "backward": (2048, 4)}
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def _places(row, T, H, s_b, s_t, s_h, FLAT: tl.constexpr):
    """Where the rows (b, t, h) begin, int64."""
    if FLAT:
        places = row.to(tl.int64) * s_h
    else:
        t = row // H
        places = (t // T).to(tl.int64) * s_b + (t % T).to(tl.int64) * s_t + (row % H).to(tl.int64) * s_h
    return places


@triton.jit
def _gates(Logits, places, s_c, ok, SOFTMAX: tl.constexpr):
    """The rows' three gates, fp32."""
    a = tl.load(Logits + places, mask=ok, other=0.0).to(tl.float32)
    b = tl.load(Logits + places + s_c, mask=ok, other=0.0).to(tl.float32)
    c = tl.load(Logits + places + 2 * s_c, mask=ok, other=0.0).to(tl.float32)
    if SOFTMAX:
        top = tl.maximum(tl.maximum(a, b), c)
        a = tl.exp(a - top)
        b = tl.exp(b - top)
        c = tl.exp(c - top)
        total = a + b + c
        a = a / total
        b = b / total
        c = c / total
    else:
        a = _sigmoid(a)
        b = _sigmoid(b)
        c = _sigmoid(c)
    return a, b, c


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))  # so that it overflows on neither side
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit(do_not_specialize=["n"])
def combine_forward(
    Cmp, Sel, Win, Logits, Out,
    sc_b, sc_t, sc_h, sc_d, ss_b, ss_t, ss_h, ss_d, sw_b, sw_t, sw_h, sw_d, sl_b, sl_t, sl_h, sl_c, n, T, H,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, SOFTMAX: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ok = row < n
    d = tl.arange(0, DP)[None, :]
    inside = ok[:, None] & (d < D)
    g_cmp, g_sel, g_win = _gates(Logits, _places(row, T, H, sl_b, sl_t, sl_h, FLAT), sl_c, ok, SOFTMAX)
    cmp = tl.load(Cmp + _places(row, T, H, sc_b, sc_t, sc_h, FLAT)[:, None] + d * sc_d, mask=inside, other=0.0)
    sel = tl.load(Sel + _places(row, T, H, ss_b, ss_t, ss_h, FLAT)[:, None] + d * ss_d, mask=inside, other=0.0)
    win = tl.load(Win + _places(row, T, H, sw_b, sw_t, sw_h, FLAT)[:, None] + d * sw_d, mask=inside, other=0.0)
    out = (
        g_cmp[:, None] * cmp.to(tl.float32) + g_sel[:, None] * sel.to(tl.float32) + g_win[:, None] * win.to(tl.float32)
    )
    tl.store(Out + row.to(tl.int64)[:, None] * D + d, out.to(Out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n"])
def combine_backward(
    Dout, Cmp, Sel, Win, Logits, Dcmp, Dsel, Dwin, Dlogits,
    so_b, so_t, so_h, so_d, sc_b, sc_t, sc_h, sc_d, ss_b, ss_t, ss_h, ss_d, sw_b, sw_t, sw_h, sw_d,
    sl_b, sl_t, sl_h, sl_c, n, T, H,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, SOFTMAX: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ok = row < n
    d = tl.arange(0, DP)[None, :]
    inside = ok[:, None] & (d < D)
    g_cmp, g_sel, g_win = _gates(Logits, _places(row, T, H, sl_b, sl_t, sl_h, FLAT), sl_c, ok, SOFTMAX)
    dout = tl.load(Dout + _places(row, T, H, so_b, so_t, so_h, FLAT)[:, None] + d * so_d, mask=inside, other=0.0)
    cmp = tl.load(Cmp + _places(row, T, H, sc_b, sc_t, sc_h, FLAT)[:, None] + d * sc_d, mask=inside, other=0.0)
    sel = tl.load(Sel + _places(row, T, H, ss_b, ss_t, ss_h, FLAT)[:, None] + d * ss_d, mask=inside, other=0.0)
    win = tl.load(Win + _places(row, T, H, sw_b, sw_t, sw_h, FLAT)[:, None] + d * sw_d, mask=inside, other=0.0)
    dout = dout.to(tl.float32)
    to = row.to(tl.int64)[:, None] * D + d
    tl.store(Dcmp + to, (g_cmp[:, None] * dout).to(Dcmp.dtype.element_ty), mask=inside)
    tl.store(Dsel + to, (g_sel[:, None] * dout).to(Dsel.dtype.element_ty), mask=inside)
    tl.store(Dwin + to, (g_win[:, None] * dout).to(Dwin.dtype.element_ty), mask=inside)
    # The gradients of the gates, then of the logits.
    p_cmp = tl.sum(dout * cmp.to(tl.float32), 1)
    p_sel = tl.sum(dout * sel.to(tl.float32), 1)
    p_win = tl.sum(dout * win.to(tl.float32), 1)
    if SOFTMAX:
        mean = g_cmp * p_cmp + g_sel * p_sel + g_win * p_win
        p_cmp = g_cmp * (p_cmp - mean)
        p_sel = g_sel * (p_sel - mean)
        p_win = g_win * (p_win - mean)
    else:
        p_cmp *= g_cmp * (1.0 - g_cmp)
        p_sel *= g_sel * (1.0 - g_sel)
        p_win *= g_win * (1.0 - g_win)
    to = row.to(tl.int64) * 3
    tl.store(Dlogits + to, p_cmp.to(Dlogits.dtype.element_ty), mask=ok)
    tl.store(Dlogits + to + 1, p_sel.to(Dlogits.dtype.element_ty), mask=ok)
    tl.store(Dlogits + to + 2, p_win.to(Dlogits.dtype.element_ty), mask=ok)


def unsupported(backend: str, *tensors: torch.Tensor) -> list[str]:
    """Reasons why these branch outputs and gate logits cannot be taken; none if they can."""
    odd = {x.dtype for x in tensors} - set(_DTYPES)
    return [f"{backend} takes bf16, fp16 or fp32, not {dtype}" for dtype in sorted(odd, key=str)]


def forward(
    cmp: torch.Tensor, sel: torch.Tensor, win: torch.Tensor, logits: torch.Tensor, softmax: bool
) -> torch.Tensor:
    """The gated sum, contiguous, in cmp's dtype: branch outputs [B,T,H,D] and logits [B,T,H,3], any strides."""
    out = torch.empty(cmp.shape, dtype=cmp.dtype, device=cmp.device)
    _run("forward", combine_forward, (cmp, sel, win, logits), (out,), softmax)
    return out


def backward(
    dout: torch.Tensor, cmp: torch.Tensor, sel: torch.Tensor, win: torch.Tensor, logits: torch.Tensor, softmax: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the three branch outputs and of the logits, contiguous. Equal runs are equal."""
    inputs = (cmp, sel, win, logits)
    d_cmp, d_sel, d_win, d_logits = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs)
    _run("backward", combine_backward, (dout, *inputs), (d_cmp, d_sel, d_win, d_logits), softmax)
    return d_cmp, d_sel, d_win, d_logits


def _run(
    name: str, kernel: Any, inputs: tuple[torch.Tensor, ...], results: tuple[torch.Tensor, ...], softmax: bool
) -> None:
    B, T, H, D = inputs[0].shape
    steps = [_step(x) for x in inputs]
    flat = None not in steps
    if flat:  # T and H are then of no account: 1 for all, so that the kernel is specialised once
        strides = [s for x, step in zip(inputs, steps, strict=True) for s in (0, 0, step, x.stride(3))]
    else:
        strides = [s for x in inputs for s in x.stride()]
    elements, warps = _LAUNCH[name]
    rows = max(1, elements // triton.next_power_of_2(D))
    if inputs[0].numel():
        with on_device(inputs[0]):
            kernel[(triton.cdiv(B * T * H, rows),)](
                *inputs, *results, *strides, B * T * H, *((1, 1) if flat else (T, H)),
                D=D, DP=triton.next_power_of_2(D), ROWS=rows, SOFTMAX=softmax, FLAT=flat, num_warps=warps,
            )  # fmt: skip


def _step(x: torch.Tensor) -> int | None:
    """From a row (b, t, h) of x [B,T,H,D] to the next, where that is the same for all."""
    step, rows = 0, 1
    for size, stride in zip(x.shape[2::-1], x.stride()[2::-1], strict=True):
        if size > 1:
            step = stride if rows == 1 else step
            if stride != rows * step:
                return None
            rows *= size
    return step
