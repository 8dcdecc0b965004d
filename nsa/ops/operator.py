"""How an operation becomes one node of torch: its schema, its opaque body, its shapes, its gradient.

`define` registers a forward and, where there is a gradient, a backward of its own. Inside a body autocast is off, so
that a product written in fp32 is one; results are contiguous, as the fakes say; torch.compile sees one node.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nsa.ops.checks import exact

_library = torch.library.Library("nsa", "FRAGMENT")
Body = Callable[..., Any]


def define(schema: str, body: Body, fake: Body) -> Any:
    """Register `nsa::NAME(...)` by its schema; returns the overload that callers call.

    body: what runs, on any device; its tensors are made contiguous. fake: the results' shapes and dtypes.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, _contiguous(exact(body)), "CompositeExplicitAutograd")
    torch.library.register_fake(f"nsa::{name}", fake, lib=_library)
    return getattr(torch.ops.nsa, name).default


def differentiable(operator: Any, backward: Body, save: Callable[..., tuple[Any, ...]]) -> None:
    """Give `operator` a gradient.

    save(inputs, outputs) -> (tensors or None, anything else), what the backward needs;
    backward(grads of the outputs, tensors, the rest) -> a gradient, or None, for each input.
    Written on autograd's key itself: the generic registration costs twice as much a call.
    """

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                outputs = operator(*inputs)
            results = outputs if isinstance(outputs, tuple) else (outputs,)
            tensors, ctx.rest = save(inputs, results)
            ctx.save_for_backward(*tensors)
            ctx.mark_non_differentiable(*results[1:])
            ctx.set_materialize_grads(False)
            return outputs

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            if grads[0] is None:
                return (None,) * len(ctx.needs_input_grad)
            return backward(grads[0], ctx.saved_tensors, ctx.rest)

    def autograd(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs):
            return Function.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*inputs)

    _library.impl(operator._schema.name.partition("::")[2], autograd, "Autograd")


def _contiguous(body: Body) -> Body:
    def run(*args: Any) -> Any:
        results = body(*args)
        if isinstance(results, torch.Tensor):
            return results.contiguous()
        return tuple(x.contiguous() for x in results)

    return run
