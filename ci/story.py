"""Whether the parts of a run tell one story: each claim is held against the raw evidence under it.

`root` is an unpacked bundle. Every contradiction is one line that names the file and the reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from ci import contract, junit
from ci.outcome import OutcomeError, RunResult, StepOutcome, StepRecord, load_record, load_result
from ci.runbook import Runbook, RunbookError, Step, load

T = TypeVar("T")
RESULT, EXIT, SUMMARY, RUNBOOK = "artifacts/result.json", "artifacts/exit.json", "artifacts/summary.md", "runbook.toml"
VERDICT = re.compile(r"(NOT READY|READY ON CPU|READY)\b")
TALLY = re.compile(r"\b(\d+) (passed|failed|errors?)\b")
CLAIMS = ("verdict", "exit_code", "profile", "git_sha", "run_id", "dirty")
# All that the contract derives of a step, but for the reason: it may name the folder the judge looked into.
STEP_FACTS = tuple(field.name for field in fields(StepOutcome) if field.name != "reason")


def contradictions(root: Path, manifest: dict[str, Any]) -> list[str]:
    """Every disagreement between manifest, result, contract and raw records. Raises nothing for what the files hold."""
    problems = list(_unreadable(root))
    if problems:
        return problems
    result = load_result(root / RESULT)
    book = load(root / RUNBOOK)
    if book.sha256 != result.env.get("runbook_sha256", book.sha256):
        problems.append(f"{RUNBOOK}: not the one the run was judged by, its sha256 is not the one in {RESULT}")
    problems += [
        f"{RESULT}: {key} is {getattr(result, key)!a}, manifest.json says {manifest.get(key)!a}"
        for key in CLAIMS
        if manifest.get(key) != getattr(result, key)
    ]
    problems += [*_strangers(root, book), *_judged(root, result, book), *_repeated(root, result)]
    for step in book.steps:
        path = root / "artifacts" / "results" / f"{step.key}.json"
        if step.kind == "pytest" and path.is_file():
            problems += _printed(root, step, load_record(path))
    return problems


def _unreadable(root: Path) -> Iterator[str]:
    """Files that the checks below could not read: absent, not JSON, of other types, or pointing outside."""
    artifacts = root / "artifacts"
    for path in sorted({root / RESULT, root / EXIT, artifacts / "env.json", *artifacts.glob("results/*.json")}):
        name = path.relative_to(root).as_posix()
        try:
            json.loads(path.read_text(encoding="utf-8"))
            if path.parent.name == "results":
                _typed(load_record(path))
            elif name == RESULT:
                _typed(load_result(path))
        except FileNotFoundError:
            yield f"{name}: missing"
        except (TypeError, ValueError, RecursionError) as error:
            yield f"{name}: unreadable ({_short(root, error)})"
    for path in sorted(artifacts.glob("junit/*.xml")):
        text = path.read_bytes()
        if b"<!DOCTYPE" in text or b"<!ENTITY" in text:
            yield f"artifacts/junit/{path.name}: declares entities, which no JUnit file needs"
    try:
        book = load(root / RUNBOOK)
    except RunbookError as error:
        yield f"{RUNBOOK}: {_short(root, error)}"
    else:
        for step in book.steps:
            names = [step.output, *(d.path for d in step.deliverables), *(a.file for a in step.assertions)]
            if "/" in step.key or any(".." in name.split("/") or name.startswith("/") for name in names):
                yield f"{RUNBOOK}: step {step.id!a} points outside artifacts/"


def _judged(root: Path, result: RunResult, book: Runbook) -> Iterator[str]:
    """The contract's verdict over the raw files, against the one claimed."""
    if result.profile not in book.profiles:
        yield f"{RESULT}: profile {result.profile!a} is not in {RUNBOOK}"
        return
    derived = contract.judge(book, result.profile, root / "artifacts")
    claimed = {step.id: step for step in result.steps}
    for step in derived.steps:
        said = claimed.pop(step.id, None)
        if said is None:
            yield f"{RESULT}: says nothing of step {step.id}"
            continue
        for key in STEP_FACTS:
            if getattr(said, key) != getattr(step, key):
                because = f" ({_short(root, step.reason)})" if step.reason else ""
                yield (
                    f"{RESULT}: {step.id}.{key} is {getattr(said, key)!a}, "
                    f"the raw records give {getattr(step, key)!a}{because}"
                )
    for name in claimed:
        yield f"{RESULT}: step {name!a} is not in {RUNBOOK}"
    for key in ("verdict", "exit_code", "not_proven", "started", "wall_s", "env"):
        if getattr(derived, key) != getattr(result, key):
            claim, fact = (f"{getattr(run, key)!a:.200}" for run in (result, derived))
            yield f"{RESULT}: {key} is {claim}, the raw records give {fact}"


def _repeated(root: Path, result: RunResult) -> Iterator[str]:
    """exit.json and summary.md repeat the verdict."""
    said = json.loads((root / EXIT).read_text(encoding="utf-8"))
    for key, value in (("code", result.exit_code), ("verdict", result.verdict)):
        if not isinstance(said, dict) or said.get(key) != value:
            yield f"{EXIT}: not the {key} {value!a} of {RESULT}"
    if (root / SUMMARY).is_file():
        words = VERDICT.match((root / SUMMARY).read_text(encoding="utf-8", errors="replace"))
        if not words or words[1] != result.verdict:
            yield f"{SUMMARY}: its first line says {words[1] if words else 'no verdict'}, {RESULT} {result.verdict}"


def _strangers(root: Path, book: Runbook) -> Iterator[str]:
    known = {step.key for step in book.steps}
    for pattern in ("results/*.json", "junit/*.xml"):
        for path in sorted((root / "artifacts").glob(pattern)):
            if path.stem not in known:
                yield f"{path.relative_to(root).as_posix()}: of a step that {RUNBOOK} does not name"


def _printed(root: Path, step: Step, record: StepRecord) -> Iterator[str]:
    """pytest's own last line, in the captured output, against its JUnit file."""
    name = f"artifacts/junit/{step.key}.xml"
    try:
        failed = any(case.state == "failed" for case in junit.read(root / name))
    except junit.JUnitError:
        return  # the contract has judged that
    texts = ["\n".join(record.tail)]
    if step.output and (root / step.output).is_file():
        texts.append((root / step.output).read_text(encoding="utf-8", errors="replace"))
    for text in texts:
        tallies = next((found for line in reversed(text.splitlines()) if (found := TALLY.findall(line))), [])
        printed = any(word != "passed" and int(number) for number, word in tallies)
        if tallies and printed != failed:
            says = ("a failure", "none") if printed else ("no failure", "one")
            yield f"{name}: the captured output of {step.id} reports {says[0]}, this file {says[1]}"
            return


def _typed(value: T) -> T:
    """A dataclass of ci.outcome as its annotations promise; OutcomeError otherwise: these files come from outside."""
    for name, hint in get_type_hints(type(value)).items():
        if not _fits(getattr(value, name), hint):
            raise OutcomeError(f"{type(value).__name__}.{name} is {getattr(value, name)!a:.60}")
    return value


def _fits(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is list:
        return isinstance(value, list) and all(_fits(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(k, args[0]) and _fits(v, args[1]) for k, v in value.items())
    if origin is Literal:
        return isinstance(value, str) and value in args
    if origin is not None:
        return any(_fits(value, arg) for arg in args)
    if is_dataclass(hint):
        return isinstance(value, hint) and _typed(value) is value  # type: ignore[arg-type]
    return isinstance(value, (int, float) if hint is float else hint) and (hint is bool or not isinstance(value, bool))


def _short(root: Path, error: BaseException | str) -> str:
    return " ".join(str(error).replace(f"{root}/", "").split())[:200]
