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


def summed(
    backend: str, cmp: torch.Tensor, sel: torch.Tensor, win: torch.Tensor, logits: torch.Tensor, softmax: bool
) -> torch.Tensor:
    """The gated sum by a backend that `routing` chose."""
    routing.launches["combine", backend] += 1
    if backend == "triton":
        from nsa.kernels import combine as kernel

        return kernel.forward(cmp, sel, win, logits, softmax)
    return _reference(cmp, sel, win, logits, softmax)


Upstream = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def fold(
    backend: str, dout: torch.Tensor, outs: tuple[torch.Tensor, ...], lses: tuple[torch.Tensor, ...],
    logits: torch.Tensor, softmax: bool, folds: tuple[bool, ...],
) -> tuple[torch.Tensor, list[Upstream]]:  # fmt: skip
    """d_logits, and for the backward of cmp, sel and win, in place of three scaled gradients, (lse, gate, delta) as
    `nsa.ops.branch` has them: `folds` says whose form takes its gate in lse."""
    routing.launches["combine_backward", backend] += 1
    wide = torch.promote_types(dout.dtype, torch.float32)
    if backend == "triton":
        from nsa.kernels import combine as kernel

        d_logits, folded, deltas = kernel.fold(dout, outs, lses, logits, softmax)
        g = None if all(folds) else _gates(logits.to(wide), softmax).movedim(-1, 0)
        pairs = zip(folds, lses, range(3), strict=True)
        return d_logits, [(folded[i], None, deltas[i]) if f else (lse, g[i], None) for f, lse, i in pairs]  # type: ignore[index]
    g = _gates(logits.to(wide), softmax).movedim(-1, 0)
    deltas = g * torch.stack([(dout.to(wide) * x).sum(-1) for x in outs])
    d_logits = deltas - g * deltas.sum(0) if softmax else deltas * (1 - g)
    return d_logits.movedim(0, -1).to(logits.dtype), [(lse, one, None) for lse, one in zip(lses, g, strict=True)]


def _body(cmp, sel, win, logits, softmax, backend):
    route = routing.choose("combine", cmp, sel, win, logits, backend=backend)
    return summed(route.backend, cmp, sel, win, logits, softmax)


def _body_backward(dout, cmp, sel, win, logits, softmax, backend):
    route = routing.choose("combine", cmp, sel, win, logits, backend=backend, training=True)
    if route.backend == "triton":
        from nsa.kernels import combine as kernel

        routing.launches["combine_backward", route.backend] += 1
        return kernel.backward(dout, cmp, sel, win, logits, softmax)
    d_logits, ups = fold(route.backend, dout, (cmp, sel, win), (cmp,) * 3, logits, softmax, (False,) * 3)
    return *(dout * gate.unsqueeze(-1).to(dout.dtype) for _, gate, _ in ups if gate is not None), d_logits


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
