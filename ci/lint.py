"""Every static check, all offline: Python, workflows, YAML, shell scripts, `run:` blocks, Dockerfiles.

Each checker is run whatever the others say, so that one log shows all. A checker that is not installed is a failure.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from ci import expressions, outcome, workflow

ROOT = Path(__file__).resolve().parent.parent
SHEBANG = re.compile(rb"#!\s*\S*[/ ](?:ba|da)?sh\b")
FORMS = ".github/ISSUE_TEMPLATE/"

Check = tuple[str, list[str]]


def main(root: Path = ROOT, only: Sequence[str] = ()) -> int:
    """Runs every check (or those named) over the files git knows; prints what failed. Returns 0, 1 or 78."""
    files = tracked(root)
    failed = []
    with tempfile.TemporaryDirectory(prefix="lint-") as scratch:
        try:
            checks = [*checks_of(root, files), *run_blocks(root, files, Path(scratch))]
        except workflow.WorkflowError as error:
            print(f"lint: {error}", file=sys.stderr)
            return outcome.TEST_FAILED
        for name, command in (check for check in checks if not only or check[0] in only):
            tool = shutil.which(command[0])
            if tool is None:
                print(f"lint: {command[0]} is not installed; run: ci/nox -s lint", file=sys.stderr)
                return outcome.CONFIGURATION
            done = subprocess.run([tool, *command[1:]], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            print(f"{'ok' if done.returncode == 0 else 'FAILED':6} {name}", flush=True)
            if done.returncode:
                print(done.stdout.decode(errors="replace").replace(f"{scratch}/", "run block ").rstrip(), flush=True)
                failed.append(name)
    if failed:
        print(f"lint: failed: {', '.join(failed)}", file=sys.stderr)
    return outcome.TEST_FAILED if failed else outcome.READY


def tracked(root: Path) -> list[str]:
    """The files that git tracks or would add, as paths from the root."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, check=True, capture_output=True)
    return sorted({name for name in listed.stdout.decode().split("\0") if name and (root / name).is_file()})


def checks_of(root: Path, files: list[str]) -> Iterator[Check]:
    """The commands, each over the files it is for; a checker without files is left out."""
    yield "ruff: rules", [sys.executable, "-m", "ruff", "check", "."]
    yield "ruff: format", [sys.executable, "-m", "ruff", "format", "--check", "."]
    yield "mypy", [sys.executable, "-m", "mypy"]
    workflows = workflows_of(files)
    forms = [name for name in files if name.startswith(FORMS) and name.endswith(".yml")]
    for schema, matching in (
        ("vendor.github-workflows", workflows),
        ("custom.github-workflows-require-timeout", workflows),
        ("vendor.dependabot", [name for name in files if name == ".github/dependabot.yml"]),
        ("vendor.github-issue-forms", [name for name in forms if not name.endswith("/config.yml")]),
        ("vendor.github-issue-config", [name for name in forms if name.endswith("/config.yml")]),
    ):
        if matching:
            yield f"schema: {schema}", ["check-jsonschema", "--builtin-schema", schema, *matching]
    if workflows:
        options = ["--offline", "--no-progress", "--persona", "pedantic", "--strict-collection"]
        yield "zizmor", ["zizmor", *options, ".github"]
    if yaml := [name for name in files if name.endswith((".yml", ".yaml"))]:
        yield "yamllint", ["yamllint", "--strict", *yaml]
    if scripts := [name for name in files if is_shell(root / name)]:
        yield "shellcheck: scripts", ["shellcheck", *scripts]
    if dockerfiles := [name for name in files if "dockerfile" in Path(name).name.lower()]:
        yield "hadolint", ["hadolint", *dockerfiles]


def run_blocks(root: Path, files: list[str], scratch: Path) -> Iterator[Check]:
    """shellcheck over every `run:` block of the workflows, each written to a file named after its job and step."""
    for name in workflows_of(files):
        scripts = []
        for job, number, script in scripts_of(workflow.load(root / name)):
            path = scratch / Path(name).stem / f"{job}.{number}.sh"
            path.parent.mkdir(exist_ok=True)
            path.write_text(script)
            scripts.append(str(path))
        if scripts:
            yield f"shellcheck: {name}", ["shellcheck", "--shell=bash", *scripts]


def scripts_of(data: dict[str, object]) -> Iterator[tuple[str, int, str]]:
    """Job, step number and text of each `run:` block; an expression in it becomes a word, as bash will read one."""
    jobs = data.get("jobs")
    for job, body in jobs.items() if isinstance(jobs, dict) else ():
        for number, step in enumerate(body.get("steps") or []):
            if "run" in step:
                # bash is started with these options; on the first line, so that the line numbers stay the block's.
                yield job, number, "set -eo pipefail; " + expressions.INLINE.sub("expression", step["run"]) + "\n"


def workflows_of(files: list[str]) -> list[str]:
    return [name for name in files if name.startswith(".github/workflows/") and name.endswith((".yml", ".yaml"))]


def is_shell(path: Path) -> bool:
    """By its name, or by its first line."""
    if path.suffix in (".sh", ".bash"):
        return True
    with path.open("rb") as file:
        return not path.suffix and SHEBANG.match(file.readline(100)) is not None


if __name__ == "__main__":
    sys.exit(main())
