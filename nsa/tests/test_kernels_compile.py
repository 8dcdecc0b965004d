"""The report of compiled kernels: a launch of the 125M shape compiles for sm_80, sm_89 and sm_90 without a GPU and
fits; what does not fit is a row and an exit code. The command itself, `python -m nsa.kernels.report`, does them all."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch


@pytest.fixture(scope="session")
def report(tmp_path_factory):
    """report(*options) runs the command in a process that compiles -> its exit code, table and JSON rows."""
    if find_spec("triton") is None:
        pytest.skip("needs Triton")
    folder = tmp_path_factory.mktemp("kernels")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache")}
    environment.pop("TRITON_INTERPRET", None)

    def run(*options):
        out = folder / "deep" / "kernels.json"
        command = [sys.executable, "-m", "nsa.kernels.report", "--json", str(out), *options]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode in (0, 1), done.stderr
        return done.returncode, done.stdout, json.loads(out.read_text())["kernels"]

    return run


@pytest.fixture
def recorder():
    if find_spec("triton") is None:
        pytest.skip("needs Triton")
    from nsa.kernels import report

    return report


def test_the_choice_of_blocks_fits_every_card_and_pipelines_its_loads(report):
    code, said, rows = report("--match", "bfloat16 R6 D64 T65536")
    assert code == 0, said
    score = [row for row in rows if row["kernel"] == "selection.score"]
    assert [row["arch"] for row in score] == ["sm_80", "sm_89", "sm_90"]
    for row in rows:
        assert row["verdict"] == "fits"
        assert 0 <= row["shared"] <= row["limit"]
        assert 0 < row["registers"] <= 255
    # Triton 3.0 keeps 24 values of a thread out of its registers on sm_80 and 15 on sm_89; later versions none.
    bound = 96 if version("triton").startswith("3.0.") else 0
    assert all(row["cp_async"] > 0 and row["spills"] <= bound for row in score)
    assert "sm_89" in said
    assert "launches compiled, 0 not as they should be" in said


def test_nothing_to_compile_is_no_proof(report):
    code, _, rows = report("--match", "no such kernel")
    assert code == 1
    assert rows == []


@pytest.mark.parametrize("sm", [80, 89, 90])
def test_a_launch_that_asks_for_too_much_is_named(recorder, sm):
    """Shared memory above the card's: the pipeline's stages are buffers."""
    case = recorder.Case(64, 64, 16, 128, torch.bfloat16)
    (launch,) = [one for one in recorder.launches(case, sm) if one.name == "selection.score"]
    greedy = type(launch)(**{**vars(launch), "stages": 16})
    assert recorder.measure(greedy, sm)["verdict"] == "shared memory above the limit"


def test_loads_without_a_pipeline_are_named(recorder, monkeypatch):
    case = recorder.Case(64, 64, 16, 128, torch.bfloat16)
    (launch,) = [one for one in recorder.launches(case, 80) if one.name == "selection.top"]
    monkeypatch.setattr(recorder, "PIPELINED", ("selection.top",))
    assert recorder.measure(launch, 80)["verdict"] == "loads are not pipelined"


def test_a_recording_launches_nothing_and_leaves_the_kernels_as_they_were(recorder):
    from nsa.kernels import selection

    before = selection.capability
    case = recorder.Case(1 << 20, 1 << 20, 6, 64, torch.bfloat16)  # 96 GiB of queries, were they real
    names = {launch.name for launch in recorder.launches(case, 89)}
    assert {"selection.score", "selection.top"} <= names
    assert selection.capability is before
