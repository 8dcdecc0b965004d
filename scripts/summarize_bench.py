"""Summarise decode benchmarks: `summarize_bench.py CSV...` prints one table a file and its mean ms_total.

Needs no torch. Exits 2 and names the file, the column or the line that is not as bench_decode.py writes it.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse

from nsa.records import DecodeTiming, RecordError, read_rows, table

COLUMNS = ["S", "ms_total", "cmp", "sel", "win", "reads", "exp"]


def summary(rows: list[DecodeTiming]) -> str:
    """The table of one file and the mean of its ms_total."""
    cells = []
    for row in rows:
        times = (f"{ms:.3f}" for ms in (row.ms_total, row.ms_cmp, row.ms_sel, row.ms_win))
        cells.append([str(row.S), *times, str(row.reads_actual), str(row.reads_expected)])
    mean = sum(row.ms_total for row in rows) / len(rows)
    return f"{table(COLUMNS, cells)}\navg ms_total: {mean:.3f}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Table of one or more decode CSVs.")
    parser.add_argument("csv", nargs="+", help="file written by bench/bench_decode.py --csv")
    paths = parser.parse_args().csv
    blocks = []
    try:
        for path in paths:
            rows = read_rows(path, DecodeTiming)
            if not rows:
                raise RecordError(f"{path}: a header and no rows; run bench/bench_decode.py again")
            blocks.append(f"{path}\n{summary(rows)}" if len(paths) > 1 else summary(rows))
    except RecordError as error:
        print(f"summarize_bench: {error}", file=sys.stderr)
        return 2
    print("\n\n".join(blocks))
    return 0


if __name__ == "__main__":
    sys.exit(main())
