"""What scripts and benches measure with: time, peak memory, how far a long run is, and what an allocation was refused.

Everything said here goes to stderr; stdout is a script's deliverable.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import TracebackType
from typing import Any, NamedTuple, TextIO

import torch


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_ms(step: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one call: between two CUDA events on a GPU, of the wall clock elsewhere."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    began = time.perf_counter()
    step()
    return (time.perf_counter() - began) * 1e3


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: allocated by torch on a GPU, resident in the process (libraries included) elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_name(device: torch.device) -> str:
    """The device as a reader of a report knows it: its kind, with the card's name or the thread count."""
    if device.type == "cuda":
        return f"{device.type} ({torch.cuda.get_device_name(device)})"
    return f"{device.type} ({torch.get_num_threads()} threads)"


class Clocks(NamedTuple):
    """What a GPU runs at, MHz."""

    sm: int
    memory: int


def clocks(device: torch.device) -> Clocks | None:
    """The clocks of a GPU at this moment, as NVML (nvidia-smi's library) gives them; None where it gives none."""
    if device.type != "cuda":
        return None
    handle = _nvml_device(str(getattr(torch.cuda.get_device_properties(device), "uuid", "")))
    if handle is None:
        return None
    nvml, card = handle
    values = []
    for clock in (1, 2):  # NVML_CLOCK_SM, NVML_CLOCK_MEM
        value = ctypes.c_uint()
        if nvml.nvmlDeviceGetClockInfo(card, clock, ctypes.byref(value)):
            return None
        values.append(value.value)
    return Clocks(*values)


@cache
def _nvml_device(uuid: str) -> tuple[ctypes.CDLL, ctypes.c_void_p] | None:
    """(NVML, its handle of the GPU with this UUID), which need no driver context; None where there is no NVML."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    card = ctypes.c_void_p()
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode(), ctypes.byref(card)):
        return None
    return nvml, card


def refused_allocation(error: BaseException) -> str | None:
    """How much memory an error says was asked for and refused, in words; None if the error is about something else."""
    if isinstance(error, MemoryError):
        return "an amount that Python does not name"
    text = str(error)
    if found := re.search(r"tried to allocate ([\d.]+ \w+)", text, re.IGNORECASE):
        amount, unit = found.group(1).split()
        return in_gib(int(float(amount))) if unit == "bytes" else found.group(1)
    if "Storage size calculation overflowed" in text:
        return "more bytes than 64 bits can count"
    return None


def in_gib(n_bytes: int) -> str:
    """Bytes as GiB with two decimals."""
    return f"{n_bytes / 2**30:.2f} GiB"


@contextmanager
def memory_errors(prog: str, lower: str, device: torch.device) -> Iterator[None]:
    """End the script with code 1 and one line where memory is refused: how much was asked for, and what to `lower`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        amount = refused_allocation(error)
        if amount is None:
            raise
        print(
            f"{prog}: out of memory: {amount} were asked for and refused, with {in_gib(peak_memory(device))} in use; "
            f"lower {lower}",
            file=sys.stderr,
        )
        sys.exit(1)


class Progress:
    """How far a long run is: a bar where stderr is a terminal, elsewhere a line about every `every` seconds.

    total counts in `unit`; advance() says how many more are done.
    """

    def __init__(self, label: str, total: int, unit: str, *, every: float = 10.0, stream: TextIO | None = None) -> None:
        self.label, self.total, self.unit, self.every = label, total, unit, every
        self.stream = sys.stderr if stream is None else stream
        self.done, self.began = 0, time.monotonic()
        self._said = self.began
        self._bar: Any = None
        if self.stream.isatty() and importlib.util.find_spec("tqdm"):
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=label, unit=f" {unit}", file=self.stream, dynamic_ncols=True)

    def advance(self, n: int) -> None:
        """n more are done."""
        self.done += n
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(n)
        elif now - self._said >= self.every or self.done >= self.total:
            self._said = now
            print(
                f"{self.label}: {self.done}/{self.total} {self.unit}, {now - self.began:.0f} s",
                file=self.stream,
                flush=True,
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
