"""The figure of bench_train: tokens per second of both twins against the length, and where a step's time goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nsa.records import StepRow

STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
}
COLORS = {"nsa": "#1b4f9c", "dense": "#c0792a"}
DASHES = {"compiled": "-", "eager": ":"}
PARTS = {"ms_attention": ("attention", "#3182bd"), "ms_head": ("head", "#e6a03c"), "ms_rest": ("rest", "#bdbdbd")}


def draw(rows: Sequence[StepRow], path: Path) -> None:
    """Tokens/s against S on the left; on the right a bar a twin and length, the parts of the device's time in it."""
    measured = [row for row in rows if row.ms_step]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 4.0), layout="constrained")
        speed, parts = figure.subplots(1, 2)
        _lines(speed, measured)
        _bars(parts, measured)
        first = rows[0]
        figure.suptitle(f"{first.device}, {first.dtype}, torch {first.torch}, Triton {first.triton}", fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", dpi=130)


def _lines(axes: Axes, rows: Sequence[StepRow]) -> None:
    for twin in dict.fromkeys((row.attention, row.mode) for row in rows):
        points = [(str(row.S), row.tokens_per_s) for row in rows if (row.attention, row.mode) == twin]
        axes.plot(
            *zip(*points, strict=True), DASHES[twin[1]], color=COLORS[twin[0]], marker="o", ms=4, label=" ".join(twin)
        )
    axes.set_title("tokens per second")
    axes.set_xlabel("S")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", lw=0.5, alpha=0.5)
    if rows:
        axes.legend()


def _bars(axes: Axes, rows: Sequence[StepRow]) -> None:
    names = [f"{row.attention}\n{row.mode}\n{row.S}" for row in rows]
    bottom = [0.0] * len(rows)
    for column, (label, color) in PARTS.items():
        heights = [getattr(row, column) or 0.0 for row in rows]
        axes.bar(names, heights, 0.8, bottom=bottom, color=color, label=label)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set_title("device, ms a step")
    axes.tick_params(axis="x", labelsize=7, length=0)
    if rows:
        axes.legend()
