"""The verdict, from what was executed: a skip is not a pass, and an exit code alone proves nothing.

Pure functions over (runbook, profile, the files under artifacts/): the bundle's verification calls the same ones.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

from ci import junit, outcome
from ci.outcome import Readiness, RunResult, StepOutcome, StepRecord, Verdict
from ci.runbook import Assertion, Deliverable, Runbook, Step

CODES: dict[Verdict, int] = {
    "PASSED": outcome.READY,
    "SKIPPED": outcome.READY,
    "FAILED": outcome.TEST_FAILED,
    "VACUOUS": outcome.CONTRACT,
    "MISSING": outcome.CONTRACT,
    "TIMEOUT": outcome.TIMED_OUT,
    "INFRA": outcome.INFRASTRUCTURE,
}
# The code of a run with several failures. 75 invites a retry, so it comes last: only when nothing else failed.
SEVERITY = (outcome.TEST_FAILED, outcome.CONTRACT, outcome.TIMED_OUT, outcome.PERFORMANCE, outcome.INFRASTRUCTURE)

# File systems stamp with a clock that ticks every few milliseconds.
CLOCK_SLACK_S = 0.05


def local(artifacts: Path, path: str) -> Path:
    """Where a runbook path (`artifacts/bench/decode.csv`) lies under this artifacts folder."""
    return artifacts / Path(path).relative_to("artifacts")


def judge(book: Runbook, profile: str, artifacts: Path) -> RunResult:
    """The whole run's judgement from the raw records in `artifacts` (env.json gives commit and environment)."""
    env = _json(artifacts / "env.json")
    steps, records = [], []
    for step in book.steps:
        record, problem = _record(step, profile, artifacts, env.get("git_sha", "unknown"))
        steps.append(judge_step(step, profile, record, artifacts, problem))
        if record:
            records.append(record)
    code = exit_code(steps)
    verdict: Readiness = "NOT READY" if code else "READY ON CPU" if profile == "cpu" else "READY"
    started = min((r.started for r in records), default=0.0)
    return RunResult(
        profile=profile,
        verdict=verdict,
        exit_code=code,
        not_proven=not_proven(steps),
        steps=steps,
        env=env,
        started=started,
        wall_s=max((r.started + r.wall_s for r in records), default=started) - started,
        run_id=max(records, key=lambda r: r.started).run_id if records else "none",
        git_sha=env.get("git_sha", "unknown"),
        dirty=bool(env.get("dirty", False)),
    )


def exit_code(steps: list[StepOutcome]) -> int:
    """The one code for several steps; the order is SEVERITY."""
    codes = {CODES[step.verdict] for step in steps}
    return next((code for code in SEVERITY if code in codes), outcome.READY)


def not_proven(steps: list[StepOutcome]) -> list[str]:
    """What a good verdict leaves open: steps and tests that were allowed to skip, a line each with the reason."""
    lines = []
    for step in steps:
        if step.verdict == "SKIPPED":
            lines.append(f"{step.title}: {step.reason}")
        elif step.verdict == "PASSED" and step.skipped:
            lines.append(f"{step.title}, {step.skipped} of its tests: {'; '.join(step.skip_reasons)}")
    return lines


def judge_step(step: Step, profile: str, record: StepRecord | None, artifacts: Path, problem: str = "") -> StepOutcome:
    """One step's outcome. `problem` says why there is no record; the first thing wrong decides."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    reasons: list[str] = []
    verdict: Verdict
    if record is None:
        verdict, reason = "MISSING", problem
    elif record.exit_code is None:
        verdict, reason = _not_started(step, profile, record)
    elif step.expected(profile) == "forbid":
        verdict, reason = "VACUOUS", f"ran, and profile {profile} forbids it"
    elif step.kind == "pytest":
        verdict, reason, counts, reasons = _judge_pytest(step, profile, record, artifacts)
    else:
        verdict, reason = _judge_exit(record)
        counts["passed" if verdict == "PASSED" else "failed"] = 1
    if record is not None and verdict in ("PASSED", "SKIPPED") and record.exit_code is not None:
        late_verdict, late_reason = _judge_files(step, profile, record, artifacts, check=verdict == "PASSED")
        if late_verdict != "PASSED":
            verdict, reason = late_verdict, late_reason
            if step.kind == "script":
                counts = {"passed": 0, "failed": 1, "skipped": 0}
    if verdict == "SKIPPED" and not counts["skipped"]:
        counts["skipped"], reasons = 1, [reason]
    return StepOutcome(
        id=step.id,
        stage=step.stage,
        command=step.command,
        kind=step.kind,
        expected=step.expected(profile),
        verdict=verdict,
        reason=reason,
        exit_code=record.exit_code if record else None,
        skip_reasons=reasons,
        wall_s=record.wall_s if record else 0.0,
        peak_mb=record.peak_mb if record else None,
        started=record.started if record else 0.0,
        deliverables=[f.path for f in record.files] if record else [],
        reproduce=reproduce(step),
        title=step.title,
        **counts,
    )


def reproduce(step: Step) -> str:
    """The command to type in the root of the repository."""
    return " ".join([*(f"{name}={value}" for name, value in step.env.items()), step.command.lstrip()])


def _record(step: Step, profile: str, artifacts: Path, git_sha: str) -> tuple[StepRecord | None, str]:
    path = artifacts / "results" / f"{step.key}.json"
    if not path.is_file():
        return None, f"not run; run: nox -s {step.stage}"
    try:
        record = outcome.load_record(path)
    except outcome.OutcomeError as error:
        return None, str(error)
    for name, have, want in (
        ("profile", record.profile, profile),
        ("commit", record.git_sha, git_sha),
        ("command", record.command, step.command),
    ):
        if have != want:
            return None, f"recorded for {name} {have!r}, not {want!r}; run: nox -s {step.stage}"
    return record, ""


def _not_started(step: Step, profile: str, record: StepRecord) -> tuple[Verdict, str]:
    expected = step.expected(profile)
    if expected == "forbid" or (expected == "skip_ok" and _is_allowed(step, profile, record.note)):
        return "SKIPPED", record.note
    return "VACUOUS", f"not started: {record.note}"


def _judge_exit(record: StepRecord) -> tuple[Verdict, str]:
    if record.timed_out:
        return "TIMEOUT", f"still running after {record.wall_s:.0f} s"
    if record.exit_code == 137 and record.oom_killed:
        return "INFRA", "killed for memory (the kernel recorded an out-of-memory kill)"
    if record.exit_code == 137:
        return "FAILED", "killed by signal 9, and no out-of-memory kill was recorded"
    if record.exit_code:
        return "FAILED", f"exit code {record.exit_code}"
    return "PASSED", ""


def _judge_pytest(
    step: Step, profile: str, record: StepRecord, artifacts: Path
) -> tuple[Verdict, str, dict[str, int], list[str]]:
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    verdict, reason = _judge_exit(record)
    if verdict in ("TIMEOUT", "INFRA") or record.exit_code == 137:
        return verdict, reason, counts, []
    if record.exit_code == 4:
        return "FAILED", "pytest could not start (exit code 4): a file or option of the command is wrong", counts, []
    try:
        cases = junit.read(artifacts / "junit" / f"{step.key}.xml")
    except junit.JUnitError as error:
        return "MISSING", str(error), counts, []
    for case in cases:
        counts[case.state] += case.state != "passed" or _is_covered(step, case.name)
    reasons = sorted({case.reason for case in cases if case.state == "skipped"})
    if counts["failed"]:
        first = next(case for case in cases if case.state == "failed")
        reason = f"{counts['failed']} of {len(cases)} tests failed, first {first.name}: {_first_line(first.reason)}"
        return "FAILED", reason, counts, reasons
    if not cases:
        return "VACUOUS", "no test was collected", counts, reasons
    if bad := [r for r in reasons if not _is_allowed(step, profile, r)]:
        return "VACUOUS", f"a skip that profile {profile} does not allow here: {bad[0]}", counts, reasons
    if verdict != "PASSED":
        return verdict, reason, counts, reasons
    if record.arguments:
        given = f"ran with {shlex.join(record.arguments)}, which may leave tests out; run: nox -s {step.stage}"
        return "VACUOUS", given, counts, reasons
    passed = [case.name for case in cases if case.state == "passed"]
    if counts["passed"]:
        lost = [pattern for pattern in step.covers if not any(re.search(pattern, name) for name in passed)]
        return (
            ("VACUOUS", f"no test passed that matches {lost[0]}", counts, reasons)
            if lost
            else ("PASSED", "", counts, reasons)
        )
    if step.expected(profile) == "skip_ok" and counts["skipped"]:
        return "SKIPPED", "; ".join(reasons), counts, reasons
    why = (
        f"all {counts['skipped']} tests skipped: {'; '.join(reasons)}" if reasons else "only namesakes of its tests ran"
    )
    return "VACUOUS", why, counts, reasons


def _is_covered(step: Step, name: str) -> bool:
    return not step.covers or any(re.search(pattern, name) for pattern in step.covers)


def _is_allowed(step: Step, profile: str, reason: str) -> bool:
    return any(re.search(pattern, reason) for pattern in step.allowed(profile))


def _judge_files(step: Step, profile: str, record: StepRecord, artifacts: Path, *, check: bool) -> tuple[Verdict, str]:
    """Deliverables first, then what is claimed about them; `check` is false for a step whose tests all skipped."""
    for item in step.deliverables:
        if problem := _deliverable_problem(item, record, artifacts):
            return "MISSING", problem
    for claim in step.assertions if check else ():
        if claim.profiles and profile not in claim.profiles:
            continue
        if problem := _claim_problem(claim, local(artifacts, claim.file)):
            return "FAILED", problem
    return "PASSED", ""


def _deliverable_problem(item: Deliverable, record: StepRecord, artifacts: Path) -> str:
    found = next((f for f in record.files if f.path == item.path), None)
    if found is None:
        return "" if item.optional else f"{item.path} was not written"
    if found.mtime < record.started - CLOCK_SLACK_S:
        return "" if item.optional else f"{item.path} is older than the step: a leftover, not written by it"
    if not found.size:
        return f"{item.path} is empty"
    if item.listed:
        return ""
    path = local(artifacts, item.path)
    if not path.is_file():
        return f"{item.path} was written and is gone"
    if digest(path) != found.sha256:
        return f"{item.path} was changed after its step"
    if item.header:
        with path.open(errors="replace") as file:
            first = file.readline().rstrip("\r\n")
        if first != item.header and not first.startswith(item.header + ","):
            return f"{item.path} has the header {first[:80]!r}, not {item.header!r}"
    return ""


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    value = hashlib.sha256()
    while block := file.read(1 << 20):
        value.update(block)
    return value.hexdigest()


def _claim_problem(claim: Assertion, path: Path) -> str:
    text = path.read_text(errors="replace")
    if claim.regex:
        return "" if re.search(claim.regex, text) else f"{claim.file} does not match {claim.regex!r}"
    if claim.json:
        return _json_problem(claim, text)
    rows = list(csv.DictReader(text.splitlines()))
    try:
        return _column_problem(claim, rows)
    except (KeyError, ValueError, TypeError) as error:
        return f"{claim.file}: column {claim.column} is unreadable ({error!r})"


def _column_problem(claim: Assertion, rows: list[dict[str, str]]) -> str:
    values = [float(row[claim.column]) for row in rows]
    if claim.same_as:
        for row in rows:
            if float(row[claim.column]) != float(row[claim.same_as]):
                return f"{claim.file}: {claim.column} {row[claim.column]} is not {claim.same_as} {row[claim.same_as]}"
        return "" if rows else f"{claim.file} has no rows"
    quarter = len(values) // 4
    if not quarter:
        return f"{claim.file} has {len(values)} rows, too few to see {claim.column} fall"
    first, last = sum(values[:quarter]) / quarter, sum(values[-quarter:]) / quarter
    if last < claim.falls * first:
        return ""
    return (
        f"{claim.file}: {claim.column} does not fall, {first:.4g} to {last:.4g} (below {claim.falls:g} of it is asked)"
    )


def _json_problem(claim: Assertion, text: str) -> str:
    try:
        value: Any = json.loads(text)
        for key in claim.json.split("."):
            value = value[key]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        return f"{claim.file} has no {claim.json} ({error!r})"
    wanted = claim.within or (claim.equals,)
    shown = "null" if value is None else value
    if any(shown == want and type(shown) is type(want) for want in wanted):
        return ""
    return f"{claim.file}: {claim.json} is {shown!r}, not {' or '.join(map(repr, wanted))}"


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return {}  # every record then names a commit that is not "unknown": the run counts as missing
    return data if isinstance(data, dict) else {}


def _first_line(text: str) -> str:
    return text.splitlines()[0][:200] if text else ""
