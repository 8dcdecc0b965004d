"""Rows of the CSV files that scripts write and dashboards read. A dataclass is a header: its fields, in order.

Needs no torch. A file whose header is not the row's raises RecordError, which names the file and the column.
"""

from __future__ import annotations

import csv
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints


class RecordError(ValueError):
    """A CSV file is missing, or does not have the columns it should have."""


@dataclass(frozen=True)
class TrainRow:
    """training.csv: loss is the mean over ranks, toks_per_s the sum over ranks."""

    step: int
    loss: float
    lr: float
    toks_per_s: float


@dataclass(frozen=True)
class ValRow:
    """val.csv."""

    step: int
    val_loss: float
    ppl: float


@dataclass(frozen=True)
class DecodeTiming:
    """The columns of decode.csv that a summary needs; files that hold only these are readable too.

    Row S decodes the S-th token on a cache of S-1. Times in ms; a branch's column times it alone. reads_* count
    tokens per batch row and KV group, over prefill and one step.
    """

    S: int
    ms_total: float
    ms_cmp: float
    ms_sel: float
    ms_win: float
    reads_actual: int
    reads_expected: int


@dataclass(frozen=True)
class DecodeRow(DecodeTiming):
    """decode.csv. *_decode count the one step; bytes_per_token is the K and V that it reads, per batch row."""

    reads_actual_decode: int
    reads_expected_decode: int
    ms_dense: float
    speedup: float
    bytes_per_token: int


@dataclass(frozen=True)
class AttentionRow:
    """A row of bench_attention: one part at one length. None, an empty cell: not measured, or does not apply.

    Times are medians in ms; step_ms is forward and backward in one call, as called; X_ops the operations that the
    device was given. peak_mib is what the part's inputs, results, gradients and workspace hold at once. X_vs_Y is dense
    attention Y's time over this part's, same run, layout and S. agreement is the share of a query's free blocks that
    the query before it chose; heaviest, the share of queries that chose the block chosen most often. status is "ok", or
    why there are no times.
    """

    heads: int
    groups: int
    dim: int
    B: int
    S: int
    inputs: str
    part: str
    backend: str
    fwd_ms: float | None
    bwd_ms: float | None
    step_ms: float | None
    fwd_ops: int | None
    bwd_ops: int | None
    peak_mib: float | None
    fwd_vs_flash: float | None
    bwd_vs_flash: float | None
    fwd_vs_cudnn: float | None
    bwd_vs_cudnn: float | None
    fwd_vs_fa3: float | None
    bwd_vs_fa3: float | None
    agreement: float | None
    heaviest: float | None
    fwd_repeats: int | None
    bwd_repeats: int | None
    launches: str
    sm_mhz: int | None
    mem_mhz: int | None
    copy_gbs: float
    matmul_tflops: float
    dtype: str
    device: str
    torch: str
    triton: str
    status: str


@dataclass(frozen=True)
class StepRow:
    """A row of bench_train: one twin at one length, `batch` sequences a step. None, an empty cell: not measured.

    attention is nsa or dense, mode compiled or eager. ms_step is the median step on the wall clock, first_s the first
    one, compilation included; wait_ms what a step waits for data. busy is the share of a step in which the device
    works; ms_attention and ms_head are its time inside attention's and the head's operators, ms_rest the rest of it.
    vs_dense is tokens_per_s over the dense twin's, same run, length and mode. peak_mib counts weights, optimizer and
    activations. status is "ok", or why there are no times.
    """

    S: int
    batch: int
    attention: str
    mode: str
    tokens_per_s: float | None
    mfu: float | None
    vs_dense: float | None
    ms_step: float | None
    wait_ms: float | None
    busy: float | None
    ms_attention: float | None
    ms_head: float | None
    ms_rest: float | None
    peak_mib: float | None
    first_s: float | None
    steps: int
    loss: float | None
    sm_mhz: int | None
    dtype: str
    device: str
    torch: str
    triton: str
    status: str


Row = TypeVar("Row", TrainRow, ValRow, DecodeTiming, DecodeRow)


def header(row_type: type) -> list[str]:
    """Column names of a row type."""
    return [f.name for f in fields(row_type)]


class CsvLog:
    """Appends rows to a CSV file, a line at a time and flushed, so a run that dies keeps what it measured."""

    def __init__(self, path: str | Path, row_type: type[Any], *, append: bool = False) -> None:
        self.path, self.row_type = Path(path), row_type
        keep = append and self.path.is_file() and self.path.stat().st_size > 0
        if keep:
            read_rows(self.path, row_type)  # refuses to append under another header
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a" if keep else "w", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")
        if not keep:
            self._writer.writerow(header(row_type))
            self._file.flush()

    def write(self, row: TrainRow | ValRow | DecodeRow | AttentionRow | StepRow) -> None:
        if not isinstance(row, self.row_type):
            raise TypeError(f"{self.path} holds {self.row_type.__name__}, not {type(row).__name__}")
        self._writer.writerow(f"{v:.6g}" if isinstance(v, float) else v for v in astuple(row))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_rows(path: str | Path, row_type: type[Row]) -> list[Row]:
    """Rows of a CSV whose header starts with the row's columns; more columns on the right are ignored."""
    path = Path(path)
    if path.is_dir():
        raise RecordError(f"{path}: is a directory; name a CSV file in it")
    if not path.is_file():
        raise RecordError(f"{path}: no such file; run the command that writes it first")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.reader(file))
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror}); name a file that can") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise RecordError(f"{path}: not a text file of comma-separated values ({error})") from error
    want, got = header(row_type), lines[0] if lines else []
    if got[: len(want)] != want:
        wrong = next((w for w, g in zip(want, got + [None] * len(want), strict=False) if w != g), want[0])
        raise RecordError(f"{path}: wrong header at column {wrong!r}; expected {','.join(want)}")
    types = get_type_hints(row_type)
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            rows.append(row_type(**{name: types[name](value) for name, value in zip(want, line, strict=False)}))
        except (TypeError, ValueError) as error:
            raise RecordError(f"{path}:{number}: unreadable row {','.join(line)!r}; mend or remove the line") from error
    return rows


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Right-aligned columns, two spaces apart: the same text for the same cells, whatever the terminal."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = [columns, *rows]
    return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines)
