"""The core of a layer as one operator: three branches, the block choice, the gated sum; one backward for all of it.

Everything between the projections: compressed attention, block choice, selected and window attention, gates (Eqs. 5 to
12). torch.compile sees one node; autocast ends at its door; what runs is decided once a shape (`nsa.plan`).
"""

from __future__ import annotations

from typing import Any

import torch

from nsa import routing
from nsa.blocks import Pattern
from nsa.config import NSAConfig
from nsa.ops import branch, combine, operator, selection
from nsa.ops.checks import check_keys, check_qkv, check_seq_len
from nsa.ops.compressed import compressed_attention
from nsa.ops.selected import selected_attention
from nsa.ops.window import sliding_window_attention
from nsa.plan import Plan

Pair = tuple[torch.Tensor, torch.Tensor]


def sparse_attention(
    q: torch.Tensor,
    cmp: Pair,
    sel: Pair,
    win: Pair,
    logits: torch.Tensor,
    cfg: NSAConfig,
    *,
    seq_len: int | torch.Tensor,
    blocks: torch.Tensor | None = None,
    reads: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """What a layer does between its projections: [B,T,H,Dv] in q.dtype.

    q [B,T,H,Dk], the last T of `seq_len` positions (an int, or int32 [B] for ragged rows). Keys and values of each
    branch, as its own operation takes them: cmp [B,>=C,G,D], sel [B,>=S,G,D], win [B,K,G,D] with K >=
    min(S, w + T - 1). logits [B,T,H,3] of the gates, activated as cfg.gate says. blocks int32 [B,T,G,N] are attended to
    in place of the choice. reads, int64 [3,B,G], gains the tokens that cmp, sel and win read. backend: None routes,
    `triton` asks it of every operation, `reference` composes the specifications.
    Differentiable in q, keys, values and logits. Raises ValueError for inputs that do not fit, Unsupported.
    """
    for op, (k, v) in (("compressed_attention", cmp), ("selected_attention", sel), ("sliding_window_attention", win)):
        check_qkv(op, q, k, v)
    S, rows = check_seq_len("sparse_attention", q, seq_len)
    if logits.shape != (*q.shape[:3], 3):
        raise ValueError(
            f"sparse_attention: gate logits have shape {tuple(logits.shape)}; expected {[*q.shape[:3], 3]}"
        )
    if rows is None:
        for op, (k, _) in (("compressed", cmp), ("selected", sel), ("window", win)):
            check_keys(op, f"sparse_attention, {op}", k, S, q.shape[1], cfg)
    if backend == "reference":
        return _reference(q, cmp, sel, win, logits, cfg, seq_len, blocks, reads)
    tensors = (q, *cmp, *sel, *win, logits)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)  # what only a backward reads
    facts = (list(cfg.pattern), cfg.gate == "softmax", S, rows, blocks, reads is not None, keep, backend)
    out, _, count, *_ = torch.ops.nsa.attention(*tensors, *facts)
    if reads is not None:
        reads += count
    return out


def _reference(
    q: torch.Tensor, cmp: Pair, sel: Pair, win: Pair, logits: torch.Tensor, cfg: NSAConfig,
    seq_len: int | torch.Tensor, blocks: torch.Tensor | None, reads: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """The specification: that of each operation, one after the other."""
    r_cmp, r_sel, r_win = (None,) * 3 if reads is None else reads
    how: dict[str, Any] = {"seq_len": seq_len, "backend": "reference"}
    o_cmp, lse = compressed_attention(q, *cmp, cfg, reads=r_cmp, **how)
    if blocks is None:
        blocks = selection.select_blocks(q, cmp[0], lse, cfg, **how)
    o_sel = selected_attention(q, *sel, blocks, cfg, reads=r_sel, **how)
    o_win = sliding_window_attention(q, *win, cfg, reads=r_win, **how)
    return combine.combine(o_cmp, o_sel, o_win, logits, cfg, backend="reference")


def _body(
    q, k_cmp, v_cmp, k_sel, v_sel, k_win, v_win, logits, pattern, softmax, seq_len, rows, blocks, count, keep, backend
):  # fmt: skip
    p, S = Pattern(*pattern), seq_len
    plan = Plan.of(q, k_cmp, v_cmp, logits, p, S if rows is None else None, training=False, backend=backend)
    run = (p, S, rows, count)
    cmp, lse_cmp, n_cmp = _forward(plan, "compressed", (q, k_cmp, v_cmp, None), *run)
    given, skip = blocks, blocks is None and plan.everything
    if blocks is None and not skip:
        form = plan.form("selection", q)
        blocks = selection.choose(form, plan.backend("selection"), q, k_cmp, lse_cmp, p, S, rows)
    win, lse_win, n_win = _forward(plan, "window", (q, k_win, v_win, None), *run)
    lists = q.new_empty(0, dtype=torch.int32)
    if plan.summed:
        form, gates = plan.form("selected", q), (cmp, win, logits, softmax)
        out, sel, lse_sel, n_sel, lists = form.forward_summed(
            q, k_sel, v_sel, blocks, p, S, count, plan.backend("selected"), *gates, keep
        )
        routing.launches["selected", plan.backend("selected")] += 1
        routing.launches["combine", plan.backend("combine")] += 1
        if not keep:
            lists = lists.new_empty(0)
    else:
        sel, lse_sel, n_sel = _forward(plan, "selected", (q, k_sel, v_sel, blocks), *run)
        out = combine.summed(plan.backend("combine"), cmp, sel, win, logits, softmax)
    reads = torch.stack([n_cmp, n_sel, n_win]) if count else n_cmp
    # An operator hands no input back, and what was not chosen has no name.
    chosen = q.new_empty(0, dtype=torch.int32) if skip or given is not None else blocks
    return out, chosen, reads, cmp, lse_cmp, sel, lse_sel, win, lse_win, lists


def _fake(
    q, k_cmp, v_cmp, k_sel, v_sel, k_win, v_win, logits, pattern, softmax, seq_len, rows, blocks, count, keep, backend
):  # fmt: skip
    B, T, H, _ = q.shape
    p, G = Pattern(*pattern), k_cmp.shape[2]
    outs = [q.new_empty(B, T, H, v.shape[3]) for v in (v_cmp, v_cmp, v_sel, v_win)]
    lses = [q.new_empty(B, T, H, dtype=torch.promote_types(q.dtype, torch.float32)) for _ in range(3)]
    chosen = (B, T, G, p.n_sel) if blocks is None else (0,)
    n_lists = 0
    if q.is_cuda and rows is None:  # elsewhere nothing is listed
        plan = Plan.of(q, k_cmp, v_cmp, logits, p, seq_len, training=False, backend=backend)
        skip = blocks is None and plan.everything
        chosen = (0,) if skip else chosen
        if plan.summed and keep and not skip:
            N = p.n_sel if blocks is None else blocks.shape[3]
            n_lists = plan.form("selected", q).lists_size(q, v_sel, N, p, seq_len)
    reads = q.new_empty((3, B, G) if count else (0,), dtype=torch.int64)
    saved = (x for pair in zip(outs[1:], lses, strict=True) for x in pair)
    lists = q.new_empty(n_lists, dtype=torch.int32)
    return outs[0], q.new_empty(chosen, dtype=torch.int32), reads, *saved, lists


def _body_backward(
    dout, q, k_cmp, v_cmp, k_sel, v_sel, k_win, v_win, logits, blocks, cmp, lse_cmp, sel, lse_sel, win, lse_win, lists,
    pattern, softmax, seq_len, rows, backend,
):  # fmt: skip
    p, S = Pattern(*pattern), seq_len
    plan = Plan.of(q, k_cmp, v_cmp, logits, p, S if rows is None else None, training=True, backend=backend)
    folds = tuple(plan.backend(op) == "triton" for op in ("compressed", "selected", "window"))
    d_logits, (up_cmp, up_sel, up_win) = combine.fold(
        plan.backend("combine"), dout, (cmp, sel, win), (lse_cmp, lse_sel, lse_win), logits, softmax, folds
    )
    run = (dout, p, S, rows)
    dq_cmp, dk_cmp, dv_cmp = _backward(plan, "compressed", (q, k_cmp, v_cmp, None), cmp, up_cmp, *run)
    dq_win, dk_win, dv_win = _backward(plan, "window", (q, k_win, v_win, None), win, up_win, *run)
    if plan.summed:
        form, listed = plan.form("selected", q), blocks if blocks.numel() else None
        lse_sel, gate, delta = up_sel
        dq, dk_sel, dv_sel = form.backward(
            dout, q, k_sel, v_sel, listed, sel, lse_sel, p, S, plan.backend("selected"), gate, delta,
            lists=lists, plus=(dq_cmp, dq_win),
        )  # fmt: skip
        routing.launches["selected_backward", plan.backend("selected")] += 1
    else:
        dq_sel, dk_sel, dv_sel = _backward(plan, "selected", (q, k_sel, v_sel, blocks), sel, up_sel, *run)
        dq = dq_cmp + dq_sel + dq_win
    return dq, dk_cmp, dv_cmp, dk_sel, dv_sel, dk_win, dv_win, d_logits


def _forward(plan: Plan, op: str, inputs: tuple[Any, ...], p: Pattern, S: int, rows: Any, count: bool) -> branch.Three:
    return branch.forward(op, plan.form(op, inputs[0]), plan.backend(op), inputs, p, S, rows, count)


def _backward(
    plan: Plan, op: str, inputs: tuple[Any, ...], out: torch.Tensor, up: combine.Upstream, dout: torch.Tensor,
    p: Pattern, S: int, rows: Any,
) -> branch.Three:  # fmt: skip
    lse, gate, delta = up
    form = plan.form(op, inputs[0])
    return branch.backward(op, form, plan.backend(op), dout, inputs, out, lse, p, S, rows, gate, delta)


_KEYS = "Tensor q, Tensor k_cmp, Tensor v_cmp, Tensor k_sel, Tensor v_sel, Tensor k_win, Tensor v_win, Tensor logits"
_step = operator.define(
    f"attention({_KEYS}, int[] pattern, bool softmax, SymInt seq_len, Tensor? rows, Tensor? blocks, bool count, "
    "bool keep, str? backend) -> (Tensor out, Tensor blocks, Tensor reads, Tensor cmp, Tensor lse_cmp, Tensor sel, "
    "Tensor lse_sel, Tensor win, Tensor lse_win, Tensor lists)",
    _body,
    _fake,
)
_step_back = operator.define(
    f"attention_backward(Tensor dout, {_KEYS}, Tensor blocks, Tensor cmp, Tensor lse_cmp, Tensor sel, Tensor lse_sel, "
    "Tensor win, Tensor lse_win, Tensor lists, int[] pattern, bool softmax, SymInt seq_len, Tensor? rows, "
    "str? backend) -> (Tensor dq, Tensor dk_cmp, Tensor dv_cmp, Tensor dk_sel, Tensor dv_sel, Tensor dk_win, "
    "Tensor dv_win, Tensor dlogits)",
    _body_backward,
    lambda dout, *rest: tuple(x.new_empty(x.shape) for x in rest[:8]),
)


def _save(inputs: tuple[Any, ...], results: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
    *tensors, pattern, softmax, seq_len, rows, blocks, _, _, backend = inputs
    kept = results[1] if blocks is None else blocks
    return (*tensors, kept, *results[3:], rows), (pattern, softmax, seq_len, backend)


def _gradient(dout: torch.Tensor, tensors: tuple[torch.Tensor, ...], rest: tuple[Any, ...]) -> tuple[Any, ...]:
    *saved, rows = tensors
    pattern, softmax, seq_len, backend = rest
    return *_step_back(dout, *saved, pattern, softmax, seq_len, rows, backend), *(None,) * 8


operator.differentiable(_step, _gradient, _save)
