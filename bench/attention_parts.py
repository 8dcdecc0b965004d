"""What bench_attention times: the parts of NSA, the whole of it, and dense attention, each as one `Part`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.attention_inputs import QKV
from nsa import routing
from nsa.config import NSAConfig
from nsa.ops.attention import sparse_attention
from nsa.ops.combine import combine
from nsa.ops.compress import MeanPhi, compress
from nsa.ops.compressed import compressed_attention
from nsa.ops.selected import selected_attention
from nsa.ops.selection import select_blocks
from nsa.ops.window import sliding_window_attention

NSA_PARTS = ("phi", "cmp", "choice", "sel", "win", "combine")
_NO_GROUPS = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 5)
CORE, WHOLE = "core", "attention"
SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
DENSE = (*SDPA, "fa3")


@dataclass(frozen=True)
class Part:
    """`run(*leaves)` is the forward; without leaves there is no backward. `held` are inputs that carry no gradient."""

    name: str
    run: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]
    leaves: tuple[torch.Tensor, ...] = ()
    held: tuple[torch.Tensor, ...] = ()

    @property
    def input_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (*self.leaves, *self.held))


@dataclass
class Sparse:
    """NSA of one q, k, v (all branches share k and v) with the backends named in `backends`, by op."""

    inputs: QKV
    cfg: NSAConfig
    backends: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.phi = MeanPhi()
        self.S = self.inputs.q.shape[1]
        self.logits = torch.randn(*self.inputs.q.shape[:3], 3, device=self.inputs.q.device, dtype=self.inputs.q.dtype)
        with torch.no_grad():
            self.k_cmp, self.v_cmp = self.compress(self.inputs.k, self.inputs.v)
            lse = self.cmp(self.inputs.q, self.k_cmp, self.v_cmp)[1]
            self.lse, self.blocks = lse, self.choose(self.inputs.q, self.k_cmp, lse)

    def compress(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return compress(k, self.phi, self.cfg), compress(v, self.phi, self.cfg)

    def cmp(self, q: torch.Tensor, k_cmp: torch.Tensor, v_cmp: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = self.backends.get("compressed")
        return compressed_attention(q, k_cmp, v_cmp, self.cfg, seq_len=self.S, backend=chosen)

    def choose(self, q: torch.Tensor, k_cmp: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        return select_blocks(q, k_cmp, lse, self.cfg, seq_len=self.S, backend=self.backends.get("selection"))

    def sel(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        return selected_attention(q, k, v, blocks, self.cfg, backend=self.backends.get("selected"))

    def win(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sliding_window_attention(q, k, v, self.cfg, backend=self.backends.get("window"))

    def combine(self, cmp: torch.Tensor, sel: torch.Tensor, win: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return combine(cmp, sel, win, logits, self.cfg, backend=self.backends.get("combine"))

    def core(self, *tensors: torch.Tensor) -> torch.Tensor:
        """The one operator of a layer: q, k_cmp, v_cmp, k and v of sel and of win, gate logits -> [B,S,H,D]."""
        q, k_cmp, v_cmp, k_sel, v_sel, k_win, v_win, logits = tensors
        pairs = (k_cmp, v_cmp), (k_sel, v_sel), (k_win, v_win)
        return sparse_attention(q, *pairs, logits, self.cfg, seq_len=self.S)

    def attention(self, *tensors: torch.Tensor) -> torch.Tensor:
        """What a layer does between its projections, the rotation left out: phi, and the core."""
        q, k_raw, v_raw, *rest = tensors
        return self.core(q, *self.compress(k_raw, v_raw), *rest)

    def part(self, name: str) -> Part:
        """One of NSA_PARTS, the core, or the whole."""
        q, k, v = self.inputs
        if name == "phi":
            return Part(name, self.compress, leaves(k, v))
        if name == "cmp":
            return Part(name, lambda *x: self.cmp(*x)[0], leaves(q, self.k_cmp, self.v_cmp))
        if name == "choice":
            held = (q, self.k_cmp, self.lse)
            return Part(name, lambda: self.choose(*held), held=held)
        if name == "sel":
            return Part(name, lambda *x: self.sel(*x, self.blocks), leaves(q, k, v), (self.blocks,))
        if name == "win":
            return Part(name, self.win, leaves(q, k, v))
        if name == "combine":
            return Part(name, self.combine, leaves(*(torch.randn_like(q) for _ in range(3)), self.logits))
        if name == CORE:
            return Part(name, self.core, leaves(q, self.k_cmp, self.v_cmp, k, v, k, v, self.logits))
        return Part(WHOLE, self.attention, leaves(q, k, v, k, v, k, v, self.logits))


def leaves(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same storage, as leaves that want a gradient."""
    return tuple(x.detach().requires_grad_() for x in tensors)


def dense(name: str, inputs: QKV) -> Part:
    """Causal attention over all of S by `name` of DENSE, in the layout that it likes best."""
    if name == "fa3":
        return Part("dense-fa3", _FlashAttention3.apply, leaves(*inputs))
    q, k, v = (x.transpose(1, 2).contiguous() for x in inputs)
    options = {"enable_gqa": True}
    if _NO_GROUPS:  # every head gets keys and values of its own, before the clock starts
        options, (k, v) = {}, (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(SDPA[name]):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)

    return Part(f"dense-{name}", run, leaves(q, k, v))


def load_fa3(library: Path) -> None:
    """Load a library that registers torch.ops.flash_attn_3, after the CUDA runtime that may lie beside it.

    OSError where it cannot be loaded, ValueError where it registers nothing of the kind.
    """
    for runtime in sorted(library.parent.glob("libcudart.so*")):
        ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
    torch.ops.load_library(str(library))
    if not hasattr(torch.ops.flash_attn_3, "bwd"):
        raise ValueError("it registers no torch.ops.flash_attn_3.bwd")


class _FlashAttention3(torch.autograd.Function):
    """FlashAttention-3 on [1,S,heads,D], causal."""

    @staticmethod
    def forward(ctx, q, k, v):
        out, lse, *_ = torch.ops.flash_attn_3.fwd(q, k, v, softmax_scale=q.shape[-1] ** -0.5, is_causal=True)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        dq, dk, dv, *_ = torch.ops.flash_attn_3.bwd(
            dout.contiguous(), q, k, v, out, lse, softmax_scale=scale, is_causal=True
        )
        return dq, dk, dv


def triton_backends(inputs: QKV) -> tuple[dict[str, str], list[str]]:
    """Triton by name for the ops that have it, proven on this card or not; and why not where it cannot run."""
    found, reasons = {}, []
    for op in ("selection", "selected", "combine"):
        tensors = {"selection": inputs[:2], "combine": inputs[:1]}.get(op, inputs)
        try:
            found[op] = routing.choose(op, *tensors, backend="triton", training=op != "selection").backend
        except routing.Unsupported as error:
            reasons.append(str(error))
    return found, reasons


def ran(before: dict[tuple[str, str], int]) -> Iterator[tuple[str, str, int]]:
    """(op, backend, times) of what was launched since `before`, a copy of routing.launches."""
    for (op, backend), times in sorted(routing.launches.items()):
        if more := times - before.get((op, backend), 0):
            yield op, backend, more
