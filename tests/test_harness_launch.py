"""ci/nox: an environment made once, taken up again after an interruption, and the exit code of this run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ci import launch

ROOT = Path(__file__).resolve().parent.parent
NOXFILE = """
import json, pathlib, nox
exit_json = pathlib.Path(__file__).parent / "artifacts/exit.json"
def leave(code):
    exit_json.parent.mkdir(exist_ok=True)
    exit_json.write_text(json.dumps({"code": code}))
@nox.session(venv_backend="none")
def readiness(session):
    leave(3)
    session.error("contract")
@nox.session(venv_backend="none")
def bench(session):
    pass  # a judged session that leaves no exit.json
@nox.session(venv_backend="none")
def report(session):
    leave(0)
@nox.session(venv_backend="none")
def tests(session):
    pass
@nox.session(venv_backend="none")
def lint(session):
    session.error("a finding")
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A tree of its own for the launcher, whose installations are empty and so need no network."""
    monkeypatch.setattr(launch, "ROOT", tmp_path)
    monkeypatch.setattr(launch, "SCRATCH", tmp_path / ".nox")
    monkeypatch.delenv("NSA_CI_ROOT", raising=False)
    monkeypatch.delenv("NSA_CI_REQUIREMENTS", raising=False)
    (tmp_path / "requirements-cpu.txt").write_text("# nothing\n")
    (tmp_path / "noxfile.py").write_text(NOXFILE)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["-s", "readiness"], 3),
        (["-s", "bench"], 1),
        (["-s", "report"], 0),
        (["-s", "tests"], 0),
        (["-s", "lint"], 1),
        (["-l"], 0),
    ],
)
def test_the_exit_code_is_that_of_this_runs_exit_json(root, monkeypatch, arguments, code):
    monkeypatch.setattr(launch, "prepare", lambda venv, requirements: Path(sys.executable))
    stale = root / "artifacts/exit.json"
    stale.parent.mkdir()
    stale.write_text('{"code": 0}')
    assert launch.main(arguments) == code
    assert stale.is_file() == (arguments[-1] in ("readiness", "report"))


@pytest.mark.parametrize(
    ("arguments", "judged"),
    [
        ([], True),
        (["-s", "gpu_parity", "--", "-x"], True),
        (["-s", "lint", "readiness"], True),
        (["-s", "tests", "--", "-k", "readiness"], False),
        (["--session", "lint"], False),
        (["--list"], False),
        (["--version"], False),
    ],
)
def test_only_sessions_that_judge_must_leave_an_exit_json(arguments, judged):
    assert launch.judged(arguments) is judged


def test_the_judged_sessions_are_the_noxfiles_stages():
    from ci import runbook

    stages = {stage.id for stage in runbook.load().stages}
    assert set(launch.JUDGED) == stages | {"readiness", "preflight", "report", "image", "repro"}
    text = (ROOT / "noxfile.py").read_text()
    for name in launch.JUDGED:
        assert f"def {name}(session" in text


def test_an_environment_is_made_once_and_again_when_its_requirements_change(root, monkeypatch, capfd):
    steps = []
    real = launch._step
    monkeypatch.setattr(launch, "_step", lambda title, command: (steps.append(title.split()[0]), real(title, command)))
    requirements = root / "requirements-cpu.txt"
    python = launch.prepare(root / ".venv", requirements)
    assert subprocess.run([python, "-c", "pass"]).returncode == 0
    assert steps == ["making", "installing"]
    launch.prepare(root / ".venv", requirements)
    assert steps == ["making", "installing"], "nothing to do"
    requirements.write_text("# changed\n")
    launch.prepare(root / ".venv", requirements)
    assert steps == ["making", "installing", "installing"]
    (root / ".venv/.requirements").unlink()
    launch.prepare(root / ".venv", requirements)
    assert steps[3:] == ["installing"], "an interrupted installation is taken up, not begun anew"
    python.unlink()
    launch.prepare(root / ".venv", requirements)
    assert steps[4:] == ["making", "installing"], "a broken environment is made anew"
    said = capfd.readouterr()
    assert said.out == ""
    assert all(line.startswith("ci/nox: ") for line in said.err.splitlines()), "pip is quiet unless it fails"


def test_a_failing_installation_shows_its_last_lines_and_leaves_no_stamp(root, capfd):
    (root / "requirements-cpu.txt").write_text("./no-such-folder\n")
    assert launch.main(["-l"]) == 78
    said = capfd.readouterr().err
    assert "no-such-folder" in said
    assert "start it again to go on" in said.splitlines()[-1]
    assert not (root / ".venv/.requirements").exists()


def test_what_is_missing_is_one_line(root, monkeypatch, capfd):
    find = launch.importlib.util.find_spec
    monkeypatch.setattr(
        launch.importlib.util, "find_spec", lambda name: None if name in ("ensurepip", "virtualenv") else find(name)
    )
    assert launch.main([]) == 78
    monkeypatch.setenv("NSA_CI_REQUIREMENTS", "requirements-tpu.txt")
    assert launch.main([]) == 78
    first, second = capfd.readouterr().err.splitlines()
    assert "-venv" in first
    assert "requirements-tpu.txt" in second


def test_without_a_python_the_launcher_names_what_it_tried():
    environment = {"PATH": "/usr/bin:/bin", "NSA_CI_PYTHON": "/nonexistent/python"}
    done = subprocess.run([ROOT / "ci/nox", "-l"], env=environment, capture_output=True, text=True)
    assert done.returncode == 78
    assert len(done.stderr.splitlines()) == 1
    assert "/nonexistent/python" in done.stderr


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_reaches_the_step_and_its_code_comes_back(tmp_path, signum, code):
    steps = tmp_path / "steps.toml"
    steps.write_text(
        'schema = 1\n[profiles.cpu]\ntitle = "no GPU"\ngpus = 0\n'
        '[[stages]]\nid = "bench"\nnumber = 1\ntitle = "t"\nabout = "a"\n'
        '[[steps]]\nid = "long"\nstage = "bench"\ntitle = "t"\nkind = "script"\ntimeout = 600\n'
        "expect = { cpu = \"run\" }\ncommand = 'echo started > artifacts/started; sleep 300'\n"
    )
    driver = (
        "import sys, pathlib; from ci import launch; "
        "launch.prepare = lambda *_: pathlib.Path(sys.executable); sys.exit(launch.main(['-s', 'bench']))"
    )
    environment = {**os.environ, "NSA_CI_ROOT": str(tmp_path), "NSA_CI_STEPS": str(steps), "NSA_CI_PROFILE": "cpu"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    process = subprocess.Popen([sys.executable, "-c", driver], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "artifacts/started").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signum)
    assert process.wait(timeout=90) == code
