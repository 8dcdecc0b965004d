"""One call of the selected branch's Triton kernels, forward and backward, beside the specification in fp64.

The interpreter on a CPU and a GPU run the same cases; what a case demands is the same on both.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from nsa import NSAConfig
from nsa.ops.selected import selected_attention_reference
from nsa.testing import fixed_selection, inputs

# Of the norm of a result: fp32 arithmetic, or one rounding of each partial and of the result.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
SMALL = {"l": 8, "d": 4, "l_sel": 16, "n_sel": 4, "w": 20}

Slots = Callable[[torch.Tensor], None]


@contextmanager
def bounds(module: Any, values: dict[str, Any]) -> Iterator[None]:
    """Constants of a kernel's module set to `values`: small inputs then walk in chunks and pieces, as long ones do."""
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def run(
    shape: tuple[int, ...],
    pattern: dict[str, int],
    dtype: torch.dtype,
    slots: Slots | None = None,
    *,
    device: str = "cpu",
    contiguous: bool = True,
    guard: Callable[[], AbstractContextManager[None]] = nullcontext,
    **small: Any,
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor]:
    """(q, k, v, dout, blocks), (out, dq, dk, dv), lse, reads for (B, T, S, G, R, Dk, Dv); `slots` spoils the blocks.

    What torch.empty returns is NaN: a result that holds was written, all of it. `small`: see `bounds`; unions of
    blocks are walked only where it says so.
    """
    from nsa.kernels import selected

    B, T, S, G, R, Dk, Dv = shape
    cfg = NSAConfig(**pattern)
    q, k, v = inputs(B, T, S, G=G, R=R, Dk=Dk, Dv=Dv, dtype=dtype, contiguous=contiguous, device=device)
    blocks = fixed_selection(B, T, G, S, cfg)
    if slots is not None:
        slots(blocks)
    blocks = blocks.to(device)
    dout = torch.randn(B, T, G * R, Dv, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    torch.use_deterministic_algorithms(True)
    try:
        with bounds(selected, {"_UNION": 0, **small}), guard():
            out, lse, reads = selected.forward(q, k, v, blocks, cfg.pattern, S, True, "triton")
            grads = selected.backward(dout, q, k, v, blocks, out, lse, cfg.pattern, S, "triton", None, None)
    finally:
        torch.use_deterministic_algorithms(False)
    return (q, k, v, dout, blocks), (out, *grads), lse, reads


def errors(
    shape: tuple[int, ...],
    pattern: dict[str, int],
    dtype: torch.dtype = torch.float32,
    slots: Slots | None = None,
    **more: Any,
) -> dict[str, float]:
    """By name, the error of the output and of each gradient relative to the norm of the specification's in fp64.

    Asserts which rows are blind and how many tokens were read. A block outside the list of the query's own past counts
    as no block.
    """
    tensors, got, lse, reads = run(shape, pattern, dtype, slots, **more)
    (q, k, v, dout, blocks), got, lse, reads = _on_cpu(tensors), _on_cpu(got), lse.cpu(), reads.cpu()
    cfg, S = NSAConfig(**pattern), shape[2]
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    own = torch.arange(S - shape[1], S)[:, None, None] // cfg.l_sel
    legal = blocks.masked_fill((blocks < 0) | (blocks > own), -1)
    want = selected_attention_reference(leaves[0], leaves[1], leaves[2], legal, cfg, seq_len=S)
    wanted = (want.detach(), *torch.autograd.grad(want, leaves, dout.double()))
    tail = torch.arange(S - shape[1], S)[:, None, None] % cfg.l_sel + 1
    tokens = torch.where(legal == own, tail, cfg.l_sel) * (legal >= 0)
    assert torch.equal(lse.isneginf(), (legal < 0).all(-1).repeat_interleave(shape[4], -1))
    assert torch.equal(reads, tokens.sum((1, 3)))
    return {
        name: float((a.double() - b).norm() / b.norm().clamp(min=1e-30))
        for name, a, b in zip(("out", "dq", "dk", "dv"), got, wanted, strict=True)
    }


def summed(
    shape: tuple[int, ...],
    pattern: dict[str, int],
    dtype: torch.dtype = torch.float32,
    *,
    softmax: bool = False,
    slots: Slots | None = None,
    device: str = "cpu",
    contiguous: bool = True,
    longer: int = 0,
    guard: Callable[[], AbstractContextManager[None]] = nullcontext,
    **small: Any,
) -> dict[str, float]:
    """As `errors`, of the gated sum, and of the gradients where a gate scales the branch's and other dq are added.

    longer: rows of k and v past S, whose gradient must be 0.
    """
    from nsa.kernels import selected

    B, T, S, G, R, Dk, Dv = shape
    cfg = NSAConfig(**pattern)
    q, k, v = inputs(B, T, S + longer, G=G, R=R, Dk=Dk, Dv=Dv, dtype=dtype, contiguous=contiguous)
    blocks = fixed_selection(B, T, G, S, cfg)
    if slots is not None:
        slots(blocks)
    generator = torch.Generator().manual_seed(1)

    def random(*last: int) -> torch.Tensor:
        x = torch.randn(B, T, G * R, *last, generator=generator).to(dtype)
        return x if contiguous else x.transpose(1, 2).contiguous().transpose(1, 2)

    dout, cmp, win, logits, plus = random(Dv), random(Dv), random(Dv), random(3), (random(Dk), random(Dk))
    gates = logits.float().softmax(-1) if softmax else logits.float().sigmoid()
    gate = gates[..., 1].contiguous().to(device)
    heres = (x.to(device) for x in (q, k, v, blocks, dout, cmp, win, logits))
    at_q, at_k, at_v, at_blocks, at_dout, at_cmp, at_win, at_logits = heres
    torch.use_deterministic_algorithms(True)
    try:
        with bounds(selected, {"_UNION": 0, **small}), guard():
            total, out, lse, _, lists = selected.forward_summed(
                at_q, at_k, at_v, at_blocks, cfg.pattern, S, False, "triton", at_cmp, at_win, at_logits, softmax
            )
            delta, folded = (at_dout.float() * out.float()).sum(-1), lse - gate.log()
            add = (plus[0].to(device), plus[1].to(device))
            past = (at_dout, at_q, at_k, at_v, at_blocks, out, folded, cfg.pattern, S, "triton", None, delta)
            grads = selected.backward(*past, lists=lists, plus=add)
            alone = selected.backward(*past)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(alone[1:], grads[1:], strict=True))
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    want = selected_attention_reference(leaves[0], leaves[1][:, :S], leaves[2][:, :S], blocks, cfg, seq_len=S)
    wide = gates.double().unsqueeze(-1)
    dq, dk, dv = torch.autograd.grad(want, leaves, dout.double() * wide[..., 1, :])
    wanted = {
        "sum": cmp.double() * wide[..., 0, :] + want.detach() * wide[..., 1, :] + win.double() * wide[..., 2, :],
        **{"out": want.detach(), "dq": dq + plus[0].double() + plus[1].double(), "dk": dk, "dv": dv, "alone": dq},
    }
    assert all(float(x[:, S:].abs().sum()) == 0.0 for x in grads[1:])
    got = _on_cpu((total, out, *grads, alone[0]))
    return {
        name: float((a.double() - b).norm() / b.norm().clamp(min=1e-30))
        for a, (name, b) in zip(got, wanted.items(), strict=True)
    }


def _on_cpu(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(x.cpu() for x in tensors)


def excess(errors: dict[str, float], dtype: torch.dtype = torch.float32, patience: float = 1.0) -> dict[str, float]:
    """The errors above the tolerance; NaN is above any."""
    return {name: error for name, error in errors.items() if not error <= patience * TOLERANCE[dtype]}


def without(slot: int) -> Slots:
    """That slot of every query is empty."""

    def clear(blocks: torch.Tensor) -> None:
        blocks[..., slot] = -1

    return clear


def blind(blocks: torch.Tensor) -> None:
    """Some queries see nothing."""
    blocks[:, 3:9] = -1


def one_block(blocks: torch.Tensor) -> None:
    """Every query chooses block 0 alone."""
    blocks[..., 0] = 0
    blocks[..., 1:] = -1


def out_of_range(S: int, l_sel: int) -> Slots:
    """Slots 1 and 2 name blocks past any sequence, below -1, and of the query's future."""

    def spoil(blocks: torch.Tensor) -> None:
        blocks[:, ::2, :, 1] = 2**31 - 1
        blocks[:, 1::2, :, 1] = -7
        blocks[:, :, :, 2] = torch.arange(S - blocks.shape[1], S).view(1, -1, 1) // l_sel + 1

    return spoil
