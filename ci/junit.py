"""JUnit: reading what pytest left, and one merged file in which a script step is a test case too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from junitparser import Error, Failure, JUnitXml, JUnitXmlError, Skipped, TestCase, TestSuite

from ci.outcome import StepOutcome


class JUnitError(ValueError):
    """A JUnit file is absent, cut short, or counts a test twice."""


@dataclass(frozen=True)
class Case:
    """One executed test. `state` is passed | failed | skipped; `reason` is pytest's message."""

    name: str
    state: str
    reason: str = ""


def read(path: Path) -> list[Case]:
    """The tests of one pytest run; JUnitError names the file and what is wrong with it."""
    if not path.is_file():
        raise JUnitError(f"no JUnit file {path.name}: pytest ended before it could report")
    try:
        suites = list(_suites(JUnitXml.fromfile(str(path))))
    except (JUnitXmlError, SyntaxError, OSError, ValueError) as error:
        raise JUnitError(f"{path.name} is truncated or not JUnit ({error})") from error
    cases = [_case(item) for suite in suites for item in suite]
    if repeated := [name for name, count in Counter(c.name for c in cases).items() if count > 1]:
        raise JUnitError(f"{path.name} counts {repeated[0]} more than once")
    announced = sum(suite.tests for suite in suites)
    if announced != len(cases):
        raise JUnitError(f"{path.name} announces {announced} tests and holds {len(cases)}")
    return cases


def merge(steps: Iterable[StepOutcome], junit_dir: Path, target: Path, properties: dict[str, Any]) -> None:
    """Writes one file with a suite a step. A suite keeps the step's wall time, and what pytest could not see
    (a missing deliverable, a disallowed skip, a timeout) stands in it as a failing case named `contract`."""
    merged = JUnitXml("readiness")
    for step in steps:
        suite = TestSuite(f"{step.stage}.{step.id}")
        for name, value in properties.items():
            suite.add_property(name, str(value))
        for case in _step_cases(step, junit_dir / f"{step.stage}.{step.id}.xml"):
            suite.add_testcase(case)
        suite.update_statistics()
        suite.time = round(step.wall_s, 3)
        merged.add_testsuite(suite)
    merged.update_statistics()
    merged.time = round(sum(suite.time for suite in _suites(merged)), 3)
    target.parent.mkdir(parents=True, exist_ok=True)
    merged.write(str(target), pretty=True)


def _step_cases(step: StepOutcome, raw: Path) -> list[TestCase]:
    cases: list[TestCase] = []
    if step.kind == "pytest" and raw.is_file():
        try:
            read(raw)
            cases = [item for suite in _suites(JUnitXml.fromfile(str(raw))) for item in suite]
        except JUnitError:
            cases = []  # the step's own verdict says so, in the contract case below
    pytest_said_so = step.verdict == "FAILED" and step.failed > 0 and cases
    if (step.verdict in ("PASSED", "SKIPPED") and cases) or pytest_said_so:
        return cases
    own = TestCase("contract" if step.kind == "pytest" else step.id, f"runbook.{step.stage}", round(step.wall_s, 3))
    if step.verdict == "SKIPPED":
        own.result = [Skipped(step.reason)]
    elif step.verdict != "PASSED":
        own.result = [Failure(f"{step.verdict}: {step.reason}")]
    return [*cases, own]


def _suites(document: Any) -> Iterable[TestSuite]:
    return [document] if isinstance(document, TestSuite) else list(document)


def _case(item: TestCase) -> Case:
    name = f"{item.classname}::{item.name}"
    for result in item.result:
        if isinstance(result, (Failure, Error)):
            return Case(name, "failed", (result.message or "").strip())
    for result in item.result:
        if isinstance(result, Skipped):
            return Case(name, "skipped", (result.message or "").strip())
    return Case(name, "passed")
