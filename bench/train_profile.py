"""What a profile of some steps says of the device: how long it worked, and for which part of the model."""

from __future__ import annotations

import json
import tempfile
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

HEAD = ("nsa::linear_cross_entropy",)
# What the two twins' attention is made of, forward and backward. NSA's other operators all belong to it.
ATTENTION = ("nsa::", "aten::_scaled_dot_product", "aten::scaled_dot_product", "aten::_flash_attention")
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCH = ("cuda_runtime", "cuda_driver")


class Work(NamedTuple):
    """Milliseconds a step: the device at work on anything, on attention's operators, on the head's."""

    busy: float
    attention: float
    head: float


def profiled(step: Callable[[], Any], n: int, device: torch.device) -> Work:
    """Of n calls. A profiler slows the host down, not the kernels; so only what the device did is taken from it."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as run:
        for _ in range(n):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        run.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    return Work(*(us / 1e3 / n for us in work(events)))


def part_of(operator: str) -> str | None:
    """head, attention, or None for anything else."""
    if operator.startswith(HEAD):
        return "head"
    return "attention" if operator.startswith(ATTENTION) else None


def work(events: Iterable[dict[str, Any]]) -> Work:
    """Microseconds in all, of a trace in Chrome's format.

    busy is the union of all kernels' and copies' intervals. A kernel belongs to the operator inside which, on its
    thread, it was launched. A trace without kernels is a CPU's, which works while an operator does.
    """
    whole = [e for e in events if e.get("ph") == "X"]
    kernels = [e for e in whole if e.get("cat") in _DEVICE]
    spans = _spans(whole)
    if not kernels:
        sums = {"attention": 0.0, "head": 0.0}
        for rows in spans.values():
            for start, end, part in rows:
                sums[part] += end - start
        return Work(_union((e["ts"], e["ts"] + e["dur"]) for e in whole if e.get("cat") == "cpu_op"), **sums)
    launches = {e["args"]["correlation"]: e for e in whole if e.get("cat") in _LAUNCH and "correlation" in e["args"]}
    operators = {e["args"].get("External id"): e for e in whole if e.get("cat") == "cpu_op"}
    sums = defaultdict(float)
    for kernel in kernels:
        arguments = kernel.get("args", {})
        by = (launches.get(arguments.get("correlation")), operators.get(arguments.get("External id")))
        parts = [part for event in by if event is not None and (part := _inside(spans, event))]
        sums[parts[0] if parts else "rest"] += kernel["dur"]
    return Work(_union((e["ts"], e["ts"] + e["dur"]) for e in kernels), sums["attention"], sums["head"])


Spans = dict[Any, list[tuple[float, float, str]]]


def _spans(whole: list[dict[str, Any]]) -> Spans:
    """The outermost operators of a part, by thread, in the order of time."""
    found: Spans = defaultdict(list)
    marked = ((e, part) for e in whole if e.get("cat") == "cpu_op" and (part := part_of(e["name"])))
    for event, part in sorted(marked, key=lambda one: (one[0]["ts"], -one[0]["dur"])):
        rows, end = found[event["tid"]], event["ts"] + event["dur"]
        if not rows or event["ts"] >= rows[-1][1]:
            rows.append((event["ts"], end, part))
    return found


def _inside(spans: Spans, event: dict[str, Any]) -> str | None:
    rows = spans.get(event["tid"], [])
    i = bisect_right(rows, event["ts"], key=lambda row: row[0]) - 1
    return rows[i][2] if i >= 0 and event["ts"] <= rows[i][1] else None


def _union(intervals: Iterable[tuple[float, float]]) -> float:
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
