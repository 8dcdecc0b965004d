"""The operators of the three branches, which share their schema: route, walk ragged rows, run the form, count it.

A form is a module that `routing.form` names, with
    forward(q, k, v, blocks, pattern, S, count, backend) -> out, lse, reads
    backward(dout, q, k, v, blocks, out, lse, pattern, S, backend, gate, delta) -> dq, dk, dv
blocks are the selected branch's alone. reads [B,G] int64 are counted where keys are loaded, and empty unless `count`.
With gate [B,T,H] fp32 the upstream gradient is dout * gate. A Triton form may be given delta [B,T,H] fp32 instead,
rowsum(dout * out), and an lse less the log of the gate: its weights exp(score - lse) then carry the gate, and with it
every gradient, at no cost. A form with RAGGED = True also takes `lengths`, and then waits for no device.
"""

from __future__ import annotations

from typing import Any

import torch

from nsa import routing
from nsa.blocks import Pattern
from nsa.ops import operator
from nsa.ops.checks import by_row, row_lengths

_NAMES = {
    "compressed": "compressed_attention",
    "selected": "selected_attention",
    "window": "sliding_window_attention",
}
_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? blocks, int[] pattern, SymInt seq_len, Tensor? rows, bool count, "
    "str? backend) -> (Tensor out, Tensor lse, Tensor reads)"
)
_BACKWARD = (
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? blocks, Tensor out, Tensor lse, int[] pattern, "
    "SymInt seq_len, Tensor? rows, str? backend) -> (Tensor dq, Tensor dk, Tensor dv)"
)
Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def attend(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor | None,
    pattern: Pattern,
    S: int,
    rows: torch.Tensor | None,
    count: bool,
    backend: str | None,
) -> Three:
    """out [B,T,H,Dv], lse [B,T,H] (no gradient), reads [B,G], or [0] without `count`; rows: ragged lengths or None."""
    return _OPERATORS[op](q, k, v, blocks, list(pattern), S, rows, count, backend)


def forward(
    op: str, form: Any, backend: str, inputs: tuple[Any, ...], p: Pattern, S: int, rows: Any, count: bool
) -> Three:
    """Run a form's forward on inputs (q, k, v, blocks), ragged rows one by one."""
    q, k, v, blocks = inputs
    if rows is None:
        result = form.forward(q, k, v, blocks, p, S, count, backend)
    elif _walks_rows(form):
        result = form.forward(q, k, v, blocks, p, S, count, backend, lengths=rows)
    else:
        lengths = row_lengths(op, _NAMES[op], rows, k, q.shape[1], p)

        def one(row: slice, at: slice, S: int) -> Three:
            return form.forward(q[row, at], k[row], v[row], _rows(blocks, row, at), p, S, count, backend)

        result = by_row(one, q.shape[1], lengths, 0.0, float("-inf"), None)
    routing.launches[op, backend] += 1
    return result


def backward(
    op: str, form: Any, backend: str, dout: torch.Tensor, inputs: tuple[Any, ...], out: torch.Tensor, lse: torch.Tensor,
    p: Pattern, S: int, rows: Any, gate: torch.Tensor | None = None, delta: torch.Tensor | None = None,
) -> Three:  # fmt: skip
    """Run a form's backward, as `forward`."""
    q, k, v, blocks = inputs
    if rows is None:
        result = form.backward(dout, q, k, v, blocks, out, lse, p, S, backend, gate, delta)
    elif _walks_rows(form):
        result = form.backward(dout, q, k, v, blocks, out, lse, p, S, backend, gate, delta, lengths=rows)
    else:

        def one(row: slice, at: slice, S: int) -> Three:
            past = (q[row, at], k[row], v[row], _rows(blocks, row, at), out[row, at], lse[row, at])
            return form.backward(dout[row, at], *past, p, S, backend, _rows(gate, row, at), _rows(delta, row, at))

        result = by_row(one, q.shape[1], rows.tolist(), 0.0, None, None)
    routing.launches[f"{op}_backward", backend] += 1
    return result


def _walks_rows(form: Any) -> bool:
    """Whether a form takes the lengths themselves, and reads no key past them or past k's end."""
    return getattr(form, "RAGGED", False)


def _rows(x: torch.Tensor | None, row: slice, at: slice) -> torch.Tensor | None:
    return None if x is None else x[row, at]


def _define(op: str) -> Any:
    def body(q, k, v, blocks, pattern, seq_len, rows, count, backend):
        route = routing.choose(op, q, k, v, backend=backend, seq_len=seq_len)
        form = routing.form(op, route.backend, q)
        return forward(op, form, route.backend, (q, k, v, blocks), Pattern(*pattern), seq_len, rows, count)

    def fake(q, k, v, blocks, pattern, seq_len, rows, count, backend):
        lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        reads = (q.shape[0], k.shape[2]) if count else (0,)
        return q.new_empty(*q.shape[:3], v.shape[3]), lse, q.new_empty(reads, dtype=torch.int64)

    def body_backward(dout, q, k, v, blocks, out, lse, pattern, seq_len, rows, backend):
        route = routing.choose(op, q, k, v, backend=backend, training=True, seq_len=seq_len)
        form, inputs = routing.form(op, route.backend, q), (q, k, v, blocks)
        return backward(op, form, route.backend, dout, inputs, out, lse, Pattern(*pattern), seq_len, rows)

    def fake_backward(dout, q, k, v, blocks, out, lse, pattern, seq_len, rows, backend):
        return tuple(x.new_empty(x.shape) for x in (q, k, v))

    def save(inputs, results):
        q, k, v, blocks, pattern, seq_len, rows, _, backend = inputs
        return (q, k, v, blocks, *results[:2], rows), (pattern, seq_len, backend)

    def gradient(dout, tensors, rest):
        *past, rows = tensors
        pattern, seq_len, backend = rest
        grads = step_back(dout, *past, pattern, seq_len, rows, backend)
        return *grads, None, None, None, None, None, None

    step = operator.define(_NAMES[op] + _SCHEMA, body, fake)
    step_back = operator.define(_NAMES[op] + "_backward" + _BACKWARD, body_backward, fake_backward)
    operator.differentiable(step, gradient, save)
    return getattr(torch.ops.nsa, _NAMES[op])


_OPERATORS = {op: _define(op) for op in _NAMES}
