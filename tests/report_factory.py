"""A small, complete readiness run on disk: what the tests of the reports and of the bundle start from."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ci import contract, outcome
from ci.outcome import FileRecord, RunResult, StepRecord
from ci.runbook import Runbook, Step, load
from ci.summary import render_markdown

STARTED = 1_700_000_000.0
SHA = "0123456789abcdef0123456789abcdef01234567"

RUNBOOK = r"""
schema = 1
[profiles.cpu]
title = "no GPU"
gpus = 0
[profiles.a100]
title = "one A100"
gpus = 1

[[stages]]
id = "correct"
number = 1
title = "Correctness"
about = "The mathematics."
[[stages]]
id = "work"
number = 2
title = "Work"
about = "Training, decode, long context."

[[steps]]
id = "maths"
stage = "correct"
title = "correctness on the CPU"
kind = "pytest"
command = "PYTHONPATH=. pytest -q -k 'masks or blocks'"
output = "artifacts/test-reports/maths.txt"
timeout = 60
expect = { "*" = "run" }
allow = { "*" = ["CUDA"] }
deliverables = [{ path = "artifacts/test-reports/maths.txt" }]
[[steps]]
id = "kernels"
stage = "correct"
title = "Triton forward against the reference"
kind = "pytest"
command = "pytest -q tests_gpu.py"
output = "artifacts/test-reports/kernels.txt"
timeout = 60
expect = { cpu = "skip_ok", "*" = "run" }
allow = { cpu = ["CUDA"] }
deliverables = [{ path = "artifacts/test-reports/kernels.txt" }]
[[steps]]
id = "routing"
stage = "correct"
title = "routing snapshot"
kind = "script"
command = "python scripts/print_routing.py > artifacts/test-reports/routing.json"
timeout = 60
expect = { "*" = "run" }
deliverables = [{ path = "artifacts/test-reports/routing.json" }]
[[steps]]
id = "train"
stage = "work"
title = "showcase training"
kind = "script"
command = "python scripts/train_showcase.py > artifacts/train/train_showcase.txt"
timeout = 60
expect = { "*" = "run" }
deliverables = [
  { path = "artifacts/train/train_showcase.txt" },
  { path = "artifacts/train_showcase/training.csv", header = "step,loss,lr,toks_per_s" },
  { path = "artifacts/train_showcase/val.csv", header = "step,val_loss,ppl" },
  { path = "artifacts/train_showcase/metrics.json" },
]
assertions = [{ file = "artifacts/train_showcase/training.csv", column = "loss", falls = 0.97 }]
[[steps]]
id = "decode"
stage = "work"
title = "decode bench"
kind = "script"
command = "python bench/bench_decode.py --csv artifacts/bench/decode.csv"
timeout = 60
expect = { "*" = "run" }
deliverables = [{ path = "artifacts/bench/decode.csv", header = "S,ms_total,ms_cmp,ms_sel,ms_win" }]
[[steps]]
id = "demo"
stage = "work"
title = "prefill of 65,536 tokens"
kind = "script"
command = "python scripts/demo_64k.py > artifacts/test-reports/demo_64k.txt"
timeout = 60
expect = { "*" = "run" }
deliverables = [{ path = "artifacts/test-reports/demo_64k.txt" }]
"""

MATHS_XML = """<?xml version="1.0" encoding="utf-8"?>
<testsuites name="pytest tests"><testsuite name="correct.maths" errors="0" failures="0" skipped="1" tests="3">
<testcase classname="nsa.tests.test_masks" name="test_causal" time="0.4" />
<testcase classname="nsa.tests.test_block_math" name="test_taps" time="0.3" />
<testcase classname="nsa.tests.test_masks" name="test_cuda" time="0.1">
<skipped type="pytest.skip" message="needs CUDA">nsa/tests/test_masks.py:9: needs CUDA</skipped></testcase>
</testsuite></testsuites>
"""
MATHS_TXT = "...\nSKIPPED [1] nsa/tests/test_masks.py:9: needs CUDA\n2 passed, 1 skipped in 1.20s\n"
KERNELS_XML = """<?xml version="1.0" encoding="utf-8"?>
<testsuites name="pytest tests"><testsuite name="correct.kernels" errors="0" failures="0" skipped="2" tests="2">
<testcase classname="tests_gpu" name="test_forward" time="0"><skipped message="needs CUDA">x</skipped></testcase>
<testcase classname="tests_gpu" name="test_backward" time="0"><skipped message="needs CUDA">x</skipped></testcase>
</testsuite></testsuites>
"""
DEMO = """-- demo_64k summary --
device: cpu
B=1 S=65536 dim=512 heads=8 G=2 dk=64 dv=64
rope_scale=8.0 prefill_tile=4096 w=4096 n_sel=8
prefill_time_ms=48210.55 reads_total=428367872
reads_cmp=134152192 reads_sel=33538048 reads_win=260677632 reads_expected=428367872
peak_mb=911.2
"""
ENV: dict[str, Any] = {
    "git_sha": SHA,
    "dirty": False,
    "python": "3.11.9",
    "torch": {"torch": "2.13.0+cpu", "cuda": False, "cuda_build": None, "devices": []},
    "versions": {"torch": "2.13.0+cpu", "numpy": "1.26.4"},
    "platform": "Linux-6.1-x86_64",
    "cpu": "Fixture CPU 9000",
    "cores": 2,
    "memory_mb": 8192,
    "gpus": [],
}


@dataclass
class Run:
    """Where a run lies, and how it was judged."""

    root: Path
    artifacts: Path
    book: Runbook
    runbook: Path
    result: RunResult

    def write(self, name: str, text: str) -> Path:
        path = self.artifacts / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def record(self, step_id: str, **changes: Any) -> None:
        """Writes the step's record, with the digests of what lies on disk now."""
        step = next(step for step in self.book.steps if step.id == step_id)
        record = replace(_record(step, self.artifacts), **changes)
        outcome.save(record, self.artifacts / "results" / f"{step.key}.json")

    def judge(self) -> RunResult:
        """Judges again what lies on disk, and writes result.json, exit.json and summary.md."""
        self.result = contract.judge(self.book, "cpu", self.artifacts)
        outcome.save(self.result, self.artifacts / "result.json")
        said = {"code": self.result.exit_code, "verdict": self.result.verdict}
        self.write("exit.json", json.dumps(said))
        self.write("summary.md", render_markdown(self.result, self.artifacts))
        return self.result


def make_run(root: Path) -> Run:
    """A run that is READY ON CPU, with every file the reports read."""
    runbook = root / "planted.toml"
    runbook.write_text(RUNBOOK)
    artifacts = root / "artifacts"
    run = Run(root, artifacts, load(runbook), runbook, None)  # type: ignore[arg-type]
    run.write("env.json", json.dumps({**ENV, "runbook_sha256": run.book.sha256}))
    run.write("test-reports/maths.txt", MATHS_TXT)
    run.write("junit/correct.maths.xml", MATHS_XML)
    run.write("test-reports/kernels.txt", "ss\n2 skipped in 0.10s\n")
    run.write("junit/correct.kernels.xml", KERNELS_XML)
    run.write("test-reports/routing.json", json.dumps({"cuda": False, "torch": "2.13.0+cpu", "triton": "<none>"}))
    run.write("train/train_showcase.txt", "step 0001 | loss 5.6200 | lr 2.80e-05 | toks/s 3100\n")
    losses = [(step, 2.6 + 3.0 * math.exp(-step / 40), 3e-4, 3100.0 + step) for step in (1, *range(20, 201, 20))]
    run.write("train_showcase/training.csv", "step,loss,lr,toks_per_s\n" + _lines(losses))
    run.write("train_showcase/val.csv", "step,val_loss,ppl\n100,3.01,20.3\n200,2.79,16.3\n")
    run.write("train_showcase/metrics.json", json.dumps({"device": "cpu", "steps": 200, "loss_last": 2.62}))
    run.write("train_showcase/step_000200.pt", "weights")
    run.write("train_showcase.1/training.csv", "step,loss,lr,toks_per_s\n1,9.9,1,1\n")
    run.write("bench/decode.csv", _decode())
    run.write("test-reports/demo_64k.txt", DEMO)
    run.write("tracked/note.txt", "kept by hand\n")
    run.write("tracked/.gitkeep", "")
    for step in run.book.steps:
        run.record(step.id)
    run.judge()
    return run


def _record(step: Step, artifacts: Path) -> StepRecord:
    files = []
    for item in step.deliverables:
        path = contract.local(artifacts, item.path)
        if path.is_file():
            files.append(FileRecord(item.path, path.stat().st_size, STARTED + 5, contract.digest(path)))
    return StepRecord(
        step.id,
        step.stage,
        step.command,
        step.kind,
        profile="cpu",
        git_sha=SHA,
        run_id="r1",
        started=STARTED,
        wall_s=12.5,
        exit_code=0,
        peak_mb=210.0,
        files=files,
    )


def _decode() -> str:
    head = (
        "S,ms_total,ms_cmp,ms_sel,ms_win,reads_actual,reads_expected,reads_actual_decode,reads_expected_decode,"
        "ms_dense,speedup,bytes_per_token\n"
    )
    rows = []
    for S in (512, 1024, 2048, 4096):
        reads = (S - 32) // 16 + 1 + min(S, 1024) + min(S, 512)
        dense = 0.9 * S / 512
        rows.append(
            (S, 1.9 + S / 8192, 0.4 + S / 16384, 0.8, 0.5, reads * S, reads * S, reads, reads, dense, dense / 2, 9)
        )
    return head + _lines(rows)


def _lines(rows: list[tuple[Any, ...]]) -> str:
    return "".join(",".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in row) + "\n" for row in rows)
