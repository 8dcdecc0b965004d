"""summarize_bench renders a stable table, and refuses files that are not decode CSVs by name."""

import subprocess
import sys
from pathlib import Path

import pytest

from nsa.records import CsvLog, DecodeRow, DecodeTiming, header

ROOT = Path(__file__).resolve().parents[1]
ROWS = [
    DecodeRow(512, 1.25, 0.25, 0.5, 0.125, 131328, 131328, 543, 543, 0.5, 0.4, 139008),
    DecodeRow(16384, 2.0, 0.5, 0.75, 0.25, 39321600, 39321601, 2559, 2559, 8.0, 4.0, 655104),
]
TABLE = """\
    S  ms_total    cmp    sel    win     reads       exp
  512     1.250  0.250  0.500  0.125    131328    131328
16384     2.000  0.500  0.750  0.250  39321600  39321601
avg ms_total: 1.625
"""


def summarize(*args, env=None, cwd=ROOT):
    command = [sys.executable, str(ROOT / "scripts" / "summarize_bench.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, check=False)


@pytest.fixture
def decode_csv(tmp_path):
    log = CsvLog(tmp_path / "decode.csv", DecodeRow)
    for row in ROWS:
        log.write(row)
    log.close()
    return log.path


def test_table_is_byte_for_byte_stable_whatever_the_terminal(decode_csv, tmp_path):
    for env in ({"COLUMNS": "20", "TERM": "dumb"}, {"COLUMNS": "300", "TERM": "xterm-256color", "LC_ALL": "C"}):
        result = summarize(decode_csv, env=env, cwd=tmp_path)
        assert (result.returncode, result.stdout, result.stderr) == (0, TABLE, "")


def test_columns_that_only_this_benchmark_writes_are_not_needed(decode_csv):
    wanted = len(header(DecodeTiming))
    short = [",".join(line.split(",")[:wanted]) for line in decode_csv.read_text().splitlines()]
    decode_csv.write_text("\n".join(short) + "\n")
    assert summarize(decode_csv).stdout == TABLE


def test_several_files_are_told_apart(decode_csv, tmp_path):
    other = tmp_path / "other.csv"
    other.write_bytes(decode_csv.read_bytes())
    assert summarize(decode_csv, other).stdout == f"{decode_csv}\n{TABLE}\n{other}\n{TABLE}"


@pytest.mark.parametrize("column", header(DecodeTiming))
def test_a_missing_column_is_named(decode_csv, column):
    place = header(DecodeRow).index(column)
    lines = [line.split(",") for line in decode_csv.read_text().splitlines()]
    decode_csv.write_text("\n".join(",".join(cells[:place] + cells[place + 1 :]) for cells in lines))
    result = summarize(decode_csv)
    assert (result.returncode, result.stdout) == (2, "")
    assert repr(column) in result.stderr
    assert str(decode_csv) in result.stderr
    assert "Traceback" not in result.stderr


def missing(path):
    path.unlink()


def folder(path):
    path.unlink()
    path.mkdir()


def empty(path):
    path.write_text("")


def no_rows(path):
    path.write_text(path.read_text().splitlines()[0] + "\n")


def torn_row(path):
    path.write_text(path.read_text()[: -len(",2559,2559,8,4,655104\n") - 10])


def not_text(path):
    path.write_bytes(b"\xff\x00\x9d" * 50)


@pytest.mark.parametrize("spoil", [missing, folder, empty, no_rows, torn_row, not_text])
def test_a_file_that_is_no_benchmark_is_named(decode_csv, spoil):
    spoil(decode_csv)
    result = summarize(decode_csv)
    assert (result.returncode, result.stdout) == (2, "")
    assert str(decode_csv) in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert spoil is not folder or "is a directory" in result.stderr


def test_needs_no_torch(decode_csv):
    blocked = f"import sys, runpy; sys.modules['torch'] = None; sys.argv = ['x', {str(decode_csv)!r}]; "
    blocked += "runpy.run_path('scripts/summarize_bench.py', run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (result.returncode, result.stdout) == (0, TABLE), result.stderr
