"""Softmax attention that also returns its logsumexp, forward and backward: the torch op that this device has.

Layout here is the operators' own, [N, heads, rows, D]. F.scaled_dot_product_attention returns no logsumexp, which
the merge of partial results needs. A row whose keys are all masked gives out = 0 and a meaningless lse: callers know
which rows those are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_forward_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# Before it learned grouped heads the CPU operator read past the keys' end without a word (2.4.1 corrupts the heap).
# 2.13 is the oldest version where grouped heads were checked against the reference.
_GROUPED_HEADS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)


def additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Boolean visibility [..., rows, keys] as an additive mask: 0 or -inf."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))


def gated(dout: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """The gradient of a branch [B,T,H,Dv] from that of the gated sum; gate [B,T,H] or None for a branch alone."""
    return dout if gate is None else (dout * gate.unsqueeze(-1)).to(dout.dtype)


def fused(backend: str, q: torch.Tensor) -> bool:
    """Whether a fused operator of the GPU runs `backend` on these queries; elsewhere the forms below do."""
    if backend == "sdpa":  # its strides are int32
        return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and 0 < q.numel() < 1 << 31
    return backend in ("flash", "cudnn") and q.numel() > 0


def _widen(x: torch.Tensor, width: int) -> torch.Tensor:
    """Pad the head dim; the CPU operator reads it as if its stride were 1, whatever it is."""
    if x.shape[-1] < width:
        return F.pad(x, (0, width - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()


def _per_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[N,G,S,D] -> [N,H,S,D] where the operator wants a key for every head."""
    return x if _GROUPED_HEADS or x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _per_group(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Gradients [N,H,S,D] of `_per_head`'s result, summed to [N,G,S,D]."""
    return x if x.shape[1] == groups else x.unflatten(1, (groups, -1)).sum(2)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    *,
    causal: bool = False,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [N,H,T,Dk], k [N,G,S,Dk], v [N,G,S,Dv], additive mask [T,S] or None -> out [N,H,T,Dv], lse [N,H,T].

    `causal` means row i sees keys up to i, and wants T = S. lse is natural, fp32 (fp64 for fp64).
    """
    if mask is None and fused("sdpa", q):
        from nsa.kernels.flash import operators as kernel

        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = kernel.forward("sdpa", q, k, v, scale, causal=causal)
        return out.transpose(1, 2), lse
    if q.device.type != "cpu" or not q.numel():
        return _forward_plain(q, k, v, scale, causal, mask)
    if q.shape[2] == 1 and mask is None and q.shape[1] > k.shape[1]:
        # With one query the heads of a group can stand as its rows: no key is read twice.
        out, lse = forward(q.reshape(len(q), k.shape[1], -1, q.shape[3]), k, v, scale)
        return out.reshape(*q.shape[:3], -1), lse.reshape(q.shape[:3])
    width = max(q.shape[-1], v.shape[-1])
    q, k, v_wide = _widen(q, width), _widen(k, width), _widen(v, width)
    k, v_wide = _per_head(k, q.shape[1]), _per_head(v_wide, q.shape[1])
    out, lse = _forward_cpu(q, k, v_wide, 0.0, causal, attn_mask=mask, scale=scale)
    return out[..., : v.shape[-1]], lse


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    *,
    causal: bool = False,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `forward`'s out. With `out` and `lse` of a larger softmax it gives this part's share of them."""
    if mask is None and fused("sdpa", q):
        from nsa.kernels.flash import operators as kernel

        dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        dq, dk, dv = kernel.backward("sdpa", dout, q, k, v, out, lse, scale, causal=causal)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
    if q.device.type != "cpu" or not q.numel():
        return _backward_plain(dout, q, k, v, out, lse, scale, causal, mask)
    width = max(q.shape[-1], v.shape[-1])
    # In half precision the CPU operator also sums dK and dV in it, over rows and heads: 3 times the error of plain
    # eager attention (and 3 times slower than fp32 without AMX).
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    mask = None if mask is None else mask.to(wide)
    dout, q, k, v, out = (x.to(wide) for x in (dout, q, k, v, out))
    dq, dk, dv = _backward_cpu(
        _widen(dout, width),
        _widen(q, width),
        _per_head(_widen(k, width), q.shape[1]),
        _per_head(_widen(v, width), q.shape[1]),
        _widen(out, width),
        lse,
        0.0,
        causal,
        attn_mask=mask,
        scale=scale,
    )
    dk, dv = _per_group(dk, k.shape[1]), _per_group(dv, v.shape[1])
    return dq[..., : q.shape[-1]].to(dtype), dk[..., : k.shape[-1]].to(dtype), dv[..., : v.shape[-1]].to(dtype)


def _scores(
    q: torch.Tensor, k: torch.Tensor, scale: float, causal: bool, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores [N,G,R*T,S] in at least fp32, and q in the same grouped layout."""
    N, H, T, D = q.shape
    G, S = k.shape[1], k.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(dtype).reshape(N, G, H // G * T, D)
    scores = (grouped @ k.to(dtype).transpose(-1, -2)) * scale
    if causal:
        hidden = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.view(N, G, H // G, T, S).masked_fill(hidden, float("-inf")).view_as(scores)
    elif mask is not None:
        scores = (scores.view(N, G, H // G, T, S) + mask).view_as(scores)
    return scores, grouped


def _forward_plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    N, H, T, _ = q.shape
    scores, _ = _scores(q, k, scale, causal, mask)
    lse = scores.logsumexp(-1)
    p = torch.exp(scores - lse.nan_to_num(neginf=0.0).unsqueeze(-1))
    # Dividing by p's own sum takes back the rounding of lse; a row that sees nothing stays 0.
    out = (p @ v.to(p.dtype)) / p.sum(-1, keepdim=True).clamp(min=0.5)
    return out.view(N, H, T, v.shape[3]).to(q.dtype), lse.view(N, H, T)


def _backward_plain(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    causal: bool,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scores, grouped = _scores(q, k, scale, causal, mask)
    dtype, shape = scores.dtype, scores.shape[:3]
    p = torch.exp(scores - lse.reshape(shape).nan_to_num(neginf=0.0).unsqueeze(-1))
    do = dout.to(dtype).reshape(*shape, v.shape[3])
    delta = (dout.to(dtype) * out.to(dtype)).sum(-1).reshape(*shape, 1)
    ds = p * (do @ v.to(dtype).transpose(-1, -2) - delta) * scale
    dq = (ds @ k.to(dtype)).view(q.shape)
    dk = ds.transpose(-1, -2) @ grouped
    dv = p.transpose(-1, -2) @ do
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
