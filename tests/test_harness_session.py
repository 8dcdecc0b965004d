"""A session as a process: its exit code, its exit.json, where its evidence goes, what it says if it cannot run."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_canaries import CANARIES, plant

ROOT = Path(__file__).resolve().parent.parent


def ci(root: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ci", "--steps", str(CANARIES), *arguments]
    environment = plant(root) | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_a_gpu_profile_without_a_gpu_is_infrastructure_and_runs_nothing(tmp_path):
    done = ci(tmp_path, "--profile", "gpu", "stage", "good")
    assert done.returncode == 75
    assert "--gpus all" in done.stdout
    left = json.loads((tmp_path / "artifacts/exit.json").read_text())
    assert (left["code"], left["profile"], left["session"]) == (75, "gpu", "good")
    assert not (tmp_path / "artifacts/test-reports/good.txt").exists()


def test_preflight_leaves_its_findings(tmp_path):
    assert ci(tmp_path, "preflight").returncode == 0
    found = json.loads((tmp_path / "artifacts/preflight.json").read_text())
    assert (found["profile"], found["exit_code"]) == ("cpu", 0)
    assert {"python", "torch", "triton", "disk", "artifacts", "gpu"} <= {check["name"] for check in found["checks"]}
    assert json.loads((tmp_path / "artifacts/env.json").read_text())["python"].startswith("3.")


def test_artifacts_that_cannot_be_written_are_a_configuration_error(tmp_path):
    environment = plant(tmp_path)
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "artifacts").write_text("a file where the folder should be")
    done = subprocess.run(
        [sys.executable, "-m", "ci", "--root", str(blocked), "preflight"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 78, done.stderr
    assert "not writable" in done.stdout
    assert "Traceback" not in done.stderr


def test_the_evidence_is_copied_to_where_a_container_wants_it(tmp_path):
    target = tmp_path / "mount"
    root = tmp_path / "root"
    root.mkdir()
    assert ci(root, "stage", "good", NSA_CI_ARTIFACTS=str(target)).returncode == 0
    assert json.loads((target / "exit.json").read_text())["code"] == 0
    assert (target / "test-reports/good.txt").read_text() == (root / "artifacts/test-reports/good.txt").read_text()


def test_a_place_for_the_evidence_that_cannot_be_written_is_a_configuration_error(tmp_path):
    (tmp_path / "file").write_text("")
    done = ci(tmp_path, "preflight", NSA_CI_ARTIFACTS=str(tmp_path / "file/below"))
    assert done.returncode == 78
    assert "NSA_CI_ARTIFACTS" in done.stderr
    assert json.loads((tmp_path / "artifacts/exit.json").read_text())["code"] == 78


@pytest.mark.parametrize("env", [None, "[", "[]", "{}"])
def test_a_report_before_any_run_says_what_to_run(tmp_path, env):
    if env is not None:
        (tmp_path / "artifacts").mkdir()
        (tmp_path / "artifacts/env.json").write_text(env)
    done = ci(tmp_path, "report")
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["ci: nothing has run here yet; run: ci/nox -s readiness"]


@pytest.mark.parametrize("missing", ["junitparser", "packaging"])
def test_a_missing_package_is_one_line(tmp_path, missing):
    """An interpreter that lacks a package of the harness, as plain nox in a bare environment has."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{missing!r}] = None\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "ci", "preflight"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 78
    (line,) = done.stderr.splitlines()
    assert missing in line
    assert "ci/nox" in line


def test_arguments_after_the_dashes_reach_pytest(tmp_path):
    done = ci(tmp_path, "stage", "good", "--", "--deselect", "test_planted.py::test_passes")
    assert done.returncode == 3, "a narrowed run that executes nothing is vacuous too"


def test_a_second_session_in_one_tree_is_refused_and_touches_nothing(tmp_path):
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts/exit.json").write_text("the first one's")
    tree = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(tree, fcntl.LOCK_EX)
    try:
        second = subprocess.run(
            [sys.executable, "-m", "ci", "--root", str(tmp_path), "preflight"], cwd=ROOT, capture_output=True, text=True
        )
    finally:
        os.close(tree)
    assert second.returncode == 75
    assert second.stderr == "ci: another session is running in this tree; wait for it, or use a clone of its own\n"
    assert (tmp_path / "artifacts/exit.json").read_text() == "the first one's"
