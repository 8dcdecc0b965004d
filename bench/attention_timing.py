"""Median times of a part, its peak memory, the clocks it ran at, and what the machine itself can do in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from bench.attention_parts import Part
from nsa import measure

_LEAST_REPEATS = 3
# Floor of the buffer that pushes a call's inputs out of the second-level cache, for cards that do not tell its size.
_FLUSH_BYTES = 64 << 20


class Median(NamedTuple):
    ms: float
    repeats: int


class Timing(NamedTuple):
    """Of one part. None: no gradient (bwd), not asked for (step, operations), not known on a CPU (memory, clocks).

    operations: what the device did, forward and backward, memory copies and sets included.
    """

    fwd: Median
    bwd: Median | None
    step: Median | None
    operations: tuple[int, int] | None
    peak_mib: float | None
    clocks: measure.Clocks | None


class Ceilings(NamedTuple):
    """What a copy (bytes read and written) and a square product of random numbers reach here, now."""

    copy_gbs: float
    matmul_tflops: float


class Timer:
    """Times calls: one to warm up, then up to `repeats` and about `budget_ms` of them, at least three.

    On a GPU calls are queued without waiting between them, each between its own two events and after a write of twice
    the second-level cache, which is not timed.
    """

    def __init__(self, device: torch.device, repeats: int, budget_ms: float) -> None:
        self.device, self.repeats, self.budget_ms = device, repeats, budget_ms
        self.clocks: measure.Clocks | None = None
        self._flush: torch.Tensor | None = None
        if device.type == "cuda":
            cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
            self._flush = torch.empty(max(2 * cache, _FLUSH_BYTES), dtype=torch.uint8, device=device)

    def median(self, step: Callable[[], object]) -> Median:
        step()
        times = self._times(step, 1)
        affordable = int(self.budget_ms / max(times[0], 1e-3))
        times += self._times(step, max(_LEAST_REPEATS, min(self.repeats, affordable)) - 1)
        return Median(statistics.median(times), len(times))

    def _operations(self, part: Part, grads: tuple[torch.Tensor, ...]) -> tuple[int, int]:
        held: list[tuple[torch.Tensor, ...]] = []
        forward = device_operations(lambda: held.append(_tuple(part.run(*part.leaves))))
        return forward, device_operations(lambda: torch.autograd.grad(held[0], part.leaves, grads))

    def _times(self, step: Callable[[], object], n: int) -> list[float]:
        if self._flush is None:
            return [measure.time_ms(step, self.device) for _ in range(n)]
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n)]
        for start, end in pairs:
            self._flush.zero_()
            start.record()
            step()
            end.record()
        self.clocks = measure.clocks(self.device)  # while the card is at it
        measure.synchronize(self.device)
        return [start.elapsed_time(end) for start, end in pairs]

    def part(self, part: Part, *, whole_step: bool) -> Timing:
        """Forward without a graph, backward alone, and with whole_step both in one timed call, and counted.

        peak_mib counts what the part's inputs, results, gradients and workspace hold at once, over all of these.
        """
        cuda = self.device.type == "cuda"
        held = torch.cuda.memory_allocated(self.device) - part.input_bytes if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        with torch.no_grad():
            fwd = self.median(lambda: part.run(*part.leaves))
        bwd = step = operations = None
        if part.leaves:
            outs = _tuple(part.run(*part.leaves))
            grads = tuple(torch.randn_like(out) for out in outs)
            bwd = self.median(lambda: torch.autograd.grad(outs, part.leaves, grads, retain_graph=True))
            del outs
            if whole_step:
                step = self.median(lambda: torch.autograd.grad(_tuple(part.run(*part.leaves)), part.leaves, grads))
                operations = self._operations(part, grads) if cuda else None
        peak = (measure.peak_memory(self.device) - held) / 2**20 if cuda else None
        return Timing(fwd, bwd, step, operations, peak, self.clocks)


def device_operations(step: Callable[[], object]) -> int:
    """Kernels, copies and sets that a call gives the GPU, as torch's profiler counts them."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events() or [])


def ceilings(device: torch.device) -> Ceilings:
    """Measured within tenths of a second: 2 GiB copied and an 8192-square bf16 product on a GPU, less on a CPU."""
    cuda = device.type == "cuda"
    n_bytes, n, dtype = (2 << 30, 8192, torch.bfloat16) if cuda else (32 << 20, 512, torch.float32)
    source = torch.empty(n_bytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    copy_ms = _median_ms(lambda: target.copy_(source), device)
    product_ms = _median_ms(lambda: a @ b, device)
    return Ceilings(2 * n_bytes / copy_ms / 1e6, 2 * n**3 / product_ms / 1e9)


def _median_ms(step: Callable[[], object], device: torch.device) -> float:
    """Median ms of 10 calls after 3."""
    for _ in range(3):
        step()
    return statistics.median(measure.time_ms(step, device) for _ in range(10))


def _tuple(out: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


class Deadline:
    """When a sweep must have ended."""

    def __init__(self, minutes: float) -> None:
        self.minutes, self.began = minutes, time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def over(self) -> bool:
        return self.seconds > 60 * self.minutes
