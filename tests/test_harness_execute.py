"""Running a step: what it may not inherit, what is kept of it, and what happens when somebody ends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ci import contract, execute, outcome, runbook
from ci.execute import Context
from ci.runbook import Assertion, Deliverable, Step

ROOT = Path(__file__).resolve().parent.parent


def script(command: str, **changes) -> Step:
    given = {"timeout": 60, "expect": {"*": "run"}} | changes
    return Step("x", "s", "a step", "script", command, **given)


@pytest.fixture
def context(tmp_path):
    return Context(tmp_path, "cpu", "abc", "r1", say=lambda line: None)


def judged(step: Step, context: Context):
    record = execute.run(step, context)
    return contract.judge_step(step, context.profile, record, context.artifacts)


def test_a_command_runs_from_the_root_with_this_interpreter(context):
    step = script("python -c 'import sys; print(sys.executable)' > artifacts/a.txt; pwd > artifacts/b.txt")
    (context.root / "artifacts").mkdir()
    execute.run(step, context)
    ran = Path((context.artifacts / "a.txt").read_text().strip())
    assert ran.parent == Path(sys.executable).parent
    assert (context.artifacts / "b.txt").read_text().strip() == str(context.root)


def test_the_callers_flags_do_not_reach_the_step(context, monkeypatch):
    own = {"NSA_USE_TRITON_SEL", "PYTEST_ADDOPTS", "PYTEST_PLUGINS", "PYTHONOPTIMIZE", "CONFIG"}
    for name in own:
        monkeypatch.setenv(name, "--deselect everything")
    monkeypatch.setenv("NSA_CI_PROFILE", "cpu")
    assert execute.foreign_flags() == ["NSA_USE_TRITON_SEL"]
    step = script("env", output="artifacts/env.txt", deliverables=(Deliverable("artifacts/env.txt"),))
    assert judged(step, context).verdict == "PASSED"
    names = {line.split("=")[0] for line in (context.artifacts / "env.txt").read_text().splitlines()}
    assert not names & own
    assert "NSA_CI_PROFILE" in names


def test_waiting_threads_sleep_unless_the_caller_says_otherwise(context, monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert execute.environment(script("true"), context)["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert execute.environment(script("true"), context)["OMP_WAIT_POLICY"] == "ACTIVE"


def test_stdout_is_the_deliverable_and_stderr_is_kept_beside_it(context):
    step = script(
        "echo out; echo warning >&2", output="artifacts/o.txt", deliverables=(Deliverable("artifacts/o.txt"),)
    )
    assert judged(step, context).verdict == "PASSED"
    assert (context.artifacts / "o.txt").read_text() == "out\n"
    assert (context.artifacts / "logs/s.x.err").read_text() == "warning\n"


def test_a_failure_in_a_pipe_fails(context):
    assert judged(script("false | true"), context).verdict == "FAILED"


def test_the_last_lines_of_a_failure_are_kept_without_the_machines_paths(context):
    step = script("for i in $(seq 50); do echo line $i >&2; done; echo $PWD/file >&2; exit 3")
    record = execute.run(step, context)
    assert record.exit_code == 3
    assert len(record.tail) == execute.TAIL_LINES
    assert record.tail[-1] == "file"


def test_peak_memory_of_the_largest_process_is_measured(context):
    # More than this process ever held: a child starts as its parent's copy, and the kernel counts that too.
    record = execute.run(script("python -c 'x = bytearray(1500 << 20)'"), context)
    assert 1500 < record.peak_mb < 1600


def test_a_process_left_in_the_background_is_ended(context):
    (context.root / "artifacts").mkdir()
    execute.run(script("sleep 300 & echo $! > artifacts/pid"), context)
    pid = int((context.artifacts / "pid").read_text())
    deadline = time.monotonic() + 10
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(pid)


def test_a_step_that_ignores_sigterm_is_killed(context, monkeypatch):
    monkeypatch.setattr(execute, "GRACE_S", 0.5)
    record = execute.run(script("trap '' TERM; while true; do sleep 0.1; done", timeout=0.5), context)
    assert (record.exit_code, record.timed_out) == (124, True)
    assert record.wall_s < 10


def test_a_heartbeat_is_said_while_a_step_runs(context, monkeypatch):
    said = []
    monkeypatch.setattr(execute, "HEARTBEAT_S", 0.2)
    execute.run(script("sleep 1"), Context(context.root, "cpu", "abc", "r1", say=said.append))
    assert 2 <= len(said) <= 5
    assert said[0].lstrip().startswith("x: ")


def test_own_deliverables_are_removed_first_and_kept_ones_are_not(context):
    own, kept = context.artifacts / "own.txt", context.artifacts / "kept.csv"
    context.artifacts.mkdir()
    own.write_text("yesterday")
    kept.write_text("a training run")
    step = script("true", deliverables=(Deliverable("artifacts/own.txt"), Deliverable("artifacts/kept.csv", keep=True)))
    found = judged(step, context)
    assert found.verdict == "MISSING"
    assert not own.exists()
    assert kept.read_text() == "a training run"


def test_a_step_that_is_not_started_leaves_no_deliverable_of_an_earlier_run(context):
    context.artifacts.mkdir()
    (context.artifacts / "old.txt").write_text("from the GPU box")
    step = script("true", needs=("cuda",), deliverables=(Deliverable("artifacts/old.txt"),), expect={"*": "skip_ok"})
    execute.skip(step, context, "needs CUDA, and torch sees none here")
    assert not (context.artifacts / "old.txt").exists()


def test_a_step_not_started_is_skipped_only_for_an_allowed_reason(context):
    step = script("true", expect={"*": "skip_ok"}, allow={"cpu": ["^needs CUDA"]})
    for note, verdict in (("needs CUDA, there is none", "SKIPPED"), ("felt like it", "VACUOUS")):
        record = execute.skip(step, context, note)
        assert contract.judge_step(step, "cpu", record, context.artifacts).verdict == verdict


def test_a_forbidden_step_that_ran_is_not_believed(context):
    step = script("true", expect={"*": "forbid"})
    assert judged(step, context).verdict == "VACUOUS"


def test_evidence_changed_after_its_step_is_noticed(context):
    step = script("echo 1 > artifacts/a.txt", deliverables=(Deliverable("artifacts/a.txt"),))
    context.artifacts.mkdir()
    record = execute.run(step, context)
    assert contract.judge_step(step, "cpu", record, context.artifacts).verdict == "PASSED"
    (context.artifacts / "a.txt").write_text("2\n")
    after = contract.judge_step(step, "cpu", record, context.artifacts)
    assert (after.verdict, after.reason) == ("MISSING", "artifacts/a.txt was changed after its step")


@pytest.mark.parametrize(
    ("content", "claim", "holds"),
    [
        ('{"cuda": false}', {"json": "cuda", "equals": False}, True),
        ('{"cuda": 0}', {"json": "cuda", "equals": False}, False),
        ('{"a": {"b": null}}', {"json": "a.b", "within": (True, "null")}, True),
        ('{"a": {}}', {"json": "a.b", "equals": 1}, False),
        ("not json", {"json": "a", "equals": 1}, False),
        ("reads_total=7\nreads_expected=7\n", {"regex": r"reads_total=(\d+)[\s\S]*reads_expected=\1\b"}, True),
        ("reads_total=7\nreads_expected=77\n", {"regex": r"reads_total=(\d+)[\s\S]*reads_expected=\1\b"}, False),
        ("step,loss\n1,5\n2,4\n3,3\n4,2\n", {"column": "loss", "falls": 0.97}, True),
        ("step,loss\n1,5\n2,4\n3,3\n4,4.9\n", {"column": "loss", "falls": 0.97}, False),
        ("step,loss\n1,5\n2,nan\n3,nan\n4,nan\n", {"column": "loss", "falls": 0.97}, False),
        ("step,loss\n1,5\n", {"column": "loss", "falls": 0.97}, False),
        ("step,other\n1,5\n2,5\n3,5\n4,1\n", {"column": "loss", "falls": 0.97}, False),
        ("a,b\n1,1\n2,2.0\n", {"column": "a", "same_as": "b"}, True),
        ("a,b\n1,1\n2,3\n", {"column": "a", "same_as": "b"}, False),
        ("a,b\n", {"column": "a", "same_as": "b"}, False),
    ],
)
def test_an_assertion_holds_or_fails_the_step(context, content, claim, holds):
    context.artifacts.mkdir()
    (context.root / "content").write_text(content)
    step = script(
        "cp content artifacts/f",
        deliverables=(Deliverable("artifacts/f"),),
        assertions=(Assertion("artifacts/f", **claim),),
    )
    found = judged(step, context)
    assert found.verdict == ("PASSED" if holds else "FAILED"), found.reason
    assert holds or "artifacts/f" in found.reason


def test_a_record_of_another_commit_profile_or_command_is_not_believed(tmp_path):
    book = runbook.load(ROOT / "tests/data/canaries.toml")
    step = next(s for s in book.steps if s.id == "no_deliverable")
    artifacts = tmp_path / "artifacts"
    good = {"profile": "cpu", "git_sha": "abc", "command": step.command}
    for change in ({}, {"profile": "gpu"}, {"git_sha": "older"}, {"command": "echo ok"}):
        made = good | change
        record = outcome.StepRecord(
            step.id, step.stage, made["command"], step.kind, made["profile"], made["git_sha"], "r1", 1.0, exit_code=0
        )
        outcome.save(record, artifacts / f"results/{step.key}.json")
        (artifacts / "env.json").write_text('{"git_sha": "abc"}')
        found = next(s for s in contract.judge(book, "cpu", artifacts).steps if s.id == step.id)
        assert found.verdict == "MISSING"
        assert ("recorded for" in found.reason) == bool(change)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("command", ["readiness", "stage"])
def test_a_run_that_is_ended_passes_the_signal_on_and_says_so(tmp_path, signum, code, command):
    steps = tmp_path / "steps.toml"
    steps.write_text(
        'schema = 1\n[profiles.cpu]\ntitle = "no GPU"\ngpus = 0\n'
        '[[stages]]\nid = "long"\nnumber = 1\ntitle = "t"\nabout = "a"\n'
        '[[steps]]\nid = "long"\nstage = "long"\ntitle = "t"\nkind = "script"\ntimeout = 600\n'
        'expect = { cpu = "run" }\n'
        "command = '''trap 'echo ended > artifacts/saved; exit 1' TERM; echo $$ > artifacts/pid; "
        "while true; do sleep 0.05; done'''\n"
    )
    environment = {**os.environ, "NSA_CI_ROOT": str(tmp_path), "NSA_CI_STEPS": str(steps), "NSA_CI_PROFILE": "cpu"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    arguments = [command, "long"] if command == "stage" else [command]
    process = subprocess.Popen(
        [sys.executable, "-m", "ci", *arguments], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
    )
    pid = tmp_path / "artifacts/pid"
    deadline = time.monotonic() + 120
    try:
        while not (pid.is_file() and pid.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signum)
        assert process.wait(timeout=60) == code
    finally:
        process.kill()
    assert json.loads((tmp_path / "artifacts/exit.json").read_text())["code"] == code
    assert (tmp_path / "artifacts/saved").read_text() == "ended\n", "the step is told to end, and may save its work"
    assert not _alive(int(pid.read_text()))


def _alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
