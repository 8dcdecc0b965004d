"""Figures as inline SVG: text stays text, and colours are CSS variables, so a page's light and dark schemes apply.

Every function takes rows as `ci.evidence` reads them and returns one `<svg>` element without any outside reference.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from io import StringIO
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from ci.evidence import Row, num

# Matplotlib wants colours it can parse: each stands for the CSS variable that replaces it in the SVG.
INK, MUTED, GRID, PANEL = "#0a0a01", "#0a0a02", "#0a0a03", "#0a0a04"
TOTAL, CMP, SEL, WIN, DENSE, GOOD, BAD = "#0a0a11", "#0a0a12", "#0a0a13", "#0a0a14", "#0a0a15", "#0a0a16", "#0a0a17"
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--line",
    PANEL: "--panel",
    TOTAL: "--series-1",
    CMP: "--series-2",
    SEL: "--series-3",
    WIN: "--series-4",
    DENSE: "--series-dense",
    GOOD: "--good",
    BAD: "--bad",
}
STYLE = {
    "svg.fonttype": "none",
    "font.size": 9.5,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "text.color": INK,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
}
SIZE = (5.4, 3.3)
SMOOTH = 11  # rows in the running mean of a loss curve
LABEL_GAP = 0.075  # of the axes' height, between the names at the lines' ends


def loss(rows: Sequence[Row], val: Sequence[Row], label: str) -> str:
    """Training loss against the step: every row thin, their running mean on top, validation as dots."""
    with matplotlib.rc_context(_style(f"loss-{label}")):
        figure, axes = _axes("step", "loss")
        steps, losses = [r["step"] for r in rows], [r["loss"] for r in rows]
        if len(rows) > 2 * SMOOTH:
            axes.plot(steps, losses, color=TOTAL, lw=0.9, alpha=0.35)
            losses = _smooth(losses)
        axes.plot(steps, losses, color=TOTAL, lw=2)
        ends = [("training", rows[-1]["step"], rows[-1]["loss"], TOTAL)]
        if val:
            axes.plot([r["step"] for r in val], [r["val_loss"] for r in val], "o", color=SEL, ms=5.5)
            ends.append(("validation", val[-1]["step"], val[-1]["val_loss"], SEL))
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        _name_ends(axes, [(f"{name} {num(y, 3)}", x, y, color) for name, x, y, color in ends])
        return _svg(figure, f"loss-{label}")


def decode_time(rows: Sequence[Row]) -> str:
    """Milliseconds for one token against the length, both axes logarithmic: NSA, its branches, dense."""
    columns = [("NSA", "ms_total", TOTAL, 2.4, "-"), ("cmp", "ms_cmp", CMP, 1.3, "-")]
    columns += [("sel", "ms_sel", SEL, 1.3, "-"), ("win", "ms_win", WIN, 1.3, "-")]
    columns += [("dense", "ms_dense", DENSE, 2, "--")]
    with matplotlib.rc_context(_style("decode")):
        figure, axes = _axes("context length S", "ms per token")
        _lines_over_s(axes, rows, columns)
        return _svg(figure, "decode")


def reads(rows: Sequence[Row]) -> str:
    """Tokens read by one decode step against the length: expected as a line, counted as dots, dense as S itself."""
    with matplotlib.rc_context(_style("reads")):
        figure, axes = _axes("context length S", "tokens read per step")
        step = "reads_actual_decode" in rows[0] and "reads_expected_decode" in rows[0]
        tail = "_decode" if step else ""
        rows = [{**row, "dense": row["S"] if step else row["S"] * (row["S"] + 1) / 2} for row in rows]
        columns = [("NSA", f"reads_expected{tail}", TOTAL, 2, "-"), ("dense", "dense", DENSE, 2, "--")]
        _lines_over_s(axes, rows, columns)
        xs, ys = [r["S"] for r in rows], [r[f"reads_actual{tail}"] for r in rows]
        axes.plot(xs, ys, "o", ms=7, mfc=PANEL, mec=TOTAL, mew=1.8, zorder=4)
        return _svg(figure, "reads")


def needle(cells: Sequence[dict[str, Any]]) -> str:
    """A square for each length and depth with its score; what failed is in another colour and crossed."""
    lengths, depths = sorted({c["S"] for c in cells}), sorted({c["depth"] for c in cells})
    with matplotlib.rc_context(_style("needle")):
        figure, axes = _axes("context length S", "depth of the needle", grid=False)
        for cell in cells:
            x, y = lengths.index(cell["S"]), depths.index(cell["depth"])
            good = bool(cell.get("passed", cell["score"] >= 0.5))
            alpha = 0.12 + 0.36 * min(max(float(cell["score"]), 0.0), 1.0) if good else 0.6
            axes.add_patch(Rectangle((x - 0.47, y - 0.45), 0.94, 0.9, fc=GOOD if good else BAD, ec="none", alpha=alpha))
            axes.text(
                x, y, _score(float(cell["score"])) + ("" if good else " ✗"), ha="center", va="center", fontsize=8.5
            )
        axes.set_xlim(-0.5, len(lengths) - 0.5)
        axes.set_ylim(len(depths) - 0.5, -0.5)
        axes.set_xticks(range(len(lengths)), [_tokens(s) for s in lengths])
        axes.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths])
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return _svg(figure, "needle")


def _style(salt: str) -> Any:
    """Settings of one figure; the salt keeps the ids of its shapes the same from run to run."""
    return {**STYLE, "svg.hashsalt": salt}


def _axes(x: str, y: str, *, grid: bool = True) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.set_xlabel(x)
    axes.set_title(y, loc="left", fontsize=9.5, color=MUTED, pad=10)
    if grid:
        axes.grid(axis="y", color=GRID, lw=0.8)
        axes.set_axisbelow(True)
    axes.tick_params(length=3)
    return figure, axes


def _lines_over_s(axes: Axes, rows: Sequence[Row], columns: Sequence[tuple[str, str, str, float, str]]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ends = []
    for name, column, color, width, dash in columns:
        points = [(r["S"], r[column]) for r in rows if r.get(column, 0) > 0]
        if points:
            axes.plot(*zip(*points, strict=True), dash, marker="o", ms=3, color=color, lw=width)
            ends.append((name, *points[-1], color))
    lengths = sorted({r["S"] for r in rows})
    axes.xaxis.set_major_locator(FixedLocator(lengths if len(lengths) <= 8 else lengths[:: -(-len(lengths) // 8)]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tokens(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5), numticks=20))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: num(value, 2)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.margins(y=0.12)
    _name_ends(axes, ends)


def _name_ends(axes: Axes, ends: list[tuple[str, float, float, str]]) -> None:
    """Names lines at their right ends, pushed apart where they would overlap."""
    if not ends:
        return
    axes.autoscale_view()
    to_axes = axes.transAxes.inverted()
    placed = []
    for name, x, y, color in ends:
        height = float(to_axes.transform(axes.transData.transform((x, y)))[1])
        placed.append((height if math.isfinite(height) else 0.5, name, color))
    placed.sort()
    heights = [height for height, _, _ in placed]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + LABEL_GAP)
    shift = max(0.0, heights[-1] - 1.0)
    for height, (_, name, color) in zip(heights, placed, strict=True):
        axes.annotate(
            name, (1, height - shift), xycoords="axes fraction", xytext=(6, 0), textcoords="offset points",
            va="center", color=color, fontweight="bold" if color == TOTAL else "normal", annotation_clip=False,
        )  # fmt: skip


def _smooth(values: Sequence[float]) -> list[float]:
    """Centred running mean, narrower towards the ends: it does not lag, and keeps the first and last value."""
    last = len(values) - 1
    reach = [min(SMOOTH // 2, i, last - i) for i in range(len(values))]
    return [sum(values[i - r : i + r + 1]) / (2 * r + 1) for i, r in enumerate(reach)]


def _score(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 10 else num(value, 2)


def _tokens(value: float) -> str:
    return f"{value / 1024:g}k" if value >= 1024 and value % 1024 == 0 else f"{value:g}"


def _svg(figure: Figure, prefix: str) -> str:
    """The figure as an element to stand in a page: no prolog, no metadata, ids of its own, CSS colours, fluid width."""
    buffer = StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"\sxmlns(:\w+)?=\"[^\"]*\"", "", text).replace("xlink:href", "href")
    text = re.sub(r"(<svg[^>]*?)\swidth=\"[^\"]*\"", r"\1", text, count=1)
    text = re.sub(r"(<svg[^>]*?)\sheight=\"[^\"]*\"", r"\1", text, count=1)
    prefix = re.sub(r"[^A-Za-z0-9]+", "-", prefix)
    text = re.sub(r"\bid=\"", f'id="{prefix}-', text)
    text = text.replace('href="#', f'href="#{prefix}-').replace("url(#", f"url(#{prefix}-")
    for color, variable in VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return text.strip()
