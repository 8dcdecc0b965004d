"""summary.md says the verdict first, shows the figures, survives broken files, and cannot be made to lie by a step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from report_factory import Run, make_run

from ci import evidence
from ci.outcome import RunResult
from ci.summary import MAX_BYTES, plain, render_markdown


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path)


def with_step(result: RunResult, **changes: object) -> RunResult:
    first, *rest = result.steps
    return replace(result, steps=[replace(first, **changes), *rest])  # type: ignore[arg-type]


def test_first_line_is_the_verdict_and_what_is_not_proven(run: Run) -> None:
    first, *others = render_markdown(run.result, run.artifacts).splitlines()
    what = "correctness on the CPU, 1 of its tests; Triton forward against the reference"
    assert first == f"READY ON CPU. Not proven: {what}."
    assert "- Triton forward against the reference: needs CUDA" in others


def test_not_ready_names_the_step_and_its_command(run: Run) -> None:
    failed = with_step(run.result, verdict="FAILED", reason="2 of 3 tests failed", exit_code=1, failed=2)
    text = render_markdown(replace(failed, verdict="NOT READY", exit_code=1), run.artifacts)
    assert text.splitlines()[0].startswith("NOT READY (exit code 1). Failing: maths.")
    assert "```sh\nPYTHONPATH=. pytest -q -k 'masks or blocks'\n```" in text


def test_ready_says_so(run: Run) -> None:
    ready = replace(run.result, verdict="READY", not_proven=[])
    assert render_markdown(ready, run.artifacts).startswith("READY. Every step of this profile was proven.")


def test_figures_environment_and_paths_are_there(run: Run) -> None:
    text = render_markdown(run.result, run.artifacts)
    for fact in (
        "| training loss | 5.526 → 2.62 | 200 steps at 3,200 toks/s; validation 2.79 |",
        "| 4,096 | 2.4 | 0.65 | 0.8 | 0.5 | 7.2 | 3.6 | 1,791 | 1,791 |",
        "| long context | 48 s | prefill of 65,536 tokens; 428,367,872 reads, as expected |",
        "| torch | 2.13.0+cpu |",
        "| GPU | none |",
        "| CPU | Fixture CPU 9000 |",
        "| memory | 8.0 GiB |",
        "`artifacts/train_showcase/step_000200.pt`",
        "nsa-readiness-0123456789ab-cpu-r1.tar.gz",
        "| correct | maths | ✅ PASSED | 2 | 0 | 1 | 12.5 | 210 | needs CUDA |",
    ):
        assert fact in text, fact


@pytest.mark.parametrize(
    ("dense", "shown"), [(7.2, "3x faster than dense (7.2 ms)"), (0.6, "4x slower than dense (0.6 ms)")]
)
def test_decode_says_who_wins(dense: float, shown: str) -> None:
    assert evidence.against_dense({"ms_total": 2.4, "ms_dense": dense}) == shown


def test_the_showcase_comes_before_other_training(run: Run) -> None:
    run.write("ddp_cpu/training.csv", "step,loss,lr,toks_per_s\n1,5,1,1\n2,4,1,1\n")
    text = render_markdown(run.result, run.artifacts)
    assert text.index("| training loss |") < text.index("| training loss (ddp_cpu) | 5 → 4 |")


def test_counts_that_differ_from_the_expected_are_shown(run: Run) -> None:
    text = (run.artifacts / "test-reports/demo_64k.txt").read_text()
    run.write("test-reports/demo_64k.txt", text.replace("reads_expected=428367872", "reads_expected=428367873"))
    assert "428,367,872 reads, expected 428,367,873" in render_markdown(run.result, run.artifacts)


def test_an_empty_folder_is_reported_as_not_written(run: Run, tmp_path: Path) -> None:
    text = render_markdown(run.result, tmp_path / "nothing")
    assert "| training loss | not written | artifacts/train_showcase/training.csv |" in text
    assert "artifacts/bench/decode.csv: not written" in text
    assert "none written" in text


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("bench/decode.csv", b"S,ms\n1,2\n", "no column 'ms_total'"),
        ("bench/decode.csv", b"", "no column 'S'"),
        ("train_showcase/training.csv", b"step,loss,lr,toks_per_s\n1,oops,1,1\n", "line 2 is unreadable"),
        ("train_showcase/training.csv", b"step,loss,lr,toks_per_s\n1,2.5\n", "line 2 is unreadable"),
        ("train_showcase/training.csv", b"step,loss,lr,toks_per_s\n", "a header and no rows"),
        ("train_showcase/val.csv", b"\xff\xfe\x00", "unreadable: UnicodeDecodeError"),
        ("train_showcase/metrics.json", b"{", "not JSON"),
        ("test-reports/routing.json", b"[1]", "a JSON list, not an object"),
        ("test-reports/demo_64k.txt", b"killed\n", "no line '-- demo_64k summary --'"),
        (
            "test-reports/demo_64k.txt",
            b"-- demo_64k summary --\nS=64 prefill_time_ms=x\n",
            "no number prefill_time_ms=",
        ),
        ("test-reports/needle.json", b'[{"S": 1}]', "lacks 'depth'"),
        ("test-reports/needle.json", b'[{"S": 1, "depth": "a", "score": 1}]', "a cell is not numbers"),
        ("test-reports/kernels.json", b'{"kernels": []}', "no list of objects"),
    ],
)
def test_a_malformed_file_is_reported_and_stops_nothing(run: Run, name: str, content: bytes, says: str) -> None:
    path = run.artifacts / name
    path.write_bytes(content)
    text = render_markdown(run.result, run.artifacts)
    assert text.startswith("READY ON CPU")
    line = next(line for line in text.splitlines() if line.startswith(f"- artifacts/{name}: "))
    assert plain(says) in line


def test_not_a_number_is_shown_as_such(run: Run) -> None:
    run.write("train_showcase/training.csv", "step,loss,lr,toks_per_s\n1,5.6,1,1\n2,nan,1,1\n")
    assert "5.6 → nan" in render_markdown(run.result, run.artifacts)


def test_hostile_output_stays_text(run: Run) -> None:
    hostile = with_step(run.result, skip_reasons=["<script>alert(1)</script> | @team\n# READY [x](http://evil)"])
    text = render_markdown(hostile, run.artifacts)
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; \\| &#64;team # READY \\[x](http://evil)" in text
    assert not any(line.startswith("# READY") for line in text.splitlines())


def test_a_command_with_a_fence_stays_inside_its_block(run: Run) -> None:
    failed = with_step(run.result, verdict="FAILED", reproduce="echo '\n```\n# READY'")
    assert "````sh\necho '\n```\n# READY'\n````" in render_markdown(failed, run.artifacts)


def test_stays_below_the_limit_and_keeps_the_verdict(run: Run) -> None:
    steps = [replace(run.result.steps[0], id=f"step{i}", reason="x" * 5000) for i in range(4000)]
    text = render_markdown(replace(run.result, steps=steps), run.artifacts)
    assert len(text.encode()) <= MAX_BYTES
    assert text.startswith("READY ON CPU")
    assert text.endswith("(cut at 900 KiB; summary.html has the rest)\n")


@pytest.mark.parametrize(
    ("value", "shown"), [(0.5, "0.5 s"), (41.2, "41 s"), (89.6, "90 s"), (305, "5 min 5 s"), (3725, "1 h 2 min")]
)
def test_durations_read_naturally(value: float, shown: str) -> None:
    assert evidence.duration(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (2.0, "2"), (0.01234, "0.0123"), (999.5, "1e+03"), (1234567.0, "1,234,567"), (float("inf"), "inf")],
)
def test_numbers_read_naturally(value: float, shown: str) -> None:
    assert evidence.num(value) == shown
