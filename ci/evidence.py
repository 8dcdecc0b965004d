"""What the steps left in artifacts/, read for people: both reports show these figures and nothing else.

A file that is absent is "not written"; one that cannot be read keeps its reason. Neither stops a report.

    needle.json    {"cells": [{"S": 2048, "depth": 0.5, "score": 0.98, "passed": true}, ...]}, or the list alone
    kernels.json   {"kernels": [{"kernel": "selected_fwd", "arch": "sm_80", "registers": 128, "verdict": "fits", ...},
                   ...]}, or the list alone; every scalar field is a column
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from ci import container
from ci.outcome import RunResult

T = TypeVar("T")
Row = dict[str, float]

NOT_WRITTEN = "not written"
FITS = "fits"  # the verdict of a launch that its card can hold
SHOWCASE = "train_showcase"
CHECKPOINT_SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors")
MAX_BYTES = 32 * 2**20  # a report reads figures, not data sets

TRAIN_COLUMNS = ("step", "loss", "lr", "toks_per_s")
VAL_COLUMNS = ("step", "val_loss")
DECODE_COLUMNS = ("S", "ms_total", "ms_cmp", "ms_sel", "ms_win", "reads_actual", "reads_expected")


class Malformed(ValueError):
    """A file is there and does not say what it should; the text names what is wrong."""


@dataclass(frozen=True)
class Found(Generic[T]):
    """A file under artifacts/ and what was read from it, or why nothing was."""

    path: str
    value: T | None = None
    problem: str = NOT_WRITTEN

    @property
    def malformed(self) -> bool:
        return self.value is None and self.problem != NOT_WRITTEN


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk: path from the repository's root, bytes."""

    path: str
    size: int


@dataclass(frozen=True)
class TrainRun:
    """One training output folder."""

    name: str
    rows: Found[list[Row]]
    val: Found[list[Row]]
    metrics: Found[dict[str, Any]]
    checkpoints: list[Checkpoint] = field(default_factory=list)


@dataclass(frozen=True)
class Figure:
    """A number worth reading first: what it is, its value as text, and one line of context."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Evidence:
    """Everything a report draws or tabulates."""

    runs: list[TrainRun]
    decode: Found[list[Row]]
    routing: Found[dict[str, Any]]
    demo: Found[dict[str, str]]
    needle: Found[list[dict[str, Any]]]
    kernels: Found[list[dict[str, Any]]]

    def problems(self) -> list[str]:
        """A line for each file that is there and cannot be read."""
        found: list[Found[Any]] = [self.decode, self.routing, self.demo, self.needle, self.kernels]
        for run in self.runs:
            found += [run.rows, run.val, run.metrics]
        return [f"{item.path}: {item.problem}" for item in found if item.malformed]


def collect(artifacts: Path) -> Evidence:
    """Reads what is there; raises nothing for a missing or broken file."""
    written = {path.parent.name for name in ("training.csv", "metrics.json") for path in artifacts.glob(f"*/{name}")}
    others = sorted(name for name in written - {SHOWCASE} if not is_backup(name))
    runs = [_train_run(artifacts, name) for name in (SHOWCASE, *others)]
    reports = "test-reports"
    return Evidence(
        runs=runs,
        decode=_found(artifacts, "bench/decode.csv", _decode),
        routing=_found(artifacts, f"{reports}/routing.json", _json_object),
        demo=_found(artifacts, f"{reports}/demo_64k.txt", _demo),
        needle=_found(artifacts, f"{reports}/needle.json", _needle),
        kernels=_found(artifacts, f"{reports}/kernels.json", lambda p: _records(p, "kernels", ("kernel",))),
    )


def is_backup(name: str) -> bool:
    """True for `<out_dir>.<n>`, where training moves an earlier run."""
    return re.fullmatch(r".+\.\d+", name) is not None


def is_checkpoint(path: str) -> bool:
    return path.lower().endswith(CHECKPOINT_SUFFIXES)


def headlines(evidence: Evidence, result: RunResult) -> list[Figure]:
    """The figures a reader wants first. Always the same labels: a missing one says so."""
    passed, failed, skipped = (sum(getattr(s, k) for s in result.steps) for k in ("passed", "failed", "skipped"))
    figures = [Figure("tests", f"{passed} passed", f"{failed} failed, {skipped} skipped, {len(result.steps)} steps")]
    for run in evidence.runs:
        figures += _train_figures(run)
    figures += _decode_figures(evidence.decode)
    figures.append(_demo_figure(evidence.demo))
    figures.append(_kernel_figure(evidence.kernels))
    return figures


def num(value: float, digits: int = 3) -> str:
    """1234567 -> 1,234,567; 0.0123456 -> 0.0123; not finite -> the word."""
    if not math.isfinite(value):
        return str(value)
    if 1000 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.0f}" if value == int(value) and abs(value) < 1000 else f"{value:.{digits}g}"


def against_dense(row: Row) -> str:
    """How NSA compares with dense attention in a decode row that holds both, whoever wins."""
    dense, ratio = num(row["ms_dense"]), row["ms_dense"] / row["ms_total"] if row["ms_total"] > 0 else math.inf
    if ratio >= 1:
        return f"{num(ratio, 2)}x faster than dense ({dense} ms)"
    return f"{num(1 / ratio, 2)}x slower than dense ({dense} ms)"


def duration(seconds: float) -> str:
    """41.2 -> 41 s; 305 -> 5 min 5 s."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def size(n_bytes: int) -> str:
    """Bytes in the unit a reader expects."""
    value = float(n_bytes)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def machine(result: RunResult) -> list[tuple[str, str]]:
    """What a reader must know of machine and versions, from env.json: always the same names in the same order."""
    env = result.env
    versions, torch = _table(env.get("versions")), _table(env.get("torch"))
    gpus = [gpu.get("name", "?") for gpu in env.get("gpus") or torch.get("devices") or [] if isinstance(gpu, dict)]
    memory = env.get("memory_mb")
    built = f", CUDA {torch['cuda_build']}" if torch.get("cuda_build") else ""
    facts = [
        ("CPU", env.get("cpu")),
        ("cores", env.get("cores")),
        ("memory", size(int(memory) << 20) if isinstance(memory, int) else None),
        ("GPU", ", ".join(map(str, gpus)) or "none"),
        ("Python", env.get("python")),
        ("torch", f"{torch.get('torch') or versions.get('torch') or 'absent'}{built}"),
        ("Triton", versions.get("triton") or "absent"),
        ("flash-attn", versions.get("flash-attn") or "absent"),
        ("system", env.get("platform")),
        ("image", container.title(_table(env.get("image")))),
        ("commit", result.git_sha + (" with uncommitted changes" if result.dirty else "")),
    ]
    return [(name, "unknown" if value is None else str(value)) for name, value in facts]


def flatten(data: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested mapping to (dotted name, text) pairs; lists are joined, empty ones "none"."""
    for key, value in data.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from flatten(value, f"{name}.")
        elif isinstance(value, list):
            yield name, ", ".join(json.dumps(v) if isinstance(v, (dict, list)) else str(v) for v in value) or "none"
        elif value is not None and value != "":
            yield name, str(value)


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _train_figures(run: TrainRun) -> list[Figure]:
    where = "" if run.name == SHOWCASE else f" ({run.name})"
    rows = run.rows.value
    if not rows:
        return [Figure(f"training loss{where}", run.rows.problem, run.rows.path)]
    first, last = rows[0], rows[-1]
    rate = sorted(row["toks_per_s"] for row in rows)[len(rows) // 2]
    note = f"{num(last['step'])} steps at {num(rate)} toks/s"
    if run.val.value:
        note += f"; validation {num(run.val.value[-1]['val_loss'], 4)}"
    return [Figure(f"training loss{where}", f"{num(first['loss'], 4)} → {num(last['loss'], 4)}", note)]


def _decode_figures(decode: Found[list[Row]]) -> list[Figure]:
    if not decode.value:
        return [Figure("decode", decode.problem, decode.path)]
    row = max(decode.value, key=lambda r: r["S"])
    note = f"one token at S = {num(row['S'])}"
    if row.get("ms_dense", 0) > 0:
        note += f"; {against_dense(row)}"
    return [Figure("decode", f"{num(row['ms_total'])} ms", note)]


def _demo_figure(demo: Found[dict[str, str]]) -> Figure:
    if not demo.value:
        return Figure("long context", demo.problem, demo.path)
    said = demo.value
    time = duration(float(said["prefill_time_ms"]) / 1000)
    reads = f"{int(said['reads_total']):,} reads"
    if (expected := said.get("reads_expected", "")).isdecimal():
        same = int(expected) == int(said["reads_total"])
        reads += ", as expected" if same else f", expected {int(expected):,}"
    return Figure("long context", time, f"prefill of {num(int(said['S']))} tokens; {reads}")


def kernel_groups(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a kernel and card, in their order: how many launches, the most that one needs, and what is wrong."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((str(row["kernel"]), str(row.get("arch", ""))), []).append(row)
    found = []
    for (kernel, arch), members in groups.items():
        wrong = sorted({str(row["verdict"]) for row in members if row.get("verdict", FITS) != FITS})
        most = {name: _most(members, name) for name in ("shared", "limit", "registers", "spills", "cp_async")}
        found.append(
            {"kernel": kernel, "arch": arch, "launches": len(members), **most, "verdict": ", ".join(wrong) or FITS}
        )
    return found


def _most(rows: list[dict[str, Any]], name: str) -> float | None:
    return max((row[name] for row in rows if isinstance(row.get(name), (int, float))), default=None)


def _kernel_figure(kernels: Found[list[dict[str, Any]]]) -> Figure:
    if not kernels.value:
        return Figure("kernels", kernels.problem, kernels.path)
    wrong = sum(row.get("verdict", FITS) != FITS for row in kernels.value)
    cards = ", ".join(dict.fromkeys(str(row.get("arch", "?")) for row in kernels.value))
    versions = ", ".join(dict.fromkeys(str(row["triton"]) for row in kernels.value if "triton" in row))
    note = f"compiled for {cards}" + (f" by Triton {versions}" if versions else "")
    launches = f"{len(kernels.value)} launches"
    return Figure("kernels", f"{wrong} of {launches} do not fit" if wrong else f"{launches} fit", note)


def _train_run(artifacts: Path, name: str) -> TrainRun:
    root = artifacts / name
    checkpoints = [
        Checkpoint(f"artifacts/{path.relative_to(artifacts).as_posix()}", path.stat().st_size)
        for path in sorted(root.rglob("*"))
        if is_checkpoint(path.name) and path.is_file()
    ]
    return TrainRun(
        name,
        _found(artifacts, f"{name}/training.csv", lambda p: _csv_rows(p, TRAIN_COLUMNS)),
        _found(artifacts, f"{name}/val.csv", lambda p: _csv_rows(p, VAL_COLUMNS)),
        _found(artifacts, f"{name}/metrics.json", _json_object),
        checkpoints,
    )


def _found(artifacts: Path, name: str, read: Callable[[Path], T]) -> Found[T]:
    path, shown = artifacts / name, f"artifacts/{name}"
    if not path.is_file():
        return Found(shown)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise Malformed(f"{size(path.stat().st_size)}, larger than any report should read")
        return Found(shown, read(path), "")
    except Malformed as error:
        return Found(shown, problem=f"malformed: {error}")
    except (OSError, UnicodeDecodeError) as error:
        return Found(shown, problem=f"unreadable: {error.__class__.__name__}")


def _csv_rows(path: Path, columns: tuple[str, ...]) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        try:
            lines = list(csv.reader(file))
        except csv.Error as error:
            raise Malformed(str(error)) from error
    head = lines[0] if lines else []
    missing = [name for name in columns if name not in head]
    if missing:
        raise Malformed(f"no column {missing[0]!r} in its header {','.join(head)[:80]!r}")
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            row = {name: float(value) for name, value in zip(head, line, strict=True)}
        except ValueError:
            raise Malformed(f"line {number} is unreadable: {','.join(line)[:80]!r}") from None
        rows.append(row)
    if not rows:
        raise Malformed("a header and no rows")
    return rows


def _decode(path: Path) -> list[Row]:
    rows = _csv_rows(path, DECODE_COLUMNS)
    for number, row in enumerate(rows, start=2):
        if row["S"] < 1 or not all(math.isfinite(value) for value in row.values()):
            raise Malformed(f"line {number} holds no measurement: S {row['S']:g}, {row['ms_total']:g} ms")
    return sorted(rows, key=lambda row: row["S"])


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise Malformed(f"not JSON ({error})") from error


def _json_object(path: Path) -> dict[str, Any]:
    data = _json(path)
    if not isinstance(data, dict):
        raise Malformed(f"a JSON {type(data).__name__}, not an object")
    return data


def _records(path: Path, key: str, required: tuple[str, ...]) -> list[dict[str, Any]]:
    data = _json(path)
    rows = data.get(key) if isinstance(data, dict) else data
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise Malformed(f"no list of objects under {key!r}")
    for row in rows:
        lacking = [name for name in required if name not in row]
        if lacking:
            raise Malformed(f"an entry of {key!r} lacks {lacking[0]!r}")
    return rows


def _needle(path: Path) -> list[dict[str, Any]]:
    cells = _records(path, "cells", ("S", "depth", "score"))
    for cell in cells:
        if not all(isinstance(cell[name], (int, float)) for name in ("S", "depth", "score")):
            raise Malformed(f"a cell is not numbers: {json.dumps(cell)[:80]}")
    return cells


def _demo(path: Path) -> dict[str, str]:
    text = path.read_text(encoding="utf-8", errors="replace")
    _, mark, body = text.partition("-- demo_64k summary --")
    if not mark:
        raise Malformed("no line '-- demo_64k summary --'")
    said = dict(re.findall(r"(\w+)=(\S+)", body))
    device = re.search(r"^device:\s*(.+)$", body, re.MULTILINE)
    if device:
        said["device"] = device[1].strip()
    for name, number in (("S", int), ("prefill_time_ms", float), ("reads_total", int)):
        try:
            number(said[name])
        except (KeyError, ValueError):
            raise Malformed(f"no number {name}= in the summary") from None
    return said
