"""A bundle run again: at its commit, natively or in its image, and what is refused."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from ci import repro

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("docker.client", reason="needs the Docker SDK")
RUNBOOK = """
schema = 1
[profiles.cpu]
title = "no GPU"
gpus = 0
[[stages]]
id = "small"
number = 1
title = "small"
about = "One file that says ready."
[[steps]]
id = "small"
stage = "small"
title = "what the tree says"
kind = "script"
command = "cp said.txt artifacts/test-reports/said.txt && grep -q ready said.txt"
timeout = 60
expect = { "*" = "run" }
deliverables = [{ path = "artifacts/test-reports/said.txt" }]
"""


def git(tree: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(tree), *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def ci(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("NSA_CI_")}
    return subprocess.run(
        [sys.executable, "-m", "ci", *arguments],
        cwd=tree,
        env={**inherited, "PYTHONPATH": str(tree), "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def ready(tree: Path) -> Path:
    """Runs everything in the tree; its bundle."""
    shutil.rmtree(tree / "dist", ignore_errors=True)
    done = ci(tree, "--profile", "cpu", "readiness")
    assert done.returncode in (0, 1), done.stdout + done.stderr
    (bundle,) = (tree / "dist").glob("*.tar.gz")
    return bundle.rename(tree.parent / f"{len(list(tree.parent.iterdir()))}-{bundle.name}")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A repository with this harness and a runbook of one step, at its first commit."""
    tree = tmp_path_factory.mktemp("repro") / "tree"
    shutil.copytree(ROOT / "ci", tree / "ci", ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "ci/runbook.toml").write_text(RUNBOOK)
    (tree / ".gitignore").write_text((ROOT / ".gitignore").read_text())
    (tree / "said.txt").write_text("ready\n")
    git(tree, "init", "-q")
    git(tree, "add", ".")
    git(tree, "commit", "-qm", "first")
    return tree


@pytest.fixture(scope="module")
def bundle(tree):
    return ready(tree)


def test_the_same_commit_gives_the_same_verdict_and_leaves_the_tree_alone(tree, bundle):
    (tree / "artifacts/mine.txt").write_text("mine")
    done = ci(tree, "repro", str(bundle))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "repro: same verdict, READY ON CPU, and every step came out alike" in done.stdout
    assert "differs: commit" not in done.stdout
    assert (tree / "artifacts/mine.txt").read_text() == "mine"
    assert (tree / "artifacts.repro/test-reports/said.txt").read_text() == "ready\n"
    assert json.loads((tree / "artifacts/exit.json").read_text())["session"] == "repro"
    assert git(tree, "worktree", "list").count("\n") == 0


def test_it_runs_the_bundles_commit_not_the_one_that_is_checked_out(tree, bundle):
    (tree / "said.txt").write_text("broken\n")
    git(tree, "commit", "-qam", "second")
    try:
        done = ci(tree, "repro", str(bundle))
        assert done.returncode == 0, done.stdout
        here = ci(tree, "repro", "--here", str(bundle))
        assert here.returncode == 1, here.stdout
        assert "differs: commit: " in here.stdout
        assert "READY ON CPU in the bundle, NOT READY now" in here.stdout
        assert "small.small: PASSED in the bundle, FAILED now" in here.stdout
    finally:
        git(tree, "reset", "-q", "--hard", "HEAD~1")


def test_uncommitted_changes_cannot_be_repeated_and_are_named(tree):
    (tree / "said.txt").write_text("broken\n")
    try:
        dirty = ready(tree)
    finally:
        git(tree, "checkout", "-q", "said.txt")
    done = ci(tree, "repro", str(dirty))
    assert done.returncode == 0, done.stdout
    assert "differs: uncommitted changes were in the bundle's tree" in done.stdout
    assert "NOT READY in the bundle, READY ON CPU now" in done.stdout


def test_a_commit_that_is_not_here_names_the_remedy(tree, bundle):
    (tree / "said.txt").write_text("ready, once\n")
    git(tree, "commit", "-qam", "lost")
    lost = ready(tree)
    commit = git(tree, "rev-parse", "HEAD")
    git(tree, "reset", "-q", "--hard", "HEAD~1")
    git(tree, "reflog", "expire", "--expire=now", "--all")
    git(tree, "gc", "-q", "--prune=now")
    done = ci(tree, "repro", str(lost))
    assert done.returncode == 78
    assert f"git fetch origin {commit}" in done.stdout


def test_a_runbook_that_is_not_the_commits_is_not_obeyed(tree):
    (tree / "other.toml").write_text(RUNBOOK.replace("cp said.txt", "touch obeyed && cp said.txt"))
    shutil.rmtree(tree / "dist", ignore_errors=True)
    assert ci(tree, "--steps", "other.toml", "--profile", "cpu", "readiness").returncode == 0
    (bundle,) = (tree / "dist").glob("*.tar.gz")
    (tree / "obeyed").unlink()
    done = ci(tree, "repro", str(bundle))
    assert done.returncode == 78
    assert "judged by a runbook that is not its commit's ci/runbook.toml" in done.stdout
    assert not (tree / "obeyed").exists()
    (tree / "other.toml").unlink()


def test_a_tampered_bundle_is_refused_and_nothing_is_run(tree, bundle, tmp_path):
    forged = tmp_path / "forged.tar.gz"
    forged.write_bytes(gzip.compress(gzip.decompress(bundle.read_bytes()).replace(b"READY ON CPU", b"READY OR CPU", 1)))
    shutil.rmtree(tree / "artifacts.repro", ignore_errors=True)
    done = ci(tree, "repro", str(forged))
    assert done.returncode == 1
    assert "refused: " in done.stdout
    assert not (tree / "artifacts.repro").exists()
    assert json.loads((tree / "artifacts/exit.json").read_text())["code"] == 1


def evil(folder: Path) -> Path:
    path = folder / "evil.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("nsa-readiness-x/../../evil"), io.BytesIO())
    return path


def test_a_bundle_that_leaves_its_folder_is_refused(tree, tmp_path):
    done = ci(tree, "repro", str(evil(tmp_path)))
    assert done.returncode == 1
    assert "leaves its folder by `..`" in done.stdout


def test_a_bundle_that_leaves_its_folder_is_refused_through_nox(tmp_path):
    """nox itself returns 1 for every failure; exit.json holds the code."""
    environment = {**os.environ, "NSA_CI_ROOT": str(tmp_path)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = [sys.executable, "-m", "nox", "-f", str(ROOT / "noxfile.py"), "-s", "repro", "--", str(evil(tmp_path))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert json.loads((tmp_path / "artifacts/exit.json").read_text())["code"] == 1
    assert "leaves its folder by `..`" in done.stdout


def test_a_stand_in_base_is_taken_from_the_caller_never_from_the_bundle(monkeypatch):
    image = {"lane": "cpu", "base": "stranger.example/x:1", "stand_in": True}
    for named in ("", "local/other:1"):
        monkeypatch.setenv("NSA_CI_BASE", named)
        with pytest.raises(repro.ReproError, match="NSA_CI_BASE=stranger") as refused:
            repro._find_image(None, image, ROOT, print)
        assert refused.value.code == 78


def test_a_bundle_that_is_not_there_is_usage(tree):
    done = ci(tree, "repro", "nowhere.tar.gz")
    assert done.returncode == 2
    assert "no such file" in done.stdout
