"""New and known failures of two nights: told apart by test, and a result that went silent is a failure."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from report_factory import MATHS_XML, Run, make_run

from ci import bundle, changes, forgery

PASSING = '<testcase classname="nsa.tests.test_block_math" name="test_taps" time="0.3" />'
FAILING = PASSING.replace(" />", '><failure message="assert 2 == 3"/></testcase>')


@pytest.fixture
def run(tmp_path: Path) -> Run:
    (tmp_path / "run").mkdir()
    return make_run(tmp_path / "run")


def night(run: Run, folder: Path, *artifacts: str, failing: bool = False) -> Path:
    """A folder as GitHub hands out a run's artifacts, all with the same bundle."""
    xml = MATHS_XML.replace('failures="0"', 'failures="1"').replace(PASSING, FAILING) if failing else MATHS_XML
    run.write("junit/correct.maths.xml", xml)
    run.write("test-reports/maths.txt", "1 failed, 1 passed in 1s\n" if failing else "2 passed in 1s\n")
    run.record("maths", exit_code=int(failing))
    run.judge()
    for artifact in artifacts:
        bundle.build(run.artifacts, run.result, folder / artifact, runbook=run.runbook)
    return folder


def call(before: Path, after: Path) -> tuple[int, str]:
    out = after.parent / "changes.md"
    return changes.main([str(before), str(after), "--out", str(out)]), out.read_text()


def test_a_failure_is_new_then_known_then_fixed(run, tmp_path):
    good = night(run, tmp_path / "good", "bundle-a100-1")
    bad = night(run, tmp_path / "bad", "bundle-a100-3", failing=True)
    line = "- `bundle-a100`: `maths: nsa.tests.test_block_math::test_taps`"
    for before, after, code, title in (
        (good, bad, 1, "## 1 new, 0 known, 0 fixed"),
        (bad, bad, 0, "## 0 new, 1 known, 0 fixed"),
        (bad, good, 0, "## 0 new, 0 known, 1 fixed"),
        (tmp_path / "absent", bad, 1, "## 1 new, 0 known, 0 fixed"),
    ):
        got, text = call(before, after)
        assert (got, text.splitlines()[0], line in text) == (code, title, True)


def test_a_step_without_a_failing_test_is_named_by_its_verdict(run, tmp_path):
    good = night(run, tmp_path / "good", "bundle-a100-1")
    run.record("decode", exit_code=124, timed_out=True)
    run.judge()
    bundle.build(run.artifacts, run.result, tmp_path / "slow" / "bundle-a100-1", runbook=run.runbook)
    assert "- `bundle-a100`: `decode: TIMEOUT`" in call(good, tmp_path / "slow")[1]


def test_a_result_that_went_silent_is_a_new_failure(run, tmp_path):
    both = night(run, tmp_path / "both", "bundle-a100-1", "bundle-rtx4090-1")
    one = night(run, tmp_path / "one", "bundle-a100-1")
    code, text = call(both, one)
    assert (code, "- `bundle-rtx4090`: `left no result, and did the night before`" in text) == (1, True)
    failing = night(run, tmp_path / "failing", "bundle-a100-1", "bundle-rtx4090-1", failing=True)
    assert call(failing, one)[1].startswith("## 1 new, 0 known, 1 fixed\n"), "a failure that went silent is not fixed"


def test_only_the_last_attempt_counts(run, tmp_path):
    again = night(run, tmp_path / "night", "bundle-a100-9", failing=True)
    night(run, again, "bundle-a100-10")
    assert changes.failures(again) == {"bundle-a100": set()}


def test_a_forged_bundle_is_a_failure(run, tmp_path):
    good = night(run, tmp_path / "good", "bundle-a100-1")
    shutil.copytree(good, tmp_path / "forged")
    (path,) = (tmp_path / "forged").rglob("*.tar.gz")
    forgery.FORGERIES["a file changed"](path, path)
    code, text = call(good, tmp_path / "forged")
    assert (code, "bundle refused" in text) == (1, True)


@pytest.mark.parametrize(
    ("xml", "says"),
    [(MATHS_XML.replace(PASSING, FAILING), "test_block_math::test_taps"), (MATHS_XML[:200], "truncated or not JUnit")],
)
def test_junit_files_count_too_and_a_truncated_one_is_a_failure(tmp_path, xml, says):
    artifact = tmp_path / "after" / "junit-tests-py3.12-1"
    artifact.mkdir(parents=True)
    (artifact / "tests.xml").write_text(xml)
    code, text = call(tmp_path / "before", tmp_path / "after")
    assert (code, says in text, "`junit-tests-py3.12`" in text) == (1, True, True)


def test_nothing_to_compare_is_no_success(tmp_path, capsys):
    (tmp_path / "after").mkdir()
    assert call(tmp_path, tmp_path / "after")[0] == 3
    assert "no result in" in capsys.readouterr().err
