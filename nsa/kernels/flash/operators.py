"""Dense attention by the fused operators that torch carries for CUDA, forward and backward, logsumexp included.

flash: FA-2 (`aten::_flash_attention_forward`, the same positional arguments from torch 2.4 to 2.15).
cudnn: cuDNN's attention; square causal problems and unmasked ones.
sdpa:  the memory-efficient operator of F.scaled_dot_product_attention, which is no member of the FA-2 family.
All in fp16 and bf16 alone: the last takes fp32 too, but its output is 1.7 times as far off as plain matmuls'.

q [N,T,H,Dk], k [N or 1,K,G,Dk], v [N or 1,K,G,Dv], H a multiple of G; a batch of 1 is shared by all N problems and
never copied. `causal`: row i sees keys up to K - T + i, the last `window` of those where a window is given.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

# Elements of q that one call may hold, so that the operators' own workspace (8 bytes an element in FA-2's backward:
# dQ in fp32, dK and dV once a query head) stays within 1 GiB at any length.
CALL_ELEMENTS = 1 << 27
# The memory-efficient operator reads its logsumexp in rows of this many.
_LSE_ROWS = 32
_BOTTOM_RIGHT = 2  # its custom_mask_type


def unsupported(backend: str, q: torch.Tensor, v: torch.Tensor) -> list[str]:
    """Reasons why a fused operator cannot take these inputs."""
    reasons = []
    if q.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"{backend} has no kernel for {str(q.dtype).removeprefix('torch.')}")
    limit = _flash_width(q.device) if backend == "flash" else 128
    width = max(q.shape[-1], v.shape[-1])
    if width > limit:
        reasons.append(f"head dim {width} is over {backend}'s {limit}")
    return reasons


def _flash_width(device: torch.device) -> int:
    """FA-2's backward of wider heads fits the shared memory of sm_80 and sm_90 only."""
    wide = device.type != "cuda" or torch.cuda.get_device_capability(device) in ((8, 0), (9, 0))
    return 256 if wide else 192


def forward(
    backend: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    *,
    causal: bool,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [N,T,H,Dv] in q.dtype, lse [N,H,T] fp32, natural."""
    T, K, width = q.shape[1], k.shape[1], _width(q, v)
    q, k, wide_v = _operand(q, width), _operand(k, width), _operand(v, width)
    if backend == "flash":
        k, wide_v = _shared(k, q), _shared(wide_v, q)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, wide_v, None, None, T, K, 0.0, causal and window is None, False, scale=scale, **_flash(window)
        )
    elif backend == "cudnn":
        by_head = (_shared(x, q).transpose(1, 2) for x in (q, k, wide_v))
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *by_head, None, True, 0.0, causal, False, scale=scale
        )
        out, lse = out.transpose(1, 2), lse.flatten(2)
    else:
        k, wide_v = _shared(_per_head(k, q), q), _shared(_per_head(wide_v, q), q)
        mask = _BOTTOM_RIGHT if causal else 0
        out, lse, *_ = torch.ops.aten._efficient_attention_forward(
            q, k, wide_v, None, None, None, None, None, 0.0, mask, True, scale=scale, window_size=window
        )
    return out[..., : v.shape[-1]], lse[..., :T]


def backward(
    backend: str,
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    *,
    causal: bool,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq [N,T,H,Dk], dk [N,K,G,Dk], dv [N,K,G,Dv], one for each problem where k and v are shared.

    Equal calls give equal bits. With `out` and `lse` of a larger softmax it gives this part's share of the gradients.
    """
    _, T, H, Dk = q.shape
    K, G, Dv = v.shape[1:]
    width = _width(q, v)
    dout, q, k, v, out = (_operand(x, width) for x in (dout, q, k, v, out))
    if backend == "flash":
        # What a forward with dropout would have left.
        seeds = [torch.empty(n, dtype=torch.uint64, device=q.device) for n in ((2,), ())]
        k, v, lse = _shared(k, q), _shared(v, q), lse.contiguous()
        with _repeatable():
            dq, dk, dv = torch.ops.aten._flash_attention_backward(
                dout, q, k, v, out, lse, None, None, T, K, 0.0, causal and window is None, *seeds, scale=scale,
                **_flash(window),
            )  # fmt: skip
    elif backend == "cudnn":
        seeds = [torch.zeros((), dtype=torch.int64, device=q.device) for _ in range(2)]
        by_head = [_shared(x, q).transpose(1, 2) for x in (dout, q, k, v, out)]
        lse = lse.contiguous().unsqueeze(-1)
        with _repeatable():
            grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
                *by_head, lse, *seeds, None, None, None, T, K, 0.0, causal, scale=scale
            )
        dq, dk, dv = (x.transpose(1, 2) for x in grads)
    else:
        # Its backward lays the window top-left, so missing rows go in front; lse = inf gives them no weight.
        above = K - T if window is not None else 0
        dout, q, out = (F.pad(x, (0, 0, 0, 0, above, 0)) if above else x for x in (dout, q, out))
        lse = F.pad(lse, (above, -(above + T) % _LSE_ROWS), value=float("inf")).contiguous()
        zero = torch.zeros((), dtype=torch.int64, device=q.device)
        # One split of the keys: more add dQ in any order.
        dq, dk, dv, _ = torch.ops.aten._efficient_attention_backward(
            dout.contiguous(), q, _shared(_per_head(k, q), q), _shared(_per_head(v, q), q), None, out.contiguous(),
            None, None, above + T, K, lse, 0.0, zero, zero, _BOTTOM_RIGHT if causal else 0, False,
            scale=scale, num_splits_key=1, window_size=window,
        )  # fmt: skip
        dq = dq[:, above:]
        if G != H:
            dk, dv = (x.unflatten(2, (G, H // G)).sum(3, dtype=torch.float32) for x in (dk, dv))
    return dq[..., :Dk], dk[..., :Dk], dv[..., :Dv]


def _flash(window: int | None) -> dict[str, int]:
    """FA-2's window counts the keys beside the query's own: (w - 1, 0) is exactly w tokens."""
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


def _width(q: torch.Tensor, v: torch.Tensor) -> int:
    """One head dim for queries, keys and values, whole vectors of 8: zero columns change neither scores nor output."""
    return -(-max(q.shape[-1], v.shape[-1]) // 8) * 8


def _operand(x: torch.Tensor, width: int) -> torch.Tensor:
    """x as the operators load it: `width` columns, rows that begin on 16 bytes; a copy only where it is not so."""
    if x.shape[-1] < width:
        return F.pad(x, (0, width - x.shape[-1]))
    per_16_bytes = 16 // x.element_size()
    rows_aligned = all(s % per_16_bytes == 0 for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True) if n > 1)
    if x.stride(-1) == 1 and rows_aligned and x.storage_offset() % per_16_bytes == 0:
        return x
    return x.contiguous() if not x.is_contiguous() else x.clone()


def _shared(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """A batch of 1 as the batch of q, without a copy."""
    return x if x.shape[0] == q.shape[0] else x.expand(q.shape[0], -1, -1, -1)


def _per_head(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """[N,K,G,D] -> [N,K,H,D]: the memory-efficient operator knows no groups."""
    return x if x.shape[2] == q.shape[2] else x.repeat_interleave(q.shape[2] // x.shape[2], 2)


_filling: Any = torch.utils.deterministic


def _mode() -> tuple[int, bool]:
    """torch's deterministic mode, and whether it fills what it allocates."""
    return torch.get_deterministic_debug_mode(), _filling.fill_uninitialized_memory


def _set_mode(mode: int, fill: bool) -> None:
    torch.set_deterministic_debug_mode(mode)
    _filling.fill_uninitialized_memory = fill


_ERROR = 2
_ours = (_ERROR, False)  # without filling: it would cost a pass over every result
_lock = threading.Lock()
_inside = 0
_users: tuple[int, bool] | None = None  # the mode to go back to, while it is ours


@contextmanager
def _repeatable() -> Iterator[None]:
    """FA-2 and cuDNN add dQ in order inside, where equal calls give equal bits; by default they add it atomically.

    Both ask torch's process-wide mode when they are called: they have no argument for it, torch keeps no such mode by
    thread, and its mode "warn" leaves FA-2 as it was. So other threads see the mode while one of these calls is being
    launched, no longer. The first one in changes it and the last one out takes it back, so that no call loses it under
    way and none takes another's for the user's. A mode that is set meanwhile by someone else stays, but for "error"
    without filling, which looks like ours. Where "error" is the user's mode, nothing is touched.
    """
    global _inside, _users
    with _lock:
        if not _inside and _mode()[0] != _ERROR:
            _users = _mode()
            _set_mode(*_ours)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside and _users is not None:
                if _mode() == _ours:
                    _set_mode(*_users)
                _users = None
