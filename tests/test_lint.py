"""`nox -s lint` bites: each checker sees what is planted for it, and one that is not installed is no success."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ci import lint

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / ".nox/lint/bin"  # where the session keeps them
PATH = f"{TOOLS}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
# An image holds no workflows: nothing of them is read while tests are collected.
WORKFLOW = ROOT / ".github/workflows/ci.yml"
# File and its text; for a workflow what is replaced in ours, and by what.
PLANTED: dict[str, tuple[str, str | tuple[str, str]]] = {
    "ruff: rules": ("a.py", "import os\n"),
    "ruff: format": ("a.py", "x = [1,2]\n"),
    "schema: vendor.github-workflows": (".github/workflows/a.yml", ("runs-on:", "run-on:")),
    "schema: custom.github-workflows-require-timeout": (
        ".github/workflows/a.yml",
        ("    timeout-minutes: 20\n", ""),
    ),
    "schema: vendor.dependabot": (".github/dependabot.yml", "version: 3\nupdates: []\n"),
    "schema: vendor.github-issue-forms": (".github/ISSUE_TEMPLATE/a.yml", "name: a\n"),
    "schema: vendor.github-issue-config": (".github/ISSUE_TEMPLATE/config.yml", "blank_issues_enabled: 3\n"),
    "zizmor": (".github/workflows/a.yml", ("run: ci/nox -s lint", "run: echo ${{ github.head_ref }}")),
    "yamllint": ("a.yaml", "a:   1\n"),
    "shellcheck: scripts": ("tool", '#!/bin/sh\nrm -r "$1"/$2\n'),
    "shellcheck: .github/workflows/a.yml": (
        ".github/workflows/a.yml",
        ("run: ci/nox -s lint", "run: ls $HOME/*.txt | grep $1"),
    ),
    "hadolint": ("docker/a.Dockerfile", "FROM debian:latest\nRUN cd /tmp\n"),
}


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """A git repository in which nothing is wrong."""
    monkeypatch.setenv("PATH", PATH)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "pyproject.toml").write_text('[tool.mypy]\nfiles = ["ok.py"]\n')
    (tmp_path / "ok.py").write_text("x = 1\n")
    shutil.copy(ROOT / ".yamllint.yml", tmp_path)
    return tmp_path


def plant(tree: Path, name: str, text: str) -> None:
    (tree / name).parent.mkdir(parents=True, exist_ok=True)
    (tree / name).write_text(text)


def said(capfd: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Each check's outcome by its name."""
    lines = [line.split(maxsplit=1) for line in capfd.readouterr().out.splitlines()]
    return {line[1]: line[0] for line in lines if len(line) == 2 and line[0] in ("ok", "FAILED")}


def needs_tools() -> None:
    missing = [tool for tool in ("zizmor", "yamllint", "shellcheck", "hadolint") if not shutil.which(tool, path=PATH)]
    if missing:
        pytest.skip(f"{missing[0]} is not installed; ci/nox -s lint brings it")


@pytest.mark.parametrize("check", PLANTED)
def test_a_checker_sees_what_is_planted_for_it(tree, capfd, check):
    needs_tools()
    name, text = PLANTED[check]
    plant(tree, name, text if isinstance(text, str) else WORKFLOW.read_text().replace(*text))
    assert lint.main(tree, [check]) == 1
    assert said(capfd) == {check: "FAILED"}


def test_a_clean_tree_passes_and_every_checker_was_there(tree, capfd):
    needs_tools()
    for name in (".github/workflows/ci.yml", ".ci/run", "ci/nox"):
        plant(tree, name, (ROOT / name).read_text())
    assert lint.main(tree) == 0  # all of them, mypy too
    seen = said(capfd)
    assert set(seen.values()) == {"ok"}
    assert {"mypy", "zizmor", "yamllint", "shellcheck: scripts", "shellcheck: .github/workflows/ci.yml"} <= set(seen)


def test_all_checks_are_run_whatever_the_first_says(tree, capfd):
    needs_tools()
    plant(tree, "a.py", "import os\n")
    plant(tree, "b.yaml", "a: 1\n")
    assert lint.main(tree, ["ruff: rules", "yamllint"]) == 1
    assert said(capfd) == {"ruff: rules": "FAILED", "yamllint": "ok"}


def test_a_checker_that_is_absent_is_a_configuration_error(tree, capfd, monkeypatch):
    git = str(Path(shutil.which("git")).parent)
    monkeypatch.setattr(lint.shutil, "which", lambda tool: None if tool == "yamllint" else f"{git}/true")
    assert lint.main(tree) == 78
    assert "yamllint is not installed; run: ci/nox -s lint" in capfd.readouterr().err


def test_a_workflow_that_is_no_yaml_is_told_in_a_line(tree, capfd):
    plant(tree, ".github/workflows/a.yml", "a: [\n")
    assert lint.main(tree) == 1
    assert "lint: " in capfd.readouterr().err


def test_shell_scripts_are_found_by_name_and_by_first_line(tmp_path):
    for name, text, shell in (
        ("a.sh", "", True),
        ("run", "#!/usr/bin/env bash\n", True),
        ("nox", "#!/bin/sh\n", True),
        ("a.py", "#!/bin/sh\n", False),
        ("tool", "#!/usr/bin/env python3\n", False),
        ("fish", "#!/usr/bin/fish\n", False),
    ):
        (tmp_path / name).write_text(text)
        assert lint.is_shell(tmp_path / name) == shell, name
