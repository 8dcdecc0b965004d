"""The tests on the GPU lane's versions are judged by what ran: wrong versions, an empty run or a strange skip fail."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ci import pinned

SKIP = '<testcase classname="a" name="s{n}" time="0"><skipped message="{reason}"/></testcase>'
PASS = '<testcase classname="a" name="p" time="0"/>'
FAIL = '<testcase classname="a" name="f" time="0"><failure message="1 != 2">1 != 2</failure></testcase>'
ERROR = '<testcase classname="a" name="e" time="0"><error message="fixture">fixture</error></testcase>'
SKIPPED_THEN_ERROR = '<testcase classname="a" name="t" time="0"><skipped message="needs CUDA"/><error/></testcase>'
CUDA = SKIP.format(n=1, reason="selected: backend 'triton' cannot run: needs CUDA")


def junit(tmp_path: Path, *cases: str) -> Path:
    path = tmp_path / "junit.xml"
    path.write_text(f'<testsuites><testsuite name="x" tests="{len(cases)}">{"".join(cases)}</testsuite></testsuites>')
    return path


@pytest.mark.parametrize(
    ("cases", "code", "verdict", "counts"),
    [
        ((PASS, CUDA), 0, 0, (1, 0, 1)),
        ((PASS, FAIL), 1, 1, (1, 1, 0)),
        ((PASS, ERROR), 1, 1, (1, 1, 0)),
        ((PASS, FAIL), 0, 1, (1, 1, 0)),
        ((PASS,), 4, 4, (1, 0, 0)),
        ((PASS,), 1, 1, (1, 0, 0)),
        ((PASS, SKIPPED_THEN_ERROR), 1, 1, (1, 1, 0)),
        ((CUDA,), 0, 3, (0, 0, 1)),
        ((), 5, 5, (0, 0, 0)),
        ((PASS, SKIP.format(n=2, reason="needs Triton")), 0, 3, (1, 0, 1)),
        ((PASS, SKIP.format(n=2, reason="could not import torch")), 0, 3, (1, 0, 1)),
    ],
)
def test_a_run_is_judged_by_what_it_executed(tmp_path, cases, code, verdict, counts):
    found, judged = pinned.judge(junit(tmp_path, *cases), code)
    assert judged == verdict
    assert (found["passed"], found["failed"], found["skipped"]) == counts


@pytest.mark.parametrize("text", [None, "", "<testsuites><testsuite", "not xml"])
def test_a_run_without_a_readable_record_is_no_pass(tmp_path, text):
    path = tmp_path / "junit.xml"
    if text is not None:
        path.write_text(text)
    found, code = pinned.judge(path, 0)
    assert code == 3
    assert "no readable JUnit" in found["problem"]


def test_other_versions_than_the_lanes_are_a_configuration_error(tmp_path, monkeypatch, capsys):
    shutil.copy(pinned.ROOT / pinned.GPU_LOCK.inputs, tmp_path)
    monkeypatch.setattr(pinned, "ROOT", tmp_path)
    monkeypatch.setattr(pinned, "installed", {"torch": "2.13.0+cpu", "triton": "3.0.0"}.get)
    assert pinned.main([]) == 78
    said = capsys.readouterr().err
    assert "torch 2.13.0, pinned 2.4.1; numpy absent, pinned 1.26.4" in said
    assert "triton" not in said
    assert json.loads((tmp_path / "artifacts/exit.json").read_text())["code"] == 78


def test_the_lanes_own_build_is_not_another_version(monkeypatch):
    pins = pinned.lock.pinned(pinned.ROOT / pinned.GPU_LOCK.inputs)
    monkeypatch.setattr(pinned, "installed", lambda name: pins[name] + ("+cu121" if name == "torch" else ""))
    assert pinned.unmet(pinned.ROOT) == []


def test_a_run_leaves_its_record_and_a_closing_line(tmp_path, capfd):
    (tmp_path / "test_one.py").write_text("def test_passes():\n    pass\n")
    assert pinned.run(tmp_path, tmp_path / "out", ["test_one.py"]) == 0
    record = json.loads((tmp_path / "out/result.json").read_text())
    assert (record["passed"], record["failed"], record["skipped"], record["exit_code"]) == (1, 0, 0, 0)
    assert record["versions"]["torch"]
    assert capfd.readouterr().out.splitlines()[-1].endswith(": 1 passed, 0 failed, 0 skipped")
