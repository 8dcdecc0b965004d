"""ci/runbook.toml as typed data. A mistake in it is a RunbookError that names the step and the key."""

from __future__ import annotations

import hashlib
import re
import sys
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SOURCE = Path(__file__).with_name("runbook.toml")
KINDS = ("pytest", "script")
EXPECTATIONS = ("run", "skip_ok", "forbid")
NEED = re.compile(r"cuda|network|gpus>=[1-9]\d*|tool:[\w-]+")


class RunbookError(ValueError):
    """The runbook file does not say what a runbook must say."""


@dataclass(frozen=True)
class Profile:
    """A machine to be proven. `name` must occur in every GPU's name, `capability` be its compute capability."""

    id: str
    title: str
    gpus: int
    name: str = ""
    capability: str = ""


@dataclass(frozen=True)
class Stage:
    id: str
    number: int
    title: str
    about: str


@dataclass(frozen=True)
class Deliverable:
    """A file a step must leave behind; the flags are explained at the top of runbook.toml."""

    path: str
    header: str = ""
    optional: bool = False
    keep: bool = False
    listed: bool = False


@dataclass(frozen=True)
class Assertion:
    """One fact about a file: exactly one of regex, json, column. `within` writes JSON's null as "null"."""

    file: str
    regex: str = ""
    json: str = ""
    equals: Any = None
    within: tuple[Any, ...] = ()
    column: str = ""
    falls: float = 0.0
    same_as: str = ""
    profiles: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    id: str
    stage: str
    title: str
    kind: str
    command: str
    timeout: float
    expect: dict[str, str]
    output: str = ""
    xdist: bool = False
    covers: tuple[str, ...] = ()
    deviation: str = ""
    needs: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    allow: dict[str, list[str]] = field(default_factory=dict)
    deliverables: tuple[Deliverable, ...] = ()
    assertions: tuple[Assertion, ...] = ()

    @property
    def key(self) -> str:
        """Stem of the step's files under artifacts/results and artifacts/junit."""
        return f"{self.stage}.{self.id}"

    def expected(self, profile: str) -> str:
        """run | skip_ok | forbid."""
        return self.expect.get(profile) or self.expect["*"]

    def allowed(self, profile: str) -> list[str]:
        """Regular expressions of the reasons for which this step or its tests may skip."""
        return self.allow.get(profile, self.allow.get("*", []))


@dataclass(frozen=True)
class Runbook:
    profiles: dict[str, Profile]
    stages: tuple[Stage, ...]
    steps: tuple[Step, ...]
    sha256: str
    path: Path

    def of_stage(self, stage: str) -> list[Step]:
        """The steps of a stage in their order; RunbookError if there is no such stage."""
        if stage not in {s.id for s in self.stages}:
            raise RunbookError(f"no stage {stage!r}; stages: {', '.join(s.id for s in self.stages)}")
        return [step for step in self.steps if step.stage == stage]


def load(path: Path = SOURCE) -> Runbook:
    """Reads and checks a runbook file."""
    try:
        text = path.read_bytes()
        data = tomllib.loads(text.decode())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RunbookError(f"{path}: unreadable ({error})") from error
    if data.pop("schema", None) != 1:
        raise RunbookError(f"{path}: schema must be 1")
    if extra := set(data) - {"profiles", "stages", "steps"}:
        raise RunbookError(f"{path}: unknown table {sorted(extra)}")
    profiles = {name: _build(Profile, {"id": name, **table}, name) for name, table in data.get("profiles", {}).items()}
    stages = tuple(_build(Stage, table, table.get("id", "?")) for table in data.get("stages", []))
    steps = tuple(_step(table) for table in data.get("steps", []))
    book = Runbook(profiles, stages, steps, hashlib.sha256(text).hexdigest(), path)
    _check(book)
    return book


def _step(table: dict[str, Any]) -> Step:
    name = str(table.get("id", "?"))
    table = {**table, "command": str(table.get("command", "")).strip("\n")}
    for key, shape in (("deliverables", Deliverable), ("assertions", Assertion)):
        table[key] = tuple(_build(shape, item, f"{name}.{key}") for item in table.get(key, []))
    return _build(Step, table, name)


def _build(shape: type, table: dict[str, Any], where: str) -> Any:
    known = {f.name: f for f in fields(shape)}
    if extra := sorted(set(table) - set(known)):
        raise RunbookError(f"{where}: unknown key {', '.join(extra)}; known: {', '.join(known)}")
    required = [n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    if missing := [n for n in required if table.get(n) in (None, "")]:
        raise RunbookError(f"{where}: {', '.join(missing)} is missing")
    return shape(**{k: tuple(v) if isinstance(v, list) else v for k, v in table.items()})


def _check(book: Runbook) -> None:
    stages = [stage.id for stage in book.stages]
    names = [step.id for step in book.steps]
    writers: dict[str, str] = {}
    for step in book.steps:
        if names.count(step.id) > 1:
            raise RunbookError(f"{step.id}: two steps have this id")
        if step.stage not in stages:
            raise RunbookError(f"{step.id}: no stage {step.stage!r}")
        if step.kind not in KINDS:
            raise RunbookError(f"{step.id}: kind {step.kind!r}; one of {', '.join(KINDS)}")
        if bad := [need for need in step.needs if not NEED.fullmatch(need)]:
            raise RunbookError(f"{step.id}: needs {bad[0]!r}; one of cuda, gpus>=N, network, tool:NAME")
        _check_expectations(book, step)
        for item in step.deliverables:
            if item.path in writers:
                raise RunbookError(f"{step.id}: {item.path} is already written by {writers[item.path]}")
            if not item.path.startswith("artifacts/") or ".." in Path(item.path).parts:
                raise RunbookError(f"{step.id}: {item.path} lies outside artifacts/")
            writers[item.path] = step.id
        for path in filter(None, [step.output, *(a.file for a in step.assertions)]):
            if path not in {item.path for item in step.deliverables}:
                raise RunbookError(f"{step.id}: {path} is not among its deliverables")
        for claim in step.assertions:
            if sum(map(bool, (claim.regex, claim.json, claim.column))) != 1:
                raise RunbookError(f"{step.id}: an assertion has exactly one of regex, json, column")


def _check_expectations(book: Runbook, step: Step) -> None:
    for table in (step.expect, step.allow):
        if unknown := sorted(set(table) - set(book.profiles) - {"*"}):
            raise RunbookError(f"{step.id}: unknown profile {', '.join(unknown)}")
    for profile in book.profiles:
        if (want := step.expect.get(profile, step.expect.get("*"))) not in EXPECTATIONS:
            raise RunbookError(f"{step.id}: expect.{profile} = {want!r}; one of {', '.join(EXPECTATIONS)}")
    patterns = [p for group in step.allow.values() for p in group] + [a.regex for a in step.assertions if a.regex]
    patterns += step.covers
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise RunbookError(f"{step.id}: {pattern!r} is no regular expression ({error})") from error
