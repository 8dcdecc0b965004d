"""The check of the checker: each forgery of a real bundle is refused, and one that passed would be told."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_factory import make_run

from ci import audit, bundle, forgery
from ci.__main__ import main


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    run = make_run(tmp_path)
    return bundle.build(run.artifacts, run.result, tmp_path / "out", runbook=run.runbook)


def test_every_forgery_is_refused_for_its_own_reason(packed, capsys):
    assert main(["bundle", "canary", str(packed)]) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert list(lines) == list(forgery.FORGERIES)
    reasons = (
        "changed, its sha256",
        "says nothing of|the raw records give",
        "verdict is",
        "truncated",
        "leaves its fo",
    )
    for said, reason in zip(lines.values(), reasons, strict=True):
        assert said.startswith("refused (")
        assert any(part in said for part in reason.split("|")), said


def test_a_checker_that_believes_everything_is_found_out(packed, capsys, monkeypatch):
    monkeypatch.setattr(audit, "verify", lambda path: audit.VerifyReport(str(path)))
    assert main(["bundle", "canary", str(packed)]) == 1
    assert capsys.readouterr().out.count(": ACCEPTED") == len(forgery.FORGERIES)


def test_a_bundle_that_does_not_verify_is_no_ground_to_forge_from(packed, capsys):
    packed.write_bytes(packed.read_bytes()[:1000])
    assert main(["bundle", "canary", str(packed)]) == 1
    assert "truncated" in capsys.readouterr().err
