"""The gated sum of the branches (Eq. 5)."""

import torch

from nsa import routing
from nsa.config import NSAConfig

# Below this many elements the operator costs more on the host than the plain form's four launches.
_FEW_ELEMENTS = 1 << 20


def gates(logits: torch.Tensor, cfg: NSAConfig) -> torch.Tensor:
    """Gate logits [B,T,H,3] (cmp, sel, win) -> gates [B,T,H,3]: a sigmoid each, or a softmax over the three."""
    return _gates(logits, cfg.gate == "softmax")


def _gates(logits: torch.Tensor, softmax: bool) -> torch.Tensor:
    return logits.softmax(-1) if softmax else logits.sigmoid()


def apply_gate(out: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """Scale a branch's output [B,T,H,Dv] by its gate [B,T,H]; None leaves it as it is."""
    return out if gate is None else out * gate.unsqueeze(-1).to(out.dtype)


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
    return _combine(cmp, sel, win, logits, softmax, backend)


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


@torch.library.custom_op("nsa::combine", mutates_args=())
def _combine(
    cmp: torch.Tensor, sel: torch.Tensor, win: torch.Tensor, logits: torch.Tensor, softmax: bool, backend: str | None
) -> torch.Tensor:
    route = routing.choose("combine", cmp, sel, win, logits, backend=backend)
    routing.launches["combine", route.backend] += 1
    if route.backend == "triton":
        from nsa.kernels import combine as kernel

        return kernel.forward(cmp, sel, win, logits, softmax)
    return _reference(cmp, sel, win, logits, softmax).contiguous()


@_combine.register_fake
def _(cmp, sel, win, logits, softmax, backend):
    return cmp.new_empty(cmp.shape)


@torch.library.custom_op("nsa::combine_backward", mutates_args=())
def _combine_backward(
    dout: torch.Tensor,
    cmp: torch.Tensor,
    sel: torch.Tensor,
    win: torch.Tensor,
    logits: torch.Tensor,
    softmax: bool,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    route = routing.choose("combine", cmp, sel, win, logits, backend=backend, training=True)
    routing.launches["combine_backward", route.backend] += 1
    if route.backend == "triton":
        from nsa.kernels import combine as kernel

        return kernel.backward(dout, cmp, sel, win, logits, softmax)
    d_cmp, d_sel, d_win, d_logits = _reference_backward(dout, cmp, sel, win, logits, softmax)
    return d_cmp.contiguous(), d_sel.contiguous(), d_win.contiguous(), d_logits.contiguous()


@_combine_backward.register_fake
def _(dout, cmp, sel, win, logits, softmax, backend):
    return tuple(x.new_empty(x.shape) for x in (cmp, sel, win, logits))


def _setup(ctx, inputs, output):
    *tensors, ctx.softmax, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, dout):
    return *_combine_backward(dout, *ctx.saved_tensors, ctx.softmax, ctx.backend), None, None


_combine.register_autograd(_autograd, setup_context=_setup)
