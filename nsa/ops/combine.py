"""The gated sum of the branches (Eq. 5)."""

from __future__ import annotations

import torch

from nsa import routing
from nsa.config import NSAConfig
from nsa.ops import operator

# Below this many elements the operator costs more on the host than the plain form's four launches.
_FEW_ELEMENTS = 1 << 20


def gates(logits: torch.Tensor, cfg: NSAConfig) -> torch.Tensor:
    """Gate logits [B,T,H,3] (cmp, sel, win) -> gates [B,T,H,3]: a sigmoid each, or a softmax over the three."""
    return _gates(logits, cfg.gate == "softmax")


def _gates(logits: torch.Tensor, softmax: bool) -> torch.Tensor:
    return logits.softmax(-1) if softmax else logits.sigmoid()


def combine(
    cmp: torch.Tensor,
    sel: torch.Tensor,
    win: torch.Tensor,
    logits: torch.Tensor,
    cfg: NSAConfig,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Sum of the three branch outputs, each scaled by its gate.

    cmp, sel, win [B,T,H,Dv] of one dtype; logits [B,T,H,3] in this order, activated as cfg.gate says. Returns
    [B,T,H,Dv] in the branches' dtype. Differentiable in all four. Raises ValueError for inputs that do not fit,
    Unsupported for a named backend that cannot run.
    """
    for name, x in (("sel", sel), ("win", win)):
        if x.shape != cmp.shape or x.dtype != cmp.dtype:
            raise ValueError(
                f"combine: {name} is {x.dtype} {tuple(x.shape)}; expected cmp's, {cmp.dtype} {tuple(cmp.shape)}"
            )
    if logits.shape != (*cmp.shape[:-1], 3):
        raise ValueError(f"combine: logits have shape {tuple(logits.shape)}; expected {[*cmp.shape[:-1], 3]}")
    softmax = cfg.gate == "softmax"
    # Off a GPU the operator has nothing to choose from.
    if backend == "reference" or (backend is None and not (cmp.is_cuda and cmp.numel() >= _FEW_ELEMENTS)):
        return _reference(cmp, sel, win, logits, softmax)
    return torch.ops.nsa.combine(cmp, sel, win, logits, softmax, backend)


def _reference(
    cmp: torch.Tensor, sel: torch.Tensor, win: torch.Tensor, logits: torch.Tensor, softmax: bool
) -> torch.Tensor:
    """The specification, in plain differentiable torch."""
    g_cmp, g_sel, g_win = _gates(logits, softmax).to(cmp.dtype).unsqueeze(-1).unbind(-2)
    return torch.addcmul(torch.addcmul(cmp * g_cmp, sel, g_sel), win, g_win)


def _reference_backward(
    dout: torch.Tensor, cmp: torch.Tensor, sel: torch.Tensor, win: torch.Tensor, logits: torch.Tensor, softmax: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `_reference`'s inputs."""
    wide = torch.promote_types(dout.dtype, torch.float32)
    g = _gates(logits.to(wide), softmax)
    d_gates = torch.stack([(dout * x).sum(-1, dtype=wide) for x in (cmp, sel, win)], -1)
    d_logits = g * (d_gates - (g * d_gates).sum(-1, keepdim=True)) if softmax else d_gates * g * (1 - g)
    d_cmp, d_sel, d_win = (dout * gate for gate in g.to(dout.dtype).unsqueeze(-1).unbind(-2))
    return d_cmp, d_sel, d_win, d_logits.to(logits.dtype)


def _body(cmp, sel, win, logits, softmax, backend):
    route = routing.choose("combine", cmp, sel, win, logits, backend=backend)
    routing.launches["combine", route.backend] += 1
    if route.backend == "triton":
        from nsa.kernels import combine as kernel

        return kernel.forward(cmp, sel, win, logits, softmax)
    return _reference(cmp, sel, win, logits, softmax)


def _body_backward(dout, cmp, sel, win, logits, softmax, backend):
    route = routing.choose("combine", cmp, sel, win, logits, backend=backend, training=True)
    routing.launches["combine_backward", route.backend] += 1
    if route.backend == "triton":
        from nsa.kernels import combine as kernel

        return kernel.backward(dout, cmp, sel, win, logits, softmax)
    return _reference_backward(dout, cmp, sel, win, logits, softmax)


_forward = operator.define(
    "combine(Tensor cmp, Tensor sel, Tensor win, Tensor logits, bool softmax, str? backend) -> Tensor",
    _body,
    lambda cmp, sel, win, logits, softmax, backend: cmp.new_empty(cmp.shape),
)
_backward = operator.define(
    "combine_backward(Tensor dout, Tensor cmp, Tensor sel, Tensor win, Tensor logits, bool softmax, str? backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _body_backward,
    lambda dout, cmp, sel, win, logits, softmax, backend: tuple(x.new_empty(x.shape) for x in (cmp, sel, win, logits)),
)
operator.differentiable(
    _forward,
    lambda dout, tensors, rest: (*_backward(dout, *tensors, *rest), None, None),
    lambda inputs, results: (inputs[:4], inputs[4:]),
)
