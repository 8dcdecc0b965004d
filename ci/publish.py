"""Turns bundles of a stranger's pull request into a comment: each is checked first, and none is believed.

    nox -s publish -- FOLDER --head SHA [--run ID.ATTEMPT] [--profiles A,B] [--out FILE]

FOLDER holds what a workflow's run uploaded, so everything in it is hostile. A bundle is checked in a process of its own
with limits on time, memory and size, against this checkout's runbook only, and must be of this commit, run and profile.
Nothing of it enters the comment but numbers, words from fixed lists, and text inside a code span, which GitHub neither
links, mentions nor renders. Its own summary.md is not used.

Exit codes: 0 every bundle is what it says (ready or not); 1 one was refused, and the comment says why; 2 usage; 3 there
is no bundle. The comment is written in each case but 2.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ci import audit, evidence, outcome
from ci.contract import digest
from ci.outcome import RunResult, StepOutcome
from ci.runbook import SOURCE, load

NAME = re.compile(r"nsa-readiness-[0-9a-f]{12}-[a-z0-9]+-[A-Za-z0-9._]+\.tar\.gz")
SHA = re.compile(r"[0-9a-f]{40}")
RUN = re.compile(r"[0-9]+\.[0-9]{1,2}")
ATTEMPT = re.compile(r"-([0-9]{1,3})$")
WORKFLOW = re.compile(r"[a-z-]{1,30}")
MAX_BUNDLES = 16
MAX_FILE = 64 * 2**20
LIMITS = audit.Limits(members=2000, member=64 * 2**20, total=256 * 2**20)
SECONDS, MEMORY = 120, 4 * 2**30
MAX_FIGURES = 20
MAX_COMMENT = 60_000  # GitHub takes 65,536 characters
MARKS = {"PASSED": "✅", "SKIPPED": "⚪"}


@dataclass(frozen=True)
class Expected:
    """What a bundle must be of: the commit, the run that uploaded it (ID.ATTEMPT, or any), one of the profiles."""

    head: str
    run: str = ""
    profiles: tuple[str, ...] = ()

    @property
    def runs(self) -> tuple[str, ...]:
        """That run's attempts so far: a job that passed is not run again with the others."""
        number, _, attempt = self.run.partition(".")
        return tuple(f"{number}.{n}" for n in range(1, int(attempt) + 1)) if self.run else ()


@dataclass(frozen=True)
class Checked:
    """A bundle's file name, and either what it proves or why it was refused."""

    name: str
    result: RunResult | None
    refusal: str = ""
    sha256: str = ""
    figures: Sequence[tuple[str, str, str]] = ()
    checkpoints: Sequence[str] = ()


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = _arguments(arguments)
    if args.inspect:
        print(json.dumps(_inspect(args.folder, args.runbook)))
        return outcome.READY
    expected = Expected(args.head, args.run or "", args.profiles)
    checked = check(args.folder, expected, args.runbook)
    args.out.write_text(comment(checked, expected, args.workflow), encoding="utf-8")
    for each in checked:
        # In a workflow's log a line of a stranger's could be a command to the runner: code() keeps it on this one.
        print(f"{code(each.name)}: {f'refused: {code(each.refusal)}' if each.refusal else 'verified'}")
    if not checked:
        print(f"publish: no bundle in {args.folder}", file=sys.stderr)
        return outcome.CONTRACT
    return outcome.TEST_FAILED if any(each.refusal for each in checked) else outcome.READY


def check(folder: Path, expected: Expected, runbook: Path = SOURCE) -> list[Checked]:
    """Every *.tar.gz of the artifacts in the folder (their last attempts), held against what is expected."""
    found = [path for artifact in latest(folder).values() for path in sorted(artifact.rglob("*.tar.gz"))]
    if len(found) > MAX_BUNDLES:
        return [Checked(f"{len(found)} files", None, f"more than {MAX_BUNDLES} bundles")]
    return [_check(path, expected, runbook) for path in found]


def latest(folder: Path) -> dict[str, Path]:
    """The artifacts of a run, a folder each, by name without the attempt: its last one, as a job may be run again."""
    attempts = {path: ATTEMPT.search(path.name) for path in (folder.iterdir() if folder.is_dir() else ())}
    ordered = sorted(attempts, key=lambda path: (int(found[1]) if (found := attempts[path]) else 0, path.name))
    last = {ATTEMPT.sub("", path.name): path for path in ordered}
    return {name: last[name] for name in sorted(last)}


def _check(path: Path, expected: Expected, runbook: Path) -> Checked:
    if unfit := _unfit(path):
        return Checked(path.name, None, unfit)
    said = _inspected(path, runbook)
    if "refusal" in said:
        return Checked(path.name, None, said["refusal"])
    result = _result(said["result"])
    for what, have, wanted in (
        ("commit", result.git_sha, (expected.head,)),
        ("run", result.run_id, expected.runs),
        ("profile", result.profile, expected.profiles),
    ):
        if wanted and have not in wanted:
            return Checked(path.name, None, f"made for {what} {have}, expected {' or '.join(wanted)}")
    if result.dirty:
        return Checked(path.name, None, "made with uncommitted changes")
    return Checked(path.name, result, "", said["sha256"], said["figures"], said["checkpoints"])


def _unfit(path: Path) -> str:
    if path.is_symlink() or not path.is_file():
        return "not a plain file"
    if not NAME.fullmatch(path.name):
        return "its name is not a bundle's"
    if path.stat().st_size > MAX_FILE:
        return f"{path.stat().st_size} bytes, over the limit of {MAX_FILE}"
    return ""


def _inspected(path: Path, runbook: Path) -> dict[str, Any]:
    """What a limited child process says of the bundle; a child that breaks off is a refusal."""
    command = [sys.executable, "-m", "ci.publish", str(path.resolve()), "--inspect", "--runbook", str(runbook)]
    try:
        done = subprocess.run(
            command, cwd=SOURCE.parent.parent, capture_output=True, timeout=SECONDS, preexec_fn=_limit
        )
    except subprocess.TimeoutExpired:
        return {"refusal": f"checking it took more than {SECONDS} s"}
    if done.returncode:
        return {"refusal": f"checking it broke off (exit code {done.returncode}): it exhausts memory, disk or time"}
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def _result(data: dict[str, Any]) -> RunResult:
    return RunResult(**{**data, "steps": [StepOutcome(**step) for step in data["steps"]]})


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(SECONDS),) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMITS.total, LIMITS.total))


def _inspect(path: Path, runbook: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="nsa-publish-") as scratch:
        root = Path(scratch)
        report = audit.verify(path, replace(LIMITS, runbook=digest(runbook)), keep=root)
        if report.result is None:
            return {"refusal": report.problems[0]}
        figures = evidence.headlines(evidence.collect(root / "artifacts"), report.result)
        checkpoints = json.loads((root / audit.MANIFEST).read_text())["checkpoints"]
        return {
            "result": asdict(report.result),
            "sha256": report.sha256,
            "figures": [(figure.label, figure.value, figure.note) for figure in figures],
            "checkpoints": [entry["path"] for entry in checkpoints],
        }


def comment(checked: list[Checked], expected: Expected, workflow: str) -> str:
    """The comment's Markdown, below GitHub's limit; its first line marks it as this workflow's."""
    lines = [marker(workflow), f"### Readiness of `{expected.head[:12]}`, from `{workflow}`", ""]
    if not checked:
        lines.append("❌ The run left no bundle, so nothing is proven.")
    for each in checked:
        lines += [*_section(each), ""]
    lines.append(
        "<sub>Each bundle was checked against the base branch's runbook; its parts agree. It was made by the pull "
        "request's own code, so it shows that the run is consistent, not who wrote it.</sub>"
    )
    return _capped(lines)


def marker(workflow: str) -> str:
    """The first line of the comment, by which the next run finds it."""
    return f"<!-- nsa-readiness: {workflow} -->"


def _section(each: Checked) -> Iterator[str]:
    if each.result is None:
        yield f"❌ **Refused**: {code(each.name)}: {code(each.refusal)}"
        return
    result = each.result
    mark = "✅" if result.exit_code == 0 else "❌"
    yield f"{mark} **{result.verdict}** (exit code {result.exit_code}) on {code(result.profile)}, {_machine(result)}"
    yield ""
    yield "| figure | value | |"
    yield "| --- | --- | --- |"
    for figure in each.figures[:MAX_FIGURES]:
        yield "| " + " | ".join(code(part) if part else "" for part in figure) + " |"
    if each.checkpoints:
        yield ""
        yield f"Checkpoints: {len(each.checkpoints)}, the last {code(each.checkpoints[-1])}"
    yield ""
    yield f"<details><summary>{len(result.steps)} steps</summary>"
    yield ""
    yield "| step | verdict | passed | failed | skipped | wall s | why |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for step in result.steps:
        yield _row(step)
    yield ""
    yield f"{code(each.name)}, sha256 {code(each.sha256)}"
    yield "</details>"


def _row(step: StepOutcome) -> str:
    counts = (step.passed, step.failed, step.skipped)
    why = code(step.reason) if step.reason else ""
    verdict = f"{MARKS.get(step.verdict, '❌')} {step.verdict}"
    return "| " + " | ".join([code(step.id), verdict, *map(str, counts), f"{step.wall_s:.1f}", why]) + " |"


def _machine(result: RunResult) -> str:
    gpus = result.env.get("gpus")
    names = [str(gpu.get("name")) for gpu in gpus if isinstance(gpu, dict)] if isinstance(gpus, list) else []
    versions = result.env.get("versions")
    torch = versions.get("torch") if isinstance(versions, dict) else None
    return f"{code(' + '.join(names) or 'no GPU')}, Python {code(result.env.get('python'))}, torch {code(torch)}"


def code(text: object, limit: int = 160) -> str:
    """Hostile text as a code span that nothing in it can leave, on one line and fit for a table."""
    shown = "".join(c if c.isprintable() else " " for c in str(text))
    shown = " ".join(shown.split()).replace("`", "'").replace("|", "¦")
    return f"`{shown[: limit - 1] + '…' if len(shown) > limit else shown or '?'}`"


def _capped(lines: list[str]) -> str:
    text = "\n".join(lines) + "\n"
    if len(text) <= MAX_COMMENT:
        return text
    kept = text[:MAX_COMMENT].rpartition("\n")[0]
    open_details = kept.count("<details>") - kept.count("</details>")
    return kept + "\n\n(cut: GitHub takes no longer comment)\n" + "</details>\n" * open_details


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    options = argparse.ArgumentParser(prog="nox -s publish --", description="Bundles of a stranger into a comment.")
    options.add_argument("folder", type=Path, help="what the workflow's run uploaded")
    options.add_argument("--head", type=_matching(SHA), help="the commit they must be of, 40 hex digits")
    options.add_argument("--run", type=_matching(RUN), help="the run they must be of, ID.ATTEMPT")
    options.add_argument("--profiles", type=_profiles, default=(), help="the profiles they may be of, with commas")
    options.add_argument("--workflow", type=_matching(WORKFLOW), default="ci", help="whose run it was")
    options.add_argument("--out", type=Path, default=Path("comment.md"), help="where the comment goes")
    options.add_argument("--runbook", type=Path, default=SOURCE, help="the one to judge by")
    options.add_argument("--inspect", action="store_true", help=argparse.SUPPRESS)
    args = options.parse_args(arguments)
    if not args.inspect and not args.head:
        options.error("--head is missing")
    if not args.inspect and not args.folder.is_dir():
        options.error(f"{args.folder} is not a folder")
    return args


def _profiles(text: str) -> tuple[str, ...]:
    named = tuple(text.split(","))
    known = load().profiles
    if unknown := [name for name in named if name not in known]:
        raise argparse.ArgumentTypeError(f"no profile {unknown[0]!a}; profiles: {', '.join(known)}")
    return named


def _matching(pattern: re.Pattern[str]) -> Callable[[str], str]:
    def check(text: str) -> str:
        if not pattern.fullmatch(text):
            raise argparse.ArgumentTypeError(f"{text!a:.60} does not match {pattern.pattern}")
        return text

    return check


if __name__ == "__main__":
    sys.exit(main())
