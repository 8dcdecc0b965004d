"""summary.md: the verdict, why, and what to type next. Made for a CI step summary and a pull request comment."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ci import evidence as ev
from ci.bundle import bundle_name
from ci.outcome import RunResult, StepOutcome

MAX_BYTES = 900 * 1024  # GitHub drops a step summary above 1 MiB whole
MAX_CELL = 300
MAX_CHECKPOINTS = 50
MARKS = {
    "PASSED": "✅",
    "SKIPPED": "⚪",
    "FAILED": "❌",
    "VACUOUS": "❌",
    "MISSING": "❌",
    "TIMEOUT": "❌",
    "INFRA": "🔌",
}
FINE = ("PASSED", "SKIPPED")


def verdict_line(result: RunResult) -> str:
    """READY, READY ON CPU or NOT READY, in one line with what stands against it."""
    failing = [step for step in result.steps if step.verdict not in FINE]
    parts = [result.verdict if result.exit_code == 0 else f"{result.verdict} (exit code {result.exit_code})"]
    if failing:
        parts.append("Failing: " + ", ".join(step.id for step in failing))
    if result.not_proven:
        parts.append("Not proven: " + "; ".join(split_reason(line)[0] for line in result.not_proven))
    elif result.verdict != "NOT READY":
        parts.append("Every step of this profile was proven")
    return plain(". ".join(parts) + ".", 4000)


def render_markdown(result: RunResult, artifacts: Path) -> str:
    """The summary as Markdown, below 900 KiB whatever the steps printed. Reads artifacts/; a bad file is reported."""
    evidence = ev.collect(artifacts)
    sections = [
        [verdict_line(result)],
        _about(result),
        _failures(result),
        _figures(result, evidence),
        _decode(evidence),
        _steps(result),
        _not_proven(result),
        _checkpoints(evidence),
        _problems(evidence),
        _environment(result),
        _bundle(result),
    ]
    return _capped("\n\n".join("\n".join(lines) for lines in sections if lines) + "\n")


def plain(text: str, limit: int = MAX_CELL) -> str:
    """One line of hostile text, as it may stand in a Markdown table: no markup, no mention, no line break."""
    text = " ".join(text.split())
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    for char, safe in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("[", "\\["), ("@", "&#64;")):
        text = text.replace(char, safe)
    return text.replace("`", "'")


def split_reason(line: str) -> tuple[str, str]:
    """A line of `not_proven` as (what, why)."""
    what, _, reason = line.partition(": ")
    return what, reason


def why(step: StepOutcome) -> str:
    """The reason, or for a step that passed with skips, the first skip reasons."""
    if step.reason:
        return step.reason
    return "; ".join(step.skip_reasons[:3]) + (" ..." if len(step.skip_reasons) > 3 else "")


def counts(result: RunResult) -> tuple[int, int, int]:
    """Tests passed, failed, skipped over all steps."""
    return (
        sum(step.passed for step in result.steps),
        sum(step.failed for step in result.steps),
        sum(step.skipped for step in result.steps),
    )


def _about(result: RunResult) -> list[str]:
    state = " with uncommitted changes" if result.dirty else ""
    passed, failed, skipped = counts(result)
    return [
        f"Commit `{plain(result.git_sha[:12])}`{state}, profile `{plain(result.profile)}`, "
        f"run `{plain(result.run_id)}`, {ev.duration(result.wall_s)}.",
        f"Tests: {passed} passed, {failed} failed, {skipped} skipped.",
    ]


def _failures(result: RunResult) -> list[str]:
    failing = [step for step in result.steps if step.verdict not in FINE]
    if not failing:
        return []
    lines = ["## What failed, and the command that reproduces it"]
    for step in failing:
        code = "not started" if step.exit_code is None else f"exit code {step.exit_code}"
        lines += ["", f"**{plain(step.id)}** {step.verdict.lower()}, {code}: {plain(step.reason or 'no reason given')}"]
        lines += ["", *_fenced(step.reproduce or step.command)]
    return lines


def _fenced(command: str) -> list[str]:
    fence = "```"
    while fence in command:
        fence += "`"
    return [f"{fence}sh", command[:4000], fence]


def _figures(result: RunResult, evidence: ev.Evidence) -> list[str]:
    rows = [(figure.label, figure.value, figure.note) for figure in ev.headlines(evidence, result)[1:]]
    return ["## Figures", "", *_table(("figure", "value", "note"), rows)]


def _decode(evidence: ev.Evidence) -> list[str]:
    lines = ["### Decode, one token on a cache of S", ""]
    if not evidence.decode.value:
        return [*lines, f"{evidence.decode.path}: {plain(evidence.decode.problem)}"]
    columns = ("S", "ms_total", "ms_cmp", "ms_sel", "ms_win", "ms_dense", "speedup")
    reads = ("reads_actual_decode", "reads_expected_decode")
    shown = [name for name in columns + reads if name in evidence.decode.value[0]]
    rows = [[ev.num(row[name]) for name in shown] for row in evidence.decode.value]
    return [*lines, *_table(shown, rows)]


def _steps(result: RunResult) -> list[str]:
    rows = []
    for step in result.steps:
        peak = "" if step.peak_mb is None else f"{step.peak_mb:,.0f}"
        tests = [step.passed, step.failed, step.skipped]
        verdict = f"{MARKS.get(step.verdict, '')} {step.verdict}"
        rows.append((step.stage, step.id, verdict, *map(str, tests), f"{step.wall_s:.1f}", peak, why(step)))
    head = ("stage", "step", "verdict", "passed", "failed", "skipped", "wall s", "peak MB", "why")
    return ["## Steps", "", *_table(head, rows)]


def _not_proven(result: RunResult) -> list[str]:
    if not result.not_proven:
        return []
    return ["## Not proven here", "", *(f"- {plain(line, 1000)}" for line in result.not_proven)]


def _checkpoints(evidence: ev.Evidence) -> list[str]:
    found = [checkpoint for run in evidence.runs for checkpoint in run.checkpoints]
    lines = ["## Checkpoints", ""]
    if not found:
        return [*lines, "none written"]
    lines += [f"- `{plain(item.path)}` ({ev.size(item.size)})" for item in found[:MAX_CHECKPOINTS]]
    if len(found) > MAX_CHECKPOINTS:
        lines.append(f"- and {len(found) - MAX_CHECKPOINTS} more")
    return lines


def _problems(evidence: ev.Evidence) -> list[str]:
    problems = evidence.problems()
    return ["## Files that could not be read", "", *(f"- {plain(line)}" for line in problems)] if problems else []


def _environment(result: RunResult) -> list[str]:
    return ["## Environment", "", *_table(("", ""), ev.machine(result))]


def _bundle(result: RunResult) -> list[str]:
    name = bundle_name(result)
    return ["## Bundle", "", f"`{name}`; check it anywhere with `python -m ci bundle verify {name}`."]


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return lines + ["| " + " | ".join(plain(cell) for cell in row) + " |" for row in rows]


def _capped(text: str) -> str:
    note = "\n\n(cut at 900 KiB; summary.html has the rest)\n"
    if len(text.encode()) <= MAX_BYTES:
        return text
    kept = text.encode()[: MAX_BYTES - len(note.encode())].decode(errors="ignore")
    return kept[: kept.rfind("\n")] + note
