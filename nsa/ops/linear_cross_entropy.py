"""The head and its loss as one operator: logits exist a chunk of tokens at a time, and so does their gradient.

Both are made in the forward: the head's product is made once, not again in the backward, and nothing of
[tokens, vocabulary] is ever whole.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from nsa import routing
from nsa.ops import operator

# Columns of the head's products are a multiple of this: at an odd vocabulary a matrix product takes a kernel for
# unaligned rows, several times slower.
_COLUMNS = 128
# Bytes of logits that exist at one time, by device.
_CHUNK_BYTES = {"cuda": 512 << 20}
_SMALL_CHUNK_BYTES = 32 << 20
_TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


def padded(V: int) -> int:
    """Columns that the head's products run on."""
    return -(-V // _COLUMNS) * _COLUMNS


def padded_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [..., dim] @ weight [V, dim].T -> [..., V], a view whose rows begin at aligned addresses.

    Padding costs a pass over the weight; a few rows, as in decoding, are not worth it.
    """
    V, rows = len(weight), x.numel() // x.shape[-1]
    if rows < _COLUMNS or V == padded(V):
        return F.linear(x, weight)
    return F.linear(x, F.pad(weight, (0, 0, 0, padded(V) - V)))[..., :V]


def linear_cross_entropy(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, chunk_bytes: int | None = None
) -> torch.Tensor:
    """Summed cross-entropy (nats) of targets given logits x @ weight.T; those of -100 do not count.

    x [N,dim], weight [V,dim], targets [N] int64 -> a scalar, fp32 or fp64. Products are in the autocast dtype where
    autocast is on, else in x's; softmax, loss and the sum of weight's gradient over chunks are in at least fp32.
    chunk_bytes bounds the logits that exist at one time. Differentiable once, in x and weight; no gradient is computed
    where none is wanted. Raises ValueError for shapes or types that do not fit.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or targets.shape != x.shape[:1]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, weight, targets))
        raise ValueError(f"linear_cross_entropy: x, weight and targets are {shapes}; expected [N,dim], [V,dim], [N]")
    if targets.dtype != torch.int64:
        raise ValueError(f"linear_cross_entropy: targets are {targets.dtype}; expected torch.int64")
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    if chunk_bytes is None:
        chunk_bytes = _CHUNK_BYTES.get(kind, _SMALL_CHUNK_BYTES)
    learns = torch.is_grad_enabled()
    wanted = (learns and x.requires_grad, learns and weight.requires_grad)
    return torch.ops.nsa.linear_cross_entropy(x, weight, targets, dtype, chunk_bytes, *wanted)[0]


def _body(x, weight, targets, dtype, chunk_bytes, wants_x, wants_weight):
    """(summed loss, its gradient in x, its gradient in weight), the gradients empty where they are not wanted."""
    return _chunked(x, weight, targets.contiguous(), dtype, chunk_bytes, wants_x, wants_weight)


def _fake(x, weight, targets, dtype, chunk_bytes, wants_x, wants_weight):
    return (
        x.new_empty((), dtype=_wide(dtype)),
        x.new_empty(x.shape if wants_x else (0,)),
        weight.new_empty(weight.shape if wants_weight else (0,)),
    )


def _gradient(d_loss: torch.Tensor, tensors: tuple[torch.Tensor, ...], wanted: tuple[bool, bool]) -> tuple[Any, ...]:
    grads = (_scaled(g, d_loss) if wants else None for g, wants in zip(tensors, wanted, strict=True))
    return *grads, None, None, None, None, None


_step = operator.define(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor targets, ScalarType dtype, int chunk_bytes, bool wants_x, "
    "bool wants_weight) -> (Tensor loss, Tensor d_x, Tensor d_weight)",
    _body,
    _fake,
)
operator.differentiable(_step, _gradient, lambda inputs, results: (results[1:], inputs[5:]))


def _scaled(grad: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """grad * factor in grad's dtype, the factor not rounded to it first: 1/N in bf16 is off by up to 1 in 512."""
    return grad * factor if grad.dtype == factor.dtype else (grad * factor.reshape(1)).to(grad.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _chunked(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    dtype: torch.dtype,
    chunk_bytes: int,
    wants_x: bool,
    wants_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    N, (V, dim) = len(x), weight.shape
    width, wide = padded(V), _wide(dtype)
    # The cast, and the padding with it.
    head = torch.empty(width, dim, dtype=dtype, device=x.device)
    head[:V].copy_(weight)
    head[V:].zero_()
    backend = _backend(x, dtype)
    losses = torch.empty(N, dtype=wide, device=x.device)
    d_x = x.new_empty(x.shape if wants_x else (0,))
    d_head = torch.zeros(width, dim, dtype=wide, device=x.device) if wants_weight else None
    rows = _rows(N, width * dtype.itemsize, chunk_bytes)
    buffer = torch.empty(min(rows, N), width, dtype=dtype, device=x.device)
    for start in range(0, N, rows):
        part = slice(start, start + rows)
        states = x[part].to(dtype)
        logits = torch.mm(states, head.t(), out=buffer[: len(states)])
        _losses_(backend, logits, targets[part], V, losses[part], gradient=wants_x or wants_weight)
        routing.launches["cross_entropy", backend] += 1
        if wants_x:
            _product(d_x[part], logits, head)
        if d_head is not None:
            _add_product_(d_head, logits.t(), states)
    d_weight = weight.new_empty(0) if d_head is None else d_head[:V].to(weight.dtype)
    return losses.sum(), d_x, d_weight


def _rows(N: int, row_bytes: int, chunk_bytes: int) -> int:
    """Tokens of a chunk, a multiple of 128: as many chunks as must be, about equally long."""
    most = max(1, chunk_bytes // (128 * row_bytes))
    tiles = -(-N // 128)
    chunks = max(1, -(-tiles // most))
    return 128 * max(1, -(-tiles // chunks))


def _backend(x: torch.Tensor, dtype: torch.dtype) -> str:
    return "triton" if x.is_cuda and dtype != torch.float64 and routing.triton_version() != "<none>" else "torch"


def _losses_(
    backend: str, logits: torch.Tensor, targets: torch.Tensor, V: int, losses: torch.Tensor, *, gradient: bool
) -> None:
    """Every row's loss into `losses`; with `gradient` its gradient over the logits [rows, width], 0 in the padding."""
    if backend == "triton":
        from nsa.kernels import cross_entropy as kernel

        kernel.losses_(logits, targets, V, losses, gradient=gradient)
        return
    log_p = logits[:, :V].to(losses.dtype).log_softmax(-1)
    losses.copy_(F.nll_loss(log_p, targets, reduction="none"))
    if gradient:
        counts = (targets != -100).unsqueeze(-1)
        p = log_p.exp_().scatter_add_(1, targets.clamp(min=0).unsqueeze(-1), -counts.to(log_p.dtype))
        logits[:, :V] = p.masked_fill_(~counts, 0.0)
        logits[:, V:] = 0.0


def _product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """out = a @ b, rounded once: to out's type, or to a's where a GPU's product knows no other."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda and out.dtype == torch.float32 and _TORCH >= (2, 8):
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif a.is_cuda:
        out.copy_(a @ b)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def _add_product_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b, the sum over chunks in total's type: its error must not grow with their number."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and _adds_in_place(a.device):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        product = torch.empty_like(total)
        _product(product, a, b)
        total += product


@cache
def _adds_in_place(device: torch.device) -> bool:
    """Whether the product of bf16 matrices can be added into an fp32 one; 2.8 has the overload, but not for that."""
    if _TORCH < (2, 8):
        return False
    a, total = (torch.zeros(16, 16, dtype=dtype, device=device) for dtype in (torch.bfloat16, torch.float32))
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True
