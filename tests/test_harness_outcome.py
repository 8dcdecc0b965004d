"""The result files: what is written is what is read, and anything else is refused by name."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from ci import outcome

STEP = outcome.StepOutcome("demo", "long_context", "true", "script", "run", "PASSED", passed=1, deliverables=["a.txt"])
RESULT = outcome.RunResult(
    "cpu", "READY ON CPU", 0, ["Triton"], [STEP], {"python": "3.11"}, 1.0, 2.0, "r1", "abc", False
)
RECORD = outcome.StepRecord(
    "demo", "long_context", "true", "script", "cpu", "abc", "r1", 1.0, files=[outcome.FileRecord("a.txt", 1, 2.0, "ff")]
)


def test_result_and_record_survive_the_file(tmp_path):
    outcome.save(RESULT, tmp_path / "deep/result.json")
    outcome.save(RECORD, tmp_path / "record.json")
    assert outcome.load_result(tmp_path / "deep/result.json") == RESULT
    assert outcome.load_record(tmp_path / "record.json") == RECORD


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "unreadable"),
        ("[]", "list"),
        (json.dumps({**asdict(RESULT), "green": True}), "green"),
        (json.dumps({k: v for k, v in asdict(RESULT).items() if k != "verdict"}), "verdict"),
    ],
)
def test_a_file_of_another_shape_is_named(tmp_path, text, said):
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(outcome.OutcomeError, match=said) as caught:
        outcome.load_result(path)
    assert str(path) in str(caught.value)


def test_an_outcome_cannot_be_edited_in_place():
    with pytest.raises(AttributeError):
        STEP.verdict = "PASSED"
    assert replace(STEP, verdict="FAILED").verdict == "FAILED"
