"""One session from start to exit.json: preflight, steps, verdict, report."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ci import contract, execute, facts, junit, outcome, preflight
from ci.outcome import RunResult, StepOutcome, StepRecord
from ci.runbook import SOURCE, Runbook, Step

MEANING = {
    0: "ready",
    1: "a test or an assertion failed",
    2: "usage",
    3: "contract: vacuous, or a deliverable is missing",
    4: "performance",
    75: "infrastructure: worth one retry",
    78: "configuration",
    124: "timeout",
    130: "interrupted",
    143: "terminated",
}


@dataclass
class Session:
    """`wanted` is the profile asked for, or empty for the one that fits. `say` prints progress."""

    book: Runbook
    root: Path
    wanted: str = ""
    posargs: list[str] = field(default_factory=list)
    offline: bool = False
    run_id: str = ""
    say: Callable[[str], None] = print

    def __post_init__(self) -> None:
        self.run_id = self.run_id or time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        self.facts: dict[str, Any] = {}
        self.profile = ""

    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"

    def preflight(self) -> int:
        """Writes env.json and preflight.json, prints what is wrong; the exit code a failed check stands for, or 0."""
        self.facts = facts.gather(self.root, offline=self.offline)
        profile = preflight.choose(self.book, self.wanted, self.facts)
        self.profile = profile.id
        if profile.gpus and self.facts["torch"].get("cuda"):
            self.facts["selftest"] = facts.probe("selftest.py")
            if 1 < profile.gpus <= len(self.facts["torch"].get("devices", [])):
                self.facts["all_reduce"] = facts.probe("allreduce.py", str(profile.gpus))
        self.facts |= {"profile": profile.id, "runbook_sha256": self.book.sha256}
        findings = preflight.check(profile, self.facts, self.artifacts)
        code = preflight.code(findings)
        if not any(each.name == "artifacts" and each.status == "fail" for each in findings):
            _write(self.artifacts / "env.json", self.facts)
            _write(self.artifacts / "preflight.json", preflight.as_json(profile, findings))
        self.say(f"preflight: profile {profile.id} ({profile.title}), {self._machine()}")
        for each in findings:
            if each.status != "ok":
                self.say(f"  {each.status}: {each.name}: {each.detail}")
        if self.book.path.resolve() != SOURCE.resolve():
            self.say(f"  note: judged by {self.book.path.name} (--steps, NSA_CI_STEPS), not by this checkout's runbook")
        if dropped := execute.foreign_flags():
            self.say(f"  note: not handed to the steps: {', '.join(dropped)}")
        return code

    def _machine(self) -> str:
        names = [gpu["name"] for gpu in self.facts["torch"].get("devices", [])]
        versions = self.facts["versions"]
        return (
            f"{' + '.join(names) or 'no GPU'}, {self.facts['cores']} cores, Python {self.facts['python']}, "
            f"torch {versions.get('torch', 'absent')}, triton {versions.get('triton', 'absent')}"
        )

    def run_stage(self, stage: str) -> list[StepOutcome]:
        """Runs a stage's steps in their order and judges each as it ends."""
        title = next(s for s in self.book.stages if s.id == stage)
        self.say(f"stage {title.number} {stage}: {title.title}")
        return [self._run_step(step) for step in self.book.of_stage(stage)]

    def _run_step(self, step: Step) -> StepOutcome:
        context = execute.Context(
            self.root, self.profile, self.facts["git_sha"], self.run_id, self.posargs, self.say, self.offline
        )
        if step.expected(self.profile) == "forbid":
            reasons = [reason for need in step.needs if (reason := preflight.unmet(need, self.facts))]
            note = reasons[0] if reasons else f"not part of profile {self.profile}"
            record = execute.skip(step, context, note)
        elif reasons := [reason for need in step.needs if (reason := preflight.unmet(need, self.facts))]:
            record = execute.skip(step, context, reasons[0])
        else:
            record = execute.run(step, context)
        judged = contract.judge_step(step, self.profile, record, self.artifacts)
        self.say(_line(judged, record))
        if judged.verdict not in ("PASSED", "SKIPPED"):
            for line in record.tail:
                self.say(f"      {line}")
            self.say(f"    reproduce: {judged.reproduce}")
        return judged

    def report(self, name: str = "report") -> RunResult:
        """Judges everything recorded, writes result.json, junit.xml, summary.md, summary.html and the bundle."""
        result = contract.judge(self.book, self.profile or self._recorded_profile(), self.artifacts)
        junit.merge(result.steps, self.artifacts / "junit", self.artifacts / "junit.xml", _properties(result))
        self._write_reports(result, name)
        from ci import bundle

        try:
            packed = bundle.build(self.artifacts, result, self.root / "dist", runbook=self.book.path)
        except bundle.BundleError as error:
            lost = [*result.not_proven, f"no bundle: {error}"]
            code = result.exit_code or outcome.CONTRACT
            result = replace(result, verdict="NOT READY", exit_code=code, not_proven=lost)
            self._write_reports(result, name)
            packed = None
        self.say((self.artifacts / "summary.md").read_text().rstrip())
        self.say(f"\nreport: artifacts/summary.html\nbundle: {packed.relative_to(self.root) if packed else 'none'}")
        return result

    def _write_reports(self, result: RunResult, name: str) -> None:
        from ci import html, summary  # late: preflight and the stages run without a plotting library

        outcome.save(result, self.artifacts / "result.json")
        self.finish(name, result.exit_code, result.verdict)
        (self.artifacts / "summary.md").write_text(summary.render_markdown(result, self.artifacts))
        (self.artifacts / "summary.html").write_text(html.render_html(result, self.artifacts, self.book))

    def _recorded_profile(self) -> str:
        path = self.artifacts / "env.json"
        try:
            return str(json.loads(path.read_text())["profile"])
        except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise outcome.OutcomeError("nothing has run here yet; run: ci/nox -s readiness") from error

    def close_stage(self, stage: str, steps: list[StepOutcome]) -> int:
        """exit.json and the closing line of a stage; the whole run's verdict is the report's to give."""
        code = contract.exit_code(steps)
        if skipped := [step.id for step in steps if step.verdict == "SKIPPED"]:
            why = "no GPU" if self.profile == "cpu" else "not possible here"
            self.say(f"SKIPPED: {why}, proves nothing: {', '.join(skipped)}")
        self.say(f"{stage}: exit code {code} ({MEANING[code]})")
        return self.finish(stage, code, "ok" if code == 0 else "failed")

    def start_afresh(self) -> None:
        """Removes what an earlier run recorded, so that a readiness run is judged by itself alone."""
        for name in ("results", "junit", "logs"):
            shutil.rmtree(self.artifacts / name, ignore_errors=True)

    def finish(self, session: str, code: int, verdict: str = "") -> int:
        """Writes exit.json, which `ci/nox`, workflows and containers read since nox itself returns 0 or 1."""
        facts_ = {"code": code, "meaning": MEANING[code], "session": session, "profile": self.profile}
        facts_ |= {"verdict": verdict, "run_id": self.run_id, "git_sha": self.facts.get("git_sha", "unknown")}
        try:
            _write(self.artifacts / "exit.json", facts_)
        except OSError:
            self.say("exit.json cannot be written: artifacts/ is not writable")
        return code


def clear_exit(root: Path) -> None:
    """An exit.json always belongs to the session that was started last."""
    with suppress(NotADirectoryError):  # preflight names that
        (root / "artifacts" / "exit.json").unlink(missing_ok=True)


def leave_exit(root: Path, session: str, code: int, **more: str) -> int:
    """exit.json of a session that judges no steps itself; returns the code."""
    written = {"code": code, "meaning": MEANING.get(code, ""), "session": session, **more}
    try:
        _write(root / "artifacts/exit.json", written)
    except OSError:
        print("exit.json cannot be written: artifacts/ is not writable")
    return code


def publish(root: Path) -> str:
    """Copies artifacts/ and the bundles to NSA_CI_ARTIFACTS, where that is a folder of its own (a container's mount).

    The runbook's commands write to artifacts/ literally, so the folder itself cannot be another one. Returns what went
    wrong, or an empty string.
    """
    named = os.environ.get("NSA_CI_ARTIFACTS", "")
    target = Path(root, named)
    if not named or target.resolve() == (root / "artifacts").resolve():
        return ""
    try:
        target.mkdir(parents=True, exist_ok=True)
        for each in (root / "artifacts").iterdir():  # a mount's own folder may be writable without being this user's
            if each.is_dir():
                shutil.copytree(each, target / each.name, dirs_exist_ok=True)
            else:
                shutil.copy2(each, target)
        for packed in sorted((root / "dist").glob("nsa-readiness-*.tar.gz")):
            shutil.copy2(packed, target)
    except (OSError, shutil.Error) as error:
        return f"NSA_CI_ARTIFACTS={named} cannot be written ({error}); name a writable folder"
    return ""


def offline() -> bool:
    """NSA_CI_OFFLINE=1: no step may fetch anything."""
    return os.environ.get("NSA_CI_OFFLINE", "") not in ("", "0")


def _line(judged: StepOutcome, record: StepRecord) -> str:
    counts = f"{judged.passed} passed, {judged.failed} failed, {judged.skipped} skipped"
    memory = f", cpu {record.cpu_s:.0f} s, {judged.peak_mb:.0f} MB" if judged.peak_mb else ""
    reason = f": {judged.reason}" if judged.reason else ""
    return f"  {judged.verdict:8} {judged.id} ({counts}, {judged.wall_s:.1f} s{memory}){reason}"


def _properties(result: RunResult) -> dict[str, str]:
    versions = result.env.get("versions", {})
    gpus = ", ".join(gpu["name"] for gpu in result.env.get("gpus", [])) or "none"
    return {
        "profile": result.profile,
        "gpu": gpus,
        "torch": versions.get("torch", "absent"),
        "triton": versions.get("triton", "absent"),
        "python": result.env.get("python", "unknown"),
        "git_sha": result.git_sha,
    }


def _write(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")
