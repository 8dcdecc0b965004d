"""The figure of bench_attention: NSA and dense attention against the length, and where NSA's time goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from bench.attention_parts import DENSE, NSA_PARTS, WHOLE
from nsa.records import AttentionRow

STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
}
LINES = {
    WHOLE: ("NSA", "#1b4f9c", "-", 2.4),
    "dense-flash": ("dense, flash", "#8a8a8a", "--", 1.4),
    "dense-cudnn": ("dense, cuDNN", "#c0792a", "--", 1.4),
    "dense-fa3": ("dense, FA-3", "#a03030", "--", 1.4),
}
BARS = dict(zip(NSA_PARTS, ("#9ecae1", "#3182bd", "#e6a03c", "#31a354", "#a1d99b", "#bdbdbd"), strict=True))


def draw(rows: Sequence[AttentionRow], path: Path) -> None:
    """One column a layout: forward + backward against S above; below, the parts at each length as shares of the sum.

    Lines and bars are of the first kind of input that a layout has.
    """
    layouts = list(dict.fromkeys((row.heads, row.groups, row.dim) for row in rows))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * len(layouts), 7.2), layout="constrained")
        axes = figure.subplots(2, len(layouts), squeeze=False)
        for column, one in enumerate(layouts):
            mine = [row for row in rows if (row.heads, row.groups, row.dim) == one]
            inputs = mine[0].inputs
            mine = [row for row in mine if row.inputs == inputs]
            axes[0][column].set_title(f"{one[0]} heads, {one[1]} groups, D {one[2]} ({inputs})")
            _lines(axes[0][column], mine)
            _bars(axes[1][column], mine)
        axes[0][0].set_ylabel("forward + backward, ms")
        axes[1][0].set_ylabel("share of the parts' sum")
        for row_of_axes in axes:
            handles, labels = row_of_axes[0].get_legend_handles_labels()
            if handles:
                row_of_axes[-1].legend(handles, labels, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        first = rows[0]
        figure.suptitle(f"{first.device}, {first.dtype}, torch {first.torch}, Triton {first.triton}", fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", dpi=130)


def _lines(axes: Axes, rows: Sequence[AttentionRow]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for part in (*(f"dense-{name}" for name in DENSE), WHOLE):
        name, color, dash, width = LINES[part]
        points = [(r.S, r.fwd_ms + r.bwd_ms) for r in rows if r.part == part and r.fwd_ms and r.bwd_ms]
        if points:
            axes.plot(*zip(*points, strict=True), dash, color=color, lw=width, marker="o", ms=3.5, label=name)
    axes.xaxis.set_major_locator(FixedLocator(sorted({row.S for row in rows})))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tokens(int(value))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5), numticks=20))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", lw=0.5, alpha=0.5)


def _bars(axes: Axes, rows: Sequence[AttentionRow]) -> None:
    """Two bars a length, forward and backward, each as high as 1; its ms above it."""
    lengths = sorted({row.S for row in rows})
    times = {(row.part, row.S): row for row in rows}
    ticks, names = [], []
    for i, S in enumerate(lengths):
        for side, way in enumerate(("fwd", "bwd")):
            parts = {name: getattr(times.get((name, S)), f"{way}_ms", None) or 0.0 for name in NSA_PARTS}
            if not (total := sum(parts.values())):
                continue
            x, bottom = i * 2.4 + side, 0.0
            for name, ms in parts.items():
                label = name if len(ticks) == 0 else None
                axes.bar(x, ms / total, 0.9, bottom=bottom, color=BARS[name], label=label)
                bottom += ms / total
            axes.text(x, 1.01, f"{total:.3g}", ha="center", va="bottom", fontsize=7)
            ticks.append(x)
            names.append(f"{_tokens(S)}\n{way}")
    axes.set_xticks(ticks, names, fontsize=7)
    axes.set_ylim(0, 1.08)
    axes.tick_params(length=0)


def _tokens(S: int) -> str:
    return f"{S // 1024}k" if S >= 1024 and S % 1024 == 0 else str(S)
