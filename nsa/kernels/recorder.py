"""Which kernels a call would launch, and how each is specialised, found by making the call without a GPU.

The host code of the kernels runs on meta tensors, at any length and in no memory; its launches are written down
instead of made. So the launch tables are proven by the code that reads them, not by a second list.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

_TYPES = {
    **{torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"},
    **{torch.int32: "i32", torch.int64: "i64", torch.int8: "i8", torch.bool: "i1"},
}


@dataclass(frozen=True)
class Launch:
    """One specialisation of one kernel: what a process needs to compile it.

    home, function: where the kernel is; types: Triton's type of each run-time argument; aligned: those that are
    multiples of 16; ones: those that are 1; registers: the most that a thread may have, where the launch says so.
    """

    home: str
    function: str
    types: dict[str, str]
    aligned: tuple[str, ...]
    ones: tuple[str, ...]
    constants: dict[str, Any]
    warps: int
    stages: int
    registers: int | None = None

    @property
    def name(self) -> str:
        """module.kernel"""
        return f"{self.home.rpartition('.')[2]}.{self.function.lstrip('_')}"

    @property
    def kernel(self) -> Any:
        """The kernel itself."""
        return vars(importlib.import_module(self.home))[self.function]


@dataclass
class Recording:
    """Launches in the order in which they were asked for; equal ones once."""

    launches: list[Launch] = field(default_factory=list)

    def add(self, kernel: Any, values: tuple[Any, ...], options: dict[str, Any]) -> None:
        launch = _launch(kernel, values, dict(options))
        if launch not in self.launches:
            self.launches.append(launch)


@contextmanager
def recorded(sm: int) -> Iterator[Recording]:
    """Inside, launches are recorded, and the modules of nsa.kernels take their card to be of capability `sm`."""
    from triton.runtime.jit import JITFunction

    recording = Recording()

    def run(kernel: Any, *values: Any, grid: Any, warmup: bool, **options: Any) -> None:
        recording.add(kernel, values, options)

    modules = [m for n, m in sys.modules.items() if n.startswith("nsa.kernels.") and hasattr(m, "capability")]
    stock, cards = JITFunction.run, [vars(m)["capability"] for m in modules]
    JITFunction.run = run
    for module in modules:
        vars(module)["capability"] = lambda *_: sm
    try:
        yield recording
    finally:
        JITFunction.run = stock
        for module, card in zip(modules, cards, strict=True):
            vars(module)["capability"] = card


def _launch(kernel: Any, values: tuple[Any, ...], options: dict[str, Any]) -> Launch:
    warps, stages = options.pop("num_warps", 4), options.pop("num_stages", 3)
    registers = options.pop("maxnreg", None)
    named = {**dict(zip(kernel.arg_names, values, strict=False)), **options}
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned, ones = [], []
    for parameter in kernel.params:
        name, value = parameter.name, named[parameter.name]
        if parameter.is_constexpr:
            constants[name] = value
        elif isinstance(value, torch.Tensor):
            types[name] = "*" + _TYPES[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:
                aligned.append(name)
        elif isinstance(value, int):
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if not parameter.do_not_specialize:
                aligned += [name] * (value % 16 == 0)
                ones += [name] * (value == 1)
        else:
            types[name] = "fp32"
    return Launch(
        kernel.__module__, kernel.__name__, types, tuple(aligned), tuple(ones), constants, warps, stages, registers
    )
