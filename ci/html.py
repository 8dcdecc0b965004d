"""summary.html: the verdict and its evidence on one page that opens offline, on a phone and on paper."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from ci import evidence as ev
from ci import plots
from ci.bundle import bundle_name
from ci.outcome import RunResult, StepOutcome
from ci.runbook import Runbook
from ci.summary import FINE, counts, split_reason, why

TEMPLATES = Path(__file__).with_name("templates")
TONES = {"READY": "good", "READY ON CPU": "part", "NOT READY": "bad"}
MAX_TEXT = 2000  # of one cell: a page, not a log


@dataclass(frozen=True)
class Plot:
    """An SVG with the sentence that says what it shows."""

    title: str
    svg: Markup
    says: str
    good: bool = True


@dataclass(frozen=True)
class StageView:
    """The steps of one stage, in their order."""

    id: str
    title: str
    steps: list[StepOutcome] = field(default_factory=list)


def render_html(result: RunResult, artifacts: Path, book: Runbook | None = None) -> str:
    """The page as text. Reads artifacts/; a file that cannot be read is named on the page. `book` names the stages."""
    evidence = ev.collect(artifacts)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": ev.duration, "bytes": ev.size, "clip": _clip, "why": why}
    passed, failed, skipped = counts(result)
    return environment.get_template("report.html.j2").render(
        result=result,
        tone=TONES[result.verdict],
        lead=_lead(result),
        failing=[step for step in result.steps if step.verdict not in FINE],
        passed=passed,
        failed=failed,
        skipped=skipped,
        figures=ev.headlines(evidence, result)[1:],
        stages=_stages(result, book),
        plots=_plots(evidence),
        kernels=evidence.kernels,
        kernel_groups=ev.kernel_groups(evidence.kernels.value or []),
        kernel_columns=_columns(evidence.kernels.value or []),
        kernel_figure=ev.headlines(evidence, result)[-1],
        checkpoints=[checkpoint for run in evidence.runs for checkpoint in run.checkpoints],
        problems=evidence.problems(),
        machine=ev.machine(result),
        env=list(ev.flatten(result.env)),
        when=_when(result.started),
        bundle=bundle_name(result),
        unproven=[split_reason(line) for line in result.not_proven],
    )


def _lead(result: RunResult) -> str:
    """What the verdict means for the reader, in a sentence."""
    failing = sum(step.verdict not in FINE for step in result.steps)
    if result.verdict == "NOT READY":
        if failing:
            return f"Training should not start: {failing} of {len(result.steps)} steps did not hold."
        return f"Training should not start: the run ended with exit code {result.exit_code}."
    if result.verdict == "READY ON CPU":
        return "All that a CPU can prove holds on this commit. The list below needs a GPU before training starts there."
    return "Training may start: every step this machine was asked to prove holds on this commit."


def _stages(result: RunResult, book: Runbook | None) -> list[StageView]:
    titles = {stage.id: f"{stage.number}  {stage.title}" for stage in book.stages} if book else {}
    stages: dict[str, StageView] = {}
    for step in result.steps:
        stages.setdefault(step.stage, StageView(step.stage, titles.get(step.stage, step.stage))).steps.append(step)
    return list(stages.values())


def _plots(evidence: ev.Evidence) -> list[Plot]:
    drawn = [_loss_plot(run) for run in evidence.runs if run.rows.value]
    rows = evidence.decode.value
    if rows:
        drawn += [_decode_plot(rows), _reads_plot(rows)]
    if evidence.needle.value:
        cells = evidence.needle.value
        found = sum(bool(cell.get("passed", cell["score"] >= 0.5)) for cell in cells)
        says = f"The needle is found at {found} of {len(cells)} lengths and depths."
        drawn.append(Plot("Needle in a haystack", Markup(plots.needle(cells)), says, found == len(cells)))
    return drawn


def _loss_plot(run: ev.TrainRun) -> Plot:
    rows, val = run.rows.value or [], run.val.value or []
    first, last = rows[0]["loss"], rows[-1]["loss"]
    verb = "falls" if last < first else "does not fall"
    says = f"Loss {verb}: {ev.num(first, 4)} to {ev.num(last, 4)} in {ev.num(rows[-1]['step'])} steps"
    says += f", {ev.num(val[-1]['val_loss'], 4)} on held-out text." if val else "."
    name = "Training" if run.name == ev.SHOWCASE else f"Training, {run.name}"
    return Plot(name, Markup(plots.loss(rows, val, run.name)), says, last < first)


def _decode_plot(rows: list[ev.Row]) -> Plot:
    first, last = rows[0], rows[-1]
    growth = last["ms_total"] / first["ms_total"] if first["ms_total"] else 0.0
    says = f"From {ev.num(first['S'])} to {ev.num(last['S'])} tokens NSA takes {ev.num(growth, 2)}x the time"
    if first.get("ms_dense") and last.get("ms_dense"):
        says += f", dense {ev.num(last['ms_dense'] / first['ms_dense'], 2)}x; at the end it is {ev.against_dense(last)}"
    return Plot("Decode, one token", Markup(plots.decode_time(rows)), says + ".")


def _reads_plot(rows: list[ev.Row]) -> Plot:
    wrong = [row for row in rows if row["reads_actual"] != row["reads_expected"]]
    wrong += [row for row in rows if row.get("reads_actual_decode") != row.get("reads_expected_decode")]
    if wrong:
        says = f"Counted reads differ from the expected ones at S = {ev.num(wrong[0]['S'])}."
    else:
        says = f"Counted reads (dots) equal the expected ones (line) at all {len(rows)} lengths."
    return Plot("Reads, one token", Markup(plots.reads(rows)), says, not wrong)


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    """Names of the scalar fields, in the order in which they first appear."""
    names = [name for row in rows for name, value in row.items() if not isinstance(value, (dict, list))]
    return list(dict.fromkeys(names))


def _when(started: float) -> str:
    return datetime.fromtimestamp(started, tz=timezone.utc).strftime("%Y-%m-%d %H:%M UTC") if started else ""


def _clip(text: str, limit: int = MAX_TEXT) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
