"""The gated sum of the branches in one pass over memory each way: a program owns some rows, a row being one head of one
query. Gates and products are fp32, the result is rounded once, and nothing of a branch output's size is stored besides
the results themselves.

The backward of the sum alone is the gradients of the three branches. `fold` stores none of them: a branch's backward
that is handed dout and the row's gate scales its own, and what it would make of the products of dout and its output,
one number a row, is at hand here.

Branch outputs and results are contiguous; the logits of a row follow each other, as columns of a wider tensor too.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from nsa.kernels.primitives import on_device

# Elements of a program, and its warps. Those tried, from 1,024 to 8,192 and 2 to 8, are within 2% of each other.
_LAUNCH = {"forward": (4096, 8), "backward": (2048, 4), "fold": (2048, 4)}
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def _rows(n, DP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):
    """This program's rows; which of them exist; places of their elements, int64; which of those exist."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DP)[None, :]
    return row, row < n, row.to(tl.int64)[:, None] * D + d, (row < n)[:, None] & (d < D)


@triton.jit
def _loaded(Logits, row, ok, sl_t, sl_h, H):
    """The rows' three logits, fp32."""
    at = Logits + (row // H).to(tl.int64) * sl_t + (row % H).to(tl.int64) * sl_h
    a = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    b = tl.load(at + 1, mask=ok, other=0.0).to(tl.float32)
    c = tl.load(at + 2, mask=ok, other=0.0).to(tl.float32)
    return a, b, c


@triton.jit
def _gates(Logits, row, ok, sl_t, sl_h, H, SOFTMAX: tl.constexpr):
    """The rows' three gates, fp32."""
    a, b, c = _loaded(Logits, row, ok, sl_t, sl_h, H)
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


@triton.jit
def _log_gates(Logits, row, ok, sl_t, sl_h, H, SOFTMAX: tl.constexpr):
    """The logs of the rows' three gates, fp32, finite where a gate itself would be 0."""
    a, b, c = _loaded(Logits, row, ok, sl_t, sl_h, H)
    if SOFTMAX:
        top = tl.maximum(tl.maximum(a, b), c)
        total = top + tl.log(tl.exp(a - top) + tl.exp(b - top) + tl.exp(c - top))
        a = a - total
        b = b - total
        c = c - total
    else:
        a = tl.minimum(a, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(a)))
        b = tl.minimum(b, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(b)))
        c = tl.minimum(c, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(c)))
    return a, b, c


@triton.jit
def _products(dout, Cmp, Sel, Win, at, inside):
    """By row, the product of the output's gradient with each branch's output."""
    cmp = tl.load(Cmp + at, mask=inside, other=0.0).to(tl.float32)
    sel = tl.load(Sel + at, mask=inside, other=0.0).to(tl.float32)
    win = tl.load(Win + at, mask=inside, other=0.0).to(tl.float32)
    return tl.sum(dout * cmp, 1), tl.sum(dout * sel, 1), tl.sum(dout * win, 1)


@triton.jit
def _store_d_logits(Dlogits, row, ok, g_cmp, g_sel, g_win, p_cmp, p_sel, p_win, SOFTMAX: tl.constexpr):
    """Gradients of the logits; p as `_products` gives them."""
    p_cmp *= g_cmp
    p_sel *= g_sel
    p_win *= g_win
    if SOFTMAX:
        total = p_cmp + p_sel + p_win
        p_cmp -= g_cmp * total
        p_sel -= g_sel * total
        p_win -= g_win * total
    else:
        p_cmp *= 1.0 - g_cmp
        p_sel *= 1.0 - g_sel
        p_win *= 1.0 - g_win
    to = Dlogits + row.to(tl.int64) * 3
    tl.store(to, p_cmp.to(Dlogits.dtype.element_ty), mask=ok)
    tl.store(to + 1, p_sel.to(Dlogits.dtype.element_ty), mask=ok)
    tl.store(to + 2, p_win.to(Dlogits.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["n"])
def combine_forward(
    Cmp, Sel, Win, Logits, Out, sl_t, sl_h, n, H,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, SOFTMAX: tl.constexpr,
):  # fmt: skip
    row, ok, at, inside = _rows(n, DP, D, ROWS)
    g_cmp, g_sel, g_win = _gates(Logits, row, ok, sl_t, sl_h, H, SOFTMAX)
    cmp = tl.load(Cmp + at, mask=inside, other=0.0)
    sel = tl.load(Sel + at, mask=inside, other=0.0)
    win = tl.load(Win + at, mask=inside, other=0.0)
    out = (
        g_cmp[:, None] * cmp.to(tl.float32) + g_sel[:, None] * sel.to(tl.float32) + g_win[:, None] * win.to(tl.float32)
    )
    tl.store(Out + at, out.to(Out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n"])
def combine_backward(
    Dout, Cmp, Sel, Win, Logits, Dcmp, Dsel, Dwin, Dlogits, sl_t, sl_h, n, H,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, SOFTMAX: tl.constexpr,
):  # fmt: skip
    row, ok, at, inside = _rows(n, DP, D, ROWS)
    g_cmp, g_sel, g_win = _gates(Logits, row, ok, sl_t, sl_h, H, SOFTMAX)
    dout = tl.load(Dout + at, mask=inside, other=0.0).to(tl.float32)
    p_cmp, p_sel, p_win = _products(dout, Cmp, Sel, Win, at, inside)
    tl.store(Dcmp + at, (g_cmp[:, None] * dout).to(Dcmp.dtype.element_ty), mask=inside)
    tl.store(Dsel + at, (g_sel[:, None] * dout).to(Dsel.dtype.element_ty), mask=inside)
    tl.store(Dwin + at, (g_win[:, None] * dout).to(Dwin.dtype.element_ty), mask=inside)
    _store_d_logits(Dlogits, row, ok, g_cmp, g_sel, g_win, p_cmp, p_sel, p_win, SOFTMAX)


@triton.jit(do_not_specialize=["n"])
def combine_fold(
    Dout, Cmp, Sel, Win, Logits, LseCmp, LseSel, LseWin, Dlogits, Lses, Deltas, sl_t, sl_h, n, H,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, SOFTMAX: tl.constexpr,
):  # fmt: skip
    row, ok, at, inside = _rows(n, DP, D, ROWS)
    g_cmp, g_sel, g_win = _gates(Logits, row, ok, sl_t, sl_h, H, SOFTMAX)
    dout = tl.load(Dout + at, mask=inside, other=0.0).to(tl.float32)
    p_cmp, p_sel, p_win = _products(dout, Cmp, Sel, Win, at, inside)
    cmp = row.to(tl.int64)
    sel = cmp + n
    win = sel + n
    l_cmp, l_sel, l_win = _log_gates(Logits, row, ok, sl_t, sl_h, H, SOFTMAX)
    tl.store(Lses + cmp, tl.load(LseCmp + cmp, mask=ok, other=0.0) - l_cmp, mask=ok)
    tl.store(Lses + sel, tl.load(LseSel + cmp, mask=ok, other=0.0) - l_sel, mask=ok)
    tl.store(Lses + win, tl.load(LseWin + cmp, mask=ok, other=0.0) - l_win, mask=ok)
    tl.store(Deltas + cmp, p_cmp, mask=ok)
    tl.store(Deltas + sel, p_sel, mask=ok)
    tl.store(Deltas + win, p_win, mask=ok)
    _store_d_logits(Dlogits, row, ok, g_cmp, g_sel, g_win, p_cmp, p_sel, p_win, SOFTMAX)


def unsupported(backend: str, *tensors: torch.Tensor) -> list[str]:
    """Reasons why these branch outputs and gate logits cannot be taken; none if they can."""
    odd = {x.dtype for x in tensors} - set(_DTYPES)
    return [f"{backend} takes bf16, fp16 or fp32, not {dtype}" for dtype in sorted(odd, key=str)]


def forward(
    cmp: torch.Tensor, sel: torch.Tensor, win: torch.Tensor, logits: torch.Tensor, softmax: bool
) -> torch.Tensor:
    """The gated sum, contiguous, in cmp's dtype: branch outputs [B,T,H,D] and logits [B,T,H,3].

    Here and below any strides; what is not laid out as the kernels load it is copied.
    """
    out = torch.empty(cmp.shape, dtype=cmp.dtype, device=cmp.device)
    _run("forward", combine_forward, (cmp, sel, win, logits), (out,), softmax)
    return out


def backward(
    dout: torch.Tensor, cmp: torch.Tensor, sel: torch.Tensor, win: torch.Tensor, logits: torch.Tensor, softmax: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the three branch outputs and of the logits, contiguous, in their dtypes. Equal runs are equal."""
    inputs = (cmp, sel, win, logits)
    d_cmp, d_sel, d_win, d_logits = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs)
    _run("backward", combine_backward, (dout, *inputs), (d_cmp, d_sel, d_win, d_logits), softmax)
    return d_cmp, d_sel, d_win, d_logits


def fold(
    dout: torch.Tensor, outs: tuple[torch.Tensor, ...], lses: tuple[torch.Tensor, ...], logits: torch.Tensor,
    softmax: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The gradient of the logits and, for the branches' own backward passes, what folds the gates into them.

    dout and the outs of cmp, sel, win [B,T,H,D]; their lses [B,T,H] fp32; logits [B,T,H,3]. Returns d_logits [B,T,H,3]
    in logits' dtype; lses less the log of the gate [3,B,T,H], so that exp(score - lse) is a weight times its gate;
    deltas [3,B,T,H], rowsum(dout * out); both fp32. With p = gate * delta, d_logits is p * (1 - gate), or
    p - gate * (sum of the three p) for a softmax. All contiguous. Equal runs are equal.
    """
    d_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    folded = torch.empty((3, *dout.shape[:3]), dtype=torch.float32, device=dout.device)
    deltas = torch.empty_like(folded)
    results = (*(x.contiguous() for x in lses), d_logits, folded, deltas)
    _run("fold", combine_fold, (dout, *outs, logits), results, softmax)
    return d_logits, folded, deltas


def _run(
    name: str, kernel: Any, inputs: tuple[torch.Tensor, ...], results: tuple[torch.Tensor, ...], softmax: bool
) -> None:
    B, T, H, D = inputs[0].shape
    *dense, logits = inputs
    by_token, by_head, logits = logits_rows(logits)
    rows, padded, warps = _sizes(name, D)
    n = B * T * H
    if n * D:
        with on_device(logits):
            kernel[(triton.cdiv(n, rows),)](
                *[x.contiguous() for x in dense], logits, *results, by_token, by_head, n, H,
                D=D, DP=padded, ROWS=rows, SOFTMAX=softmax, num_warps=warps,
            )  # fmt: skip


@lru_cache(maxsize=256)
def _sizes(name: str, D: int) -> tuple[int, int, int]:
    """Rows of a program, the power of two that holds D, warps."""
    elements, warps = _LAUNCH[name]
    padded = triton.next_power_of_2(D)
    return max(1, elements // padded), padded, warps


def logits_rows(x: torch.Tensor) -> tuple[int, int, torch.Tensor]:
    """Strides over tokens, a batch's rows following each other, and heads; a copy only where logits lie otherwise."""
    B, T, H, _ = x.shape
    by_row, by_token, by_head, by_gate = x.stride()
    if T == 1:
        by_token = by_row
    if by_gate != 1 or (B > 1 and by_row != T * by_token):
        return 3 * H, 3, x.contiguous()
    return by_token, by_head, x
