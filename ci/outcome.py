"""What a run leaves behind, as data. execute writes StepRecord, contract StepOutcome and RunResult, reports read them.

    artifacts/results/<stage>.<step>.json   StepRecord: what happened, without a judgement
    artifacts/junit/<stage>.<step>.xml      raw JUnit of a pytest step
    artifacts/result.json                   RunResult: the judgement, re-derivable from the two above by `ci.contract`

Paths inside are relative to the repository's root (`artifacts/train/train_showcase.txt`), times are Unix seconds.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

Verdict = Literal["PASSED", "FAILED", "SKIPPED", "VACUOUS", "MISSING", "TIMEOUT", "INFRA"]
Readiness = Literal["READY", "READY ON CPU", "NOT READY"]

READY, TEST_FAILED, USAGE, CONTRACT, PERFORMANCE = 0, 1, 2, 3, 4
INFRASTRUCTURE, CONFIGURATION, TIMED_OUT, INTERRUPTED, TERMINATED = 75, 78, 124, 130, 143


class OutcomeError(ValueError):
    """A result file is absent, unreadable, or not of this shape."""


@dataclass(frozen=True)
class FileRecord:
    """A deliverable as it lay on disk when its step ended."""

    path: str
    size: int
    mtime: float
    sha256: str


@dataclass(frozen=True)
class StepRecord:
    """One execution of a step. `exit_code` is None where the step was not started; `note` then says why.

    `cpu_s` is the processor time of all its processes: where other work shares the cores, `wall_s` says less.
    `command` is what bash was given; `tail` the last lines of the output; `env` what the harness added; `arguments`
    what the caller added to pytest's.
    """

    id: str
    stage: str
    command: str
    kind: str
    profile: str
    git_sha: str
    run_id: str
    started: float
    wall_s: float = 0.0
    exit_code: int | None = None
    timed_out: bool = False
    oom_killed: bool = False
    peak_mb: float | None = None
    cpu_s: float | None = None
    note: str = ""
    tail: list[str] = field(default_factory=list)
    files: list[FileRecord] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    arguments: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class StepOutcome:
    """A step judged. `expected` is run | skip_ok | forbid; counts are tests (a script counts as one test).

    `reason` says in a line why the verdict is not PASSED; `reproduce` is the exact command, to be run from the root.
    """

    id: str
    stage: str
    command: str
    kind: str
    expected: str
    verdict: Verdict
    reason: str = ""
    exit_code: int | None = None
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    skip_reasons: list[str] = field(default_factory=list)
    wall_s: float = 0.0
    peak_mb: float | None = None
    started: float = 0.0
    deliverables: list[str] = field(default_factory=list)
    reproduce: str = ""
    title: str = ""


@dataclass(frozen=True)
class RunResult:
    """The judgement over all steps. `not_proven` lists, a line each, what this profile cannot prove."""

    profile: str
    verdict: Readiness
    exit_code: int
    not_proven: list[str]
    steps: list[StepOutcome]
    env: dict[str, Any]
    started: float
    wall_s: float
    run_id: str
    git_sha: str
    dirty: bool


def save(value: Any, path: Path) -> None:
    """Writes a dataclass of this module as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(json.dumps(asdict(value), indent=2, sort_keys=True) + "\n")
    scratch.replace(path)


def leave_exit(root: Path, session: str, code: int) -> int:
    """Writes artifacts/exit.json for a session outside the stages, so that `ci/nox` returns its code; returns it."""
    path = root / "artifacts" / "exit.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"code": code, "session": session}) + "\n")
    return code


def load_record(path: Path) -> StepRecord:
    """Reads artifacts/results/*.json; OutcomeError names the file."""
    data = _read(path, StepRecord)
    data["files"] = [FileRecord(**_shape(path, FileRecord, item)) for item in data.get("files", [])]
    return StepRecord(**data)


def load_result(path: Path) -> RunResult:
    """Reads artifacts/result.json; OutcomeError names the file."""
    data = _read(path, RunResult)
    data["steps"] = [StepOutcome(**_shape(path, StepOutcome, item)) for item in data["steps"]]
    return RunResult(**data)


def _read(path: Path, shape: type) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise OutcomeError(f"{path}: unreadable ({error}); run the stage again") from error
    return _shape(path, shape, data)


def _shape(path: Path, shape: type, data: Any) -> dict[str, Any]:
    names = [f.name for f in fields(shape)]
    if not isinstance(data, dict) or not set(data) <= set(names):
        extra = sorted(set(data) - set(names)) if isinstance(data, dict) else type(data).__name__
        raise OutcomeError(f"{path}: not a {shape.__name__} ({extra}); written by another version?")
    required = [f.name for f in fields(shape) if f.default is MISSING and f.default_factory is MISSING]
    missing = [name for name in required if name not in data]
    if missing:
        raise OutcomeError(f"{path}: {shape.__name__} lacks {', '.join(missing)}; run the stage again")
    return data
