"""Steps planted to deceive the harness each give the documented exit code, through `python -m ci` and through nox."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ci import contract, execute, outcome, runbook

ROOT = Path(__file__).resolve().parent.parent
CANARIES = ROOT / "tests/data/canaries.toml"
PLANTED = """
import pytest
def test_passes(): assert True
def test_fails(): assert 1 == 2
@pytest.mark.skip(reason="needs CUDA, there is none")
def test_skips(): pass
"""
DUPLICATE = (
    '<testsuites><testsuite name="d" tests="2" failures="0" errors="0" skipped="0" time="1">'
    '<testcase classname="a" name="t" time="1"/><testcase classname="a" name="t" time="1"/></testsuite></testsuites>'
)
CODES = {
    "good": (0, "PASSED"),
    "allowed_skip": (0, "SKIPPED"),
    "fails": (1, "FAILED"),
    "fails_into_tee": (1, "FAILED"),
    "skips": (3, "VACUOUS"),
    "wrong_reason": (3, "VACUOUS"),
    "collects_nothing": (3, "VACUOUS"),
    "namesake": (3, "VACUOUS"),
    "lost_module": (3, "VACUOUS"),
    "namesake_skip": (0, "SKIPPED"),
    "no_deliverable": (3, "MISSING"),
    "empty_deliverable": (3, "MISSING"),
    "stale_deliverable": (3, "MISSING"),
    "wrong_header": (3, "MISSING"),
    "duplicates": (3, "MISSING"),
    "truncated": (3, "MISSING"),
    "loss_rises": (1, "FAILED"),
    "hangs": (124, "TIMEOUT"),
    "killed": (1, "FAILED"),
}


STEPS = {step.id: step for step in runbook.load(CANARIES).steps}


def plant(root: Path) -> dict[str, str]:
    """Plants the tests in `root`; returns the environment that points the harness at it."""
    (root / "test_planted.py").write_text(PLANTED)
    (root / "duplicate.xml").write_text(DUPLICATE)
    stale = root / "artifacts/train/stale.csv"
    stale.parent.mkdir(parents=True)
    stale.write_text("step,loss\n1,2\n")
    os.utime(stale, (time.time() - 86400,) * 2)
    environment = {**os.environ, "NSA_CI_ROOT": str(root), "NSA_CI_STEPS": str(CANARIES), "NSA_CI_PROFILE": "cpu"}
    return environment | {
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }


def call(command: list[str], environment: dict[str, str], cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """One readiness run over all canaries: (root, what the process said and returned, its result by step)."""
    root = tmp_path_factory.mktemp("canaries")
    done = call(["-m", "ci", "readiness"], plant(root))
    result = outcome.load_result(root / "artifacts/result.json")
    return root, done, {step.id: step for step in result.steps}


def test_every_canary_is_in_the_table(everything):
    assert set(CODES) == set(STEPS) == set(everything[2])


@pytest.mark.parametrize("name", CODES)
def test_a_planted_step_gives_its_verdict_and_code(everything, name):
    judged = everything[2][name]
    assert (contract.exit_code([judged]), judged.verdict) == CODES[name], judged.reason
    assert judged.reason or judged.verdict == "PASSED"


def test_a_run_with_canaries_is_not_ready_and_says_how_to_repeat_each(everything):
    root, done, judged = everything
    assert done.returncode == 1
    assert "note: judged by canaries.toml" in done.stdout
    left = json.loads((root / "artifacts/exit.json").read_text())
    assert (left["code"], left["session"]) == (1, "readiness")
    assert outcome.load_result(root / "artifacts/result.json").verdict == "NOT READY"
    lines = done.stdout.splitlines()
    for name in (name for name, (code, _) in CODES.items() if code):
        assert f"    reproduce: {judged[name].reproduce}" in lines


def test_a_hanging_step_leaves_no_process_behind(everything):
    child = int((everything[0] / "artifacts/child.pid").read_text())
    stat = Path(f"/proc/{child}/stat")
    assert not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_a_skip_that_cpu_allows_is_vacuous_on_a_gpu(everything):
    artifacts = everything[0] / "artifacts"
    record = outcome.load_record(artifacts / "results/allowed_skip.allowed_skip.json")
    assert contract.judge_step(STEPS["allowed_skip"], "cpu", record, artifacts).verdict == "SKIPPED"
    assert contract.judge_step(STEPS["allowed_skip"], "gpu", record, artifacts).verdict == "VACUOUS"


@pytest.mark.parametrize("name", CODES)
def test_nox_fails_and_exit_json_holds_the_code(tmp_path, name):
    """The repository's own session, whose one line names a planted stage."""
    noxfile = tmp_path / "noxfile.py"
    noxfile.write_text((ROOT / "noxfile.py").read_text().replace('"stage", "bench"', f'"stage", "{name}"'))
    done = call(["-m", "nox", "-f", str(noxfile), "-s", "bench"], plant(tmp_path), cwd=tmp_path)
    code = CODES[name][0]
    assert done.returncode == (1 if code else 0), done.stdout + done.stderr
    assert json.loads((tmp_path / "artifacts/exit.json").read_text())["code"] == code
    assert f"exit code {code}" in done.stdout


def test_a_run_narrowed_by_the_callers_pytest_arguments_proves_nothing(tmp_path):
    plant(tmp_path)
    step = replace(STEPS["good"], command="PYTHONPATH=. pytest -q test_planted.py -k 'passes or fails'")
    narrowed = ["--deselect=test_planted.py::test_fails"]
    context = execute.Context(tmp_path, "cpu", "abc", "r1", narrowed, lambda line: None)
    judged = contract.judge_step(step, "cpu", execute.run(step, context), tmp_path / "artifacts")
    assert (judged.verdict, judged.passed, judged.failed) == ("VACUOUS", 1, 0)
    assert "--deselect=test_planted.py::test_fails" in judged.reason


def test_137_is_worth_a_retry_only_with_the_kernels_record(tmp_path, monkeypatch):
    plant(tmp_path)
    events = tmp_path / "memory.events"
    events.write_text("oom 0\noom_kill 0\n")
    monkeypatch.setattr(execute, "CGROUP_EVENTS", events)
    out_of_memory = replace(STEPS["killed"], command=f"echo 'oom_kill 1' > {events}; kill -9 $$")
    for step, verdict, code in ((out_of_memory, "INFRA", 75), (STEPS["killed"], "FAILED", 1)):
        judged = contract.judge_step(step, "cpu", _run(step, tmp_path), tmp_path / "artifacts")
        assert (judged.verdict, contract.exit_code([judged])) == (verdict, code)


def _run(step, root):
    return execute.run(step, execute.Context(root, "cpu", "abc", "r1", say=lambda line: None))
