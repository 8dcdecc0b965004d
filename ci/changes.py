"""Which failures of a night are new, which are known from the night before, and which are gone.

    nox -s changes -- BEFORE AFTER [--out FILE]

Each folder holds a run's artifacts as GitHub hands them out, a folder an artifact: `bundle-*` with a bundle, which is
verified, and `junit-*` with a JUnit file. They are matched by name without the attempt. An artifact that was there
before and is not any more is a new failure: silence is not health. A BEFORE that is empty makes every failure new.

Exit codes: 0 nothing new; 1 new failures; 2 usage; 3 AFTER holds nothing to compare.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ci import audit, junit, outcome
from ci.publish import code, latest

Failures = dict[str, set[str]]


@dataclass(frozen=True)
class Changes:
    """Failures as (artifact, what failed), sorted."""

    new: list[tuple[str, str]]
    known: list[tuple[str, str]]
    fixed: list[tuple[str, str]]


def failures(folder: Path) -> Failures:
    """What failed, by artifact, in its last attempt; an artifact without failures has an empty set."""
    found: Failures = {}
    for name, artifact in latest(folder).items():
        bundles, reports = sorted(artifact.rglob("*.tar.gz")), sorted(artifact.glob("tests*.xml"))
        failed = [*map(_of_bundle, bundles), *map(_of_junit, reports)]
        if failed:
            found[name] = set().union(*failed)
    return found


def compare(before: Failures, after: Failures) -> Changes:
    """New, known and fixed failures. An artifact of `before` that `after` lacks is a new failure of its own."""
    old = {(artifact, name) for artifact, names in before.items() for name in names}
    now = {(artifact, name) for artifact, names in after.items() for name in names}
    silent = {(artifact, "left no result, and did the night before") for artifact in before.keys() - after.keys()}
    fixed = {(artifact, name) for artifact, name in old - now if artifact in after}
    return Changes(sorted(now - old | silent), sorted(now & old), sorted(fixed))


def _of_bundle(path: Path) -> Iterator[str]:
    report = audit.verify(path)
    if report.result is None:
        yield f"bundle refused: {report.problems[0]}"
        return
    with tempfile.TemporaryDirectory(prefix="nsa-changes-") as scratch:
        for step in report.result.steps:
            if step.verdict in ("PASSED", "SKIPPED"):
                continue
            raw = Path(scratch) / f"{step.stage}.{step.id}.xml"
            named = list(_of_junit(raw)) if step.verdict == "FAILED" and _extract(path, raw) else []
            for name in named or [step.verdict]:
                yield f"{step.id}: {name}"


def _extract(path: Path, target: Path) -> bool:
    """Copies a raw JUnit file out of a verified bundle, if it is in it."""
    with tarfile.open(path) as tar:
        for info in tar:
            if info.name.endswith(f"/artifacts/junit/{target.name}") and (file := tar.extractfile(info)):
                target.write_bytes(file.read())
                return True
    return False


def _of_junit(path: Path) -> Iterator[str]:
    try:
        cases = junit.read(path)
    except junit.JUnitError as error:
        yield str(error)
        return
    yield from (case.name for case in cases if case.state == "failed")


def page(changes: Changes, nights: tuple[int, int]) -> str:
    """The changes as Markdown for the run's page; `nights`: how many artifacts were there before and are now."""
    lines = [
        f"## {len(changes.new)} new, {len(changes.known)} known, {len(changes.fixed)} fixed",
        "",
        f"{nights[1]} results of this night against {nights[0]} of the one before.",
    ]
    for title, rows in (("New", changes.new), ("Known", changes.known), ("Fixed", changes.fixed)):
        if rows:
            lines += ["", f"### {title}", ""]
            lines += [f"- {code(artifact)}: {code(name)}" for artifact, name in rows[:200]]
            lines += [f"- and {len(rows) - 200} more"] if len(rows) > 200 else []
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = argparse.ArgumentParser(prog="nox -s changes --", description="New and known failures of two runs.")
    options.add_argument("before", type=Path, help="artifacts of the earlier run; may be absent")
    options.add_argument("after", type=Path, help="artifacts of this run")
    options.add_argument("--out", type=Path, default=Path("changes.md"), help="where the page goes")
    args = options.parse_args(arguments)
    before, after = failures(args.before), failures(args.after)
    changes = compare(before, after)
    args.out.write_text(page(changes, (len(before), len(after))), encoding="utf-8")
    print(args.out.read_text(encoding="utf-8"), end="")
    if not after:
        print(f"changes: no result in {args.after}", file=sys.stderr)
        return outcome.CONTRACT
    return outcome.TEST_FAILED if changes.new else outcome.READY


if __name__ == "__main__":
    sys.exit(main())
