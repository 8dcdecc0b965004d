"""Runs a workflow's jobs on this machine: the `run:` steps as GitHub runs them, in this tree, one job after another.

So `.ci/run` and the pull request execute the same lines. Of a matrix one entry is run, the one for this Python. `uses:`
steps have stand-ins (ACTIONS): checkout is this tree, an upload checks that its files are there and that its name is
free; any other is passed over, and that is said. What cannot be evaluated here is refused before anything runs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from glob import glob
from itertools import product
from pathlib import Path
from typing import Any

from ci import expressions
from ci.expressions import ExpressionError, Open
from ci.workflow import WorkflowError, load, needs_of, ordered, texts

BASH = ("bash", "--noprofile", "--norc", "-eo", "pipefail")  # GitHub's `shell: bash`
SUMMARY_LIMIT = 1024 * 1024  # GitHub drops a larger step summary whole
JOB_KEYS = {"name", "runs-on", "timeout-minutes", "permissions", "strategy", "needs", "if", "env", "defaults", "steps"}
STEP_KEYS = {"name", "id", "if", "run", "uses", "with", "env", "shell", "working-directory", "timeout-minutes"}
GRACE_S = 70.0  # ci/nox waits a minute for the harness under it
PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"
Say = Callable[[str], None]


@dataclass
class StepResult:
    """`outcome` is success | failure | skipped | cancelled; `detail` says why it is not success."""

    name: str
    outcome: str
    seconds: float = 0.0
    detail: str = ""
    outputs: dict[str, str] = field(default_factory=dict)


@dataclass
class JobResult:
    id: str
    name: str
    result: str
    steps: list[StepResult] = field(default_factory=list)
    detail: str = ""

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in self.steps)


def run(
    path: Path, root: Path, *, jobs: list[str], choices: dict[str, str], say: Say, without: dict[str, str] | None = None
) -> list[JobResult]:
    """Runs the named jobs (all, if none is named) in the order of their needs. Raises WorkflowError before any runs.

    `without` names jobs that this machine cannot run, and why: they are reported as skipped, and no other job waits for
    them. A job that is merely not named is skipped for those that need it, too.
    """
    return _Workflow(path, load(path), root, choices, say, without or {}).run(jobs)


def check(path: Path, root: Path, **choices: str) -> list[str]:
    """The jobs in the order they would run; WorkflowError if one could not be run here. Runs nothing."""
    return list(_Workflow(path, load(path), root, choices, print, {}).plan([]))


class _Workflow:
    def __init__(
        self, path: Path, data: dict[str, Any], root: Path, choices: dict[str, str], say: Say, without: dict[str, str]
    ) -> None:
        self.path, self.data, self.root, self.choices, self.say = path, data, root, choices, say
        self.without = without
        self.done: dict[str, JobResult] = {}
        self.artifacts: set[str] = set()
        self.github: dict[str, Any] = {
            "event": Open(),
            "event_name": "push",
            "head_ref": "",
            "job": "",
            "ref": _git(root, "rev-parse", "--symbolic-full-name", "HEAD"),
            "ref_name": _git(root, "rev-parse", "--abbrev-ref", "HEAD"),
            "repository": "local/checkout",
            "repository_owner": "local",
            "run_attempt": "1",
            "run_id": time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()),
            "sha": _git(root, "rev-parse", "HEAD"),
            "workflow": str(data.get("name", path.name)),
            "workspace": str(root),
        }

    def plan(self, wanted: list[str]) -> dict[str, _Job | None]:
        """Every job in its order, checked; None for one that was not asked for."""
        jobs: dict[str, dict[str, Any]] = self.data.get("jobs") or {}
        if unknown := [name for name in (*wanted, *self.without) if name not in jobs]:
            raise WorkflowError(f"{self.path}: no job {unknown[0]!r}; jobs: {', '.join(jobs)}")
        names = list(ordered(self.path, jobs))
        asked = {name: (not wanted or name in wanted) and name not in self.without for name in names}
        planned = {name: _Job(self, name, jobs[name]) if yes else None for name, yes in asked.items()}
        for job in planned.values():
            if job:
                job.check()
        return planned

    def run(self, wanted: list[str]) -> list[JobResult]:
        for name, job in self.plan(wanted).items():
            try:
                why = self.without.get(name, "not asked for")
                self.done[name] = job.run() if job else JobResult(name, name, "skipped", detail=why)
            except ExpressionError as error:
                self.done[name] = JobResult(name, name, "failure", detail=str(error))
        return list(self.done.values())


class _Job:
    def __init__(self, workflow: _Workflow, name: str, data: dict[str, Any]) -> None:
        self.workflow, self.id, self.data = workflow, name, data
        self.where = f"{workflow.path.name}, job {name}"
        if "uses" in data:
            raise WorkflowError(f"{self.where}: calls another workflow; run that one")
        if unknown := sorted(data.keys() - JOB_KEYS):
            raise WorkflowError(f"{self.where}: {unknown[0]} has no meaning here")
        self.needs = [need for need in needs_of(data) if need not in workflow.without]
        self.matrix = self._matrix()
        self.minutes = float(data.get("timeout-minutes", 360))
        self.steps: dict[str, dict[str, Any]] = {}
        self.env: dict[str, str] = {}
        self.added_path: list[str] = []
        self.failed = False

    def _matrix(self) -> dict[str, Any]:
        matrix = dict((self.data.get("strategy") or {}).get("matrix") or {})
        include = matrix.pop("include", None)
        if (include and matrix) or "exclude" in matrix or not all(isinstance(v, list) for v in matrix.values()):
            raise WorkflowError(f"{self.where}: a matrix is here either lists of values or one `include` list")
        entries = include or [dict(zip(matrix, values, strict=True)) for values in product(*matrix.values())]
        choices = {"python": PYTHON, **self.workflow.choices}
        fitting = [e for e in entries if all(str(e[k]) == v for k, v in choices.items() if k in e)]
        if len(fitting) != 1:
            asked = ", ".join(f"{k}={v}" for k, v in choices.items())
            raise WorkflowError(f"{self.where}: {len(fitting)} matrix entries fit {asked}; choose: --matrix KEY=VALUE")
        return dict(fitting[0])

    def check(self) -> None:
        """Every expression, shell and condition is one that can be handled here."""
        for text in texts(self.data):
            for expression in expressions.inline(text):
                self._known(expression)
        for step in self.data["steps"]:
            if condition := step.get("if"):
                self._known(str(condition).removeprefix("${{").removesuffix("}}"))
            if "run" in step and self._setting(step, "shell") != "bash":
                raise WorkflowError(f"{self.where}, {_title(step)}: shell is not bash (defaults.run.shell)")
            if unknown := sorted(step.keys() - STEP_KEYS):
                raise WorkflowError(f"{self.where}, {_title(step)}: {unknown[0]} has no meaning here")

    def _known(self, expression: str) -> None:
        try:
            expressions.parse(expression)
            used = {path[0] for path in expressions.references(expression)}
        except ExpressionError as error:
            raise WorkflowError(f"{self.where}: {error}") from error
        if unknown := used - set(self.context()):
            raise WorkflowError(f"{self.where}: {expression.strip()!r} needs {sorted(unknown)[0]}, unknown here")

    def context(self) -> dict[str, Any]:
        done = self.workflow.done
        return {
            "env": self.env,
            "github": {**self.workflow.github, "job": self.id},
            "inputs": Open(),
            "job": {"status": "failure" if self.failed else "success"},
            "matrix": self.matrix,
            "needs": {name: {"result": done[name].result, "outputs": {}} for name in self.needs if name in done},
            "runner": {"os": "Linux", "arch": "X64", "temp": tempfile.gettempdir()},
            "steps": self.steps,
            "vars": Open(),
        }

    def run(self) -> JobResult:
        name = self._fill(str(self.data.get("name", self.id)))
        needed = [self.workflow.done[need].result for need in self.needs]
        status = {
            "success": lambda: all(result == "success" for result in needed),
            "failure": lambda: "failure" in needed,
            "always": lambda: True,
            "cancelled": lambda: "cancelled" in needed,
        }
        if not expressions.holds(str(self.data.get("if", "success()")), self.context(), status):
            return JobResult(self.id, name, "skipped", detail=f"its condition does not hold after {needed}")
        for source in (self.workflow.data, self.data):
            self.env |= {key: self._fill(str(value)) for key, value in (source.get("env") or {}).items()}
        self.deadline = time.monotonic() + 60 * self.minutes
        steps = []
        with tempfile.TemporaryDirectory(prefix="workflow-") as scratch:
            for number, step in enumerate(self.data["steps"]):
                steps.append(self._step(step, Path(scratch), number))
                self.failed |= steps[-1].outcome in ("failure", "cancelled")
                if "id" in step:
                    self.steps[step["id"]] = {"outcome": steps[-1].outcome, "outputs": Open(steps[-1].outputs)}
        return JobResult(self.id, name, "failure" if self.failed else "success", steps)

    def _step(self, step: dict[str, Any], scratch: Path, number: int) -> StepResult:
        title = _title(step)
        status = {
            "success": lambda: not self.failed,
            "failure": lambda: self.failed,
            "always": lambda: True,
            "cancelled": lambda: False,
        }
        started = time.monotonic()
        try:
            if not expressions.holds(str(step.get("if", "success()")), self.context(), status):
                return StepResult(title, "skipped", detail="an earlier step failed" if self.failed else "its condition")
            title = self._fill(title) if "name" in step else title
            self.workflow.say(f"\n== {self.id}: {title}")
            result = self._bash(step, scratch, number) if "run" in step else self._action(step)
        except ExpressionError as error:
            result = StepResult(title, "failure", detail=str(error))
        result.name, result.seconds = title, time.monotonic() - started
        note = f": {result.detail}" if result.detail else ""
        self.workflow.say(f"== {result.outcome}, {result.seconds:.0f} s{note}")
        return result

    def _bash(self, step: dict[str, Any], scratch: Path, number: int) -> StepResult:
        """One `run:` step in bash, with GitHub's files for the summary, outputs, variables and the path."""
        script = scratch / f"{number}.sh"
        script.write_text(self._fill(step["run"]) + "\n")
        files = {name: scratch / f"{number}.{name}" for name in ("STEP_SUMMARY", "OUTPUT", "ENV", "PATH")}
        for file in files.values():
            file.touch()
        own = {key: self._fill(str(value)) for key, value in (step.get("env") or {}).items()}
        environment = {**os.environ, **self.env, **own, "CI": "true"}
        environment |= {f"GITHUB_{name}": str(file) for name, file in files.items()}
        github = self.context()["github"]
        environment |= {f"GITHUB_{name.upper()}": value for name, value in github.items() if name != "event"}
        environment["PATH"] = os.pathsep.join([*reversed(self.added_path), environment.get("PATH", os.defpath)])
        folder = self.workflow.root / self._fill(str(self._setting(step, "working-directory") or "."))
        minutes = float(step.get("timeout-minutes", self.minutes))
        code = _in_group([*BASH, str(script)], folder, environment, min(self.deadline, time.monotonic() + 60 * minutes))
        outputs = _pairs(files["OUTPUT"])
        self.env |= _pairs(files["ENV"])
        self.added_path += files["PATH"].read_text().split()
        if code is None:
            return StepResult("", "cancelled", detail="past its timeout-minutes")
        size = files["STEP_SUMMARY"].stat().st_size
        if size > SUMMARY_LIMIT:
            return StepResult("", "failure", detail=f"its summary has {size} bytes; GitHub drops it whole")
        if size:
            self.workflow.say(f"   {size} bytes for the run's page")
        detail = f"exit code {code}" if code else ""
        return StepResult("", "failure" if code else "success", detail=detail, outputs=outputs)

    def _action(self, step: dict[str, Any]) -> StepResult:
        name = step["uses"].partition("@")[0]
        stand_in = ACTIONS.get(name)
        options = {key: self._fill(str(value)) for key, value in (step.get("with") or {}).items()}
        if stand_in is None:
            return StepResult("", "success", detail=f"{name} is not run here")
        return stand_in(self.workflow, options)

    def _setting(self, step: dict[str, Any], key: str) -> Any:
        """shell or working-directory: the step's, else the job's default, else the workflow's."""
        for place in (step, *(((d.get("defaults") or {}).get("run") or {}) for d in (self.data, self.workflow.data))):
            if key in place:
                return place[key]
        return None

    def _fill(self, text: str) -> str:
        return expressions.interpolate(text, self.context())


def _checkout(workflow: _Workflow, options: dict[str, str]) -> StepResult:
    return StepResult("", "success", detail=f"this tree, at {workflow.github['sha'][:12]}")


def _setup_python(workflow: _Workflow, options: dict[str, str]) -> StepResult:
    asked = options.get("python-version", "")
    stands_in = "" if asked == PYTHON else f", in the place of {asked}"
    return StepResult("", "success", detail=f"Python {PYTHON} of this machine{stands_in}")


def _upload(workflow: _Workflow, options: dict[str, str]) -> StepResult:
    name = options["name"]
    if name in workflow.artifacts:
        return StepResult("", "failure", detail=f"artifact {name} exists already")
    workflow.artifacts.add(name)
    found = [path for line in options["path"].split() for path in glob(str(workflow.root / line))]
    if not found and options.get("if-no-files-found") == "error":
        return StepResult("", "failure", detail=f"artifact {name}: nothing at {options['path']}")
    return StepResult("", "success", detail=f"{len(found)} paths would go into {name}")


ACTIONS: dict[str, Callable[[_Workflow, dict[str, str]], StepResult]] = {
    "actions/checkout": _checkout,
    "actions/setup-python": _setup_python,
    "actions/upload-artifact": _upload,
}


def report(results: list[JobResult]) -> str:
    """A line a job and a line a step that ran or failed, for the end of the log."""
    lines = []
    for job in results:
        lines.append(f"{job.result:9} {job.seconds:5.0f} s  {job.name}{f': {job.detail}' if job.detail else ''}")
        for step in job.steps:
            if step.outcome != "success" or step.seconds >= 1:
                reason = f": {step.detail}" if step.detail else ""
                lines.append(f"  {step.outcome:9} {step.seconds:3.0f} s  {step.name}{reason}")
    return "\n".join(lines)


def _title(step: dict[str, Any]) -> str:
    action, script = str(step.get("uses", "")), str(step.get("run", ""))
    return str(step.get("name") or action.partition("@")[0] or script.partition("\n")[0])


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def _in_group(command: list[str], folder: Path, environment: dict[str, str], deadline: float) -> int | None:
    """The exit code, or None past the deadline. However this ends, no process of the step is left."""
    process = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True)
    try:
        return process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to what is left of the group, time to end by itself, then SIGKILL."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signum)
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline:
            process.poll()
            if not _alive(process.pid):
                return
            time.sleep(0.05)


def _alive(group: int) -> bool:
    """Is there a process of the group that is not a zombie? One that nobody reaps would be there for ever."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended in between
            state, _, pgrp = path.read_text().rsplit(")", 1)[1].split()[:3]
            if int(pgrp) == group and state != "Z":
                return True
    return False


def _pairs(path: Path) -> dict[str, str]:
    """GITHUB_OUTPUT and GITHUB_ENV: `name=value` lines, and `name<<END` up to a line END."""
    found: dict[str, str] = {}
    lines = iter(path.read_text().splitlines())
    for line in lines:
        name, sign, value = line.partition("=")
        if "<<" in name:
            name, _, end = line.partition("<<")
            body = []
            for text in lines:
                if text == end:
                    break
                body.append(text)
            else:
                raise ExpressionError(f"{name}<<{end}: no line {end} ends it")
            found[name] = "\n".join(body)
        elif sign:
            found[name] = value
        elif line:
            raise ExpressionError(f"{line!r} is neither name=value nor name<<END")
    return found
