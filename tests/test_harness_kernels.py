"""`ci/nox -s kernels`: what its codes mean. The kernels themselves are proven by running it, as ci.yml does."""

from __future__ import annotations

import json

import pytest

from ci import facts, kernels

JUNIT = (
    '<testsuites><testsuite name="t" tests="1"><testcase classname="c" name="n">{}</testcase></testsuite></testsuites>'
)
TABLE = "kernel  verdict\nscore  fits\ntop  {}\nTriton 3.0.0: 2 launches compiled\n"


@pytest.fixture
def prove(monkeypatch, tmp_path):
    """prove(...) with processes that only leave their records; (code, the environment that they were given)."""

    def run(numbers=0, junit="", resources=0, verdict="fits", answered="3.0.0"):
        given = {}

        def process(title, command, environment, out=None):
            given.update(environment)
            if out is None:
                (tmp_path / "dist/kernels-triton-3.0.0.xml").write_text(JUNIT.format(junit))
                return numbers
            out.write_text(TABLE.format(verdict))
            out.with_suffix(".json").write_text(json.dumps({"triton": answered}))
            return resources

        monkeypatch.setattr(kernels, "provide", lambda version: tmp_path / "triton")
        monkeypatch.setattr(kernels, "_run", process)
        return kernels.prove("3.0.0", tmp_path / "dist"), given

    return run


def test_numbers_and_resources_hold(prove, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code, given = prove()
    assert code == 0
    assert given["PYTHONPATH"].startswith(f"{tmp_path / 'triton'}:")
    assert "TRITON_INTERPRET" not in given


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ({"numbers": 1}, 1, ""),
        ({"junit": '<skipped message="needs Triton"/>'}, 3, "a skip proves nothing: c::n: needs Triton"),
        ({"resources": 1, "verdict": "shared memory above the limit"}, 1, "top  shared memory above the limit"),
        ({"answered": "3.7.1"}, 3, "Triton 3.7.1 answered, not 3.0.0"),
    ],
)
def test_what_does_not_hold_has_its_code_and_is_named(prove, capsys, how, code, said):
    assert prove(**how)[0] == code
    assert said in "".join(capsys.readouterr())


def test_a_version_that_cannot_be_had_is_78_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(facts, "installed", lambda name: "2.2.6")
    assert kernels.main(["3.0.0"]) == 78
    said = capsys.readouterr().err
    assert "needs numpy<2, here is 2.2.6" in said
    assert len(said.splitlines()) == 1


def test_what_is_no_version_is_a_usage_error(capsys):
    assert kernels.main(["newest"]) == 2
    assert "'newest' is no version" in capsys.readouterr().err


def test_without_a_version_it_is_the_gpu_lanes(monkeypatch):
    asked = []
    monkeypatch.setattr(kernels, "prove", lambda version, out: asked.append(version) or 0)
    assert kernels.main([]) == 0
    assert asked == [kernels.pinned("triton")] == ["3.0.0"]
