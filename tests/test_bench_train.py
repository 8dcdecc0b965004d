"""bench_train on a CPU: both twins, every column, and what a trace says of the device."""

from __future__ import annotations

import csv
import json
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nsa.config import ModelConfig, NSAConfig
from nsa.records import StepRow, header
from nsa.train import config
from nsa.train.flops import flops_per_token, peak_flops

ROOT = Path(__file__).resolve().parents[1]


def run(*args):
    command = [sys.executable, "bench/bench_train.py", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Both twins at two lengths, two steps each."""
    folder = tmp_path_factory.mktemp("train")
    outputs = ["--csv", folder / "a.csv", "--json", folder / "a.json", "--plot", folder / "a.png"]
    done = run("--S", 64, 32, "--batch-tokens", 64, "--steps", 2, *outputs)
    assert done.returncode == 0, done.stderr
    with (folder / "a.csv").open(newline="") as file:
        return done, list(csv.DictReader(file)), folder


def test_a_row_for_every_twin_and_length_with_its_speed_and_parts(measured):
    _, rows, folder = measured
    assert (folder / "a.csv").read_text().splitlines()[0] == ",".join(header(StepRow))
    twins = [("32", "2", "nsa"), ("32", "2", "dense"), ("64", "1", "nsa"), ("64", "1", "dense")]
    assert [(r["S"], r["batch"], r["attention"]) for r in rows] == twins
    for row in rows:
        assert (row["status"], row["mode"], row["wait_ms"], row["mfu"]) == ("ok", "eager", "0", "")
        assert float(row["tokens_per_s"]) == pytest.approx(64e3 / float(row["ms_step"]), rel=1e-4)
        assert min(float(row[part]) for part in ("ms_attention", "ms_head", "first_s")) > 0
        assert float(row["loss"]) == pytest.approx(5.55, abs=0.2)  # ids are random: about ln 256
    nsa, dense = rows[:2]
    ratio = float(nsa["tokens_per_s"]) / float(dense["tokens_per_s"])
    assert float(nsa["vs_dense"]) == pytest.approx(ratio, rel=1e-4)
    assert float(dense["vs_dense"]) == 1


def test_a_table_a_picture_and_a_line_of_json(measured):
    done, rows, folder = measured
    lines = done.stdout.splitlines()
    assert re.match(r" *S +batch +twin +mode +tokens/s +MFU", lines[0])
    assert len(lines) == 1 + len(rows) + 1
    assert (folder / "a.png").read_bytes().startswith(b"\x89PNG")
    last = json.loads(lines[-1])
    assert (folder / "a.json").read_text() == lines[-1] + "\n"
    assert (last["bench"], last["batch_tokens"], last["dtype"]) == ("train", 64, "float32")
    assert [(r["S"], r["attention"]) for r in last["rows"]] == [(int(r["S"]), r["attention"]) for r in rows]
    assert "first step" in done.stderr


def test_what_the_minutes_cut_off_is_said():
    done = run("--S", 32, "--batch-tokens", 32, "--minutes", 0)
    assert done.returncode == 0, done.stderr
    assert {r["status"] for r in json.loads(done.stdout.splitlines()[-1])["rows"]} == {"not run: 0 minutes were over"}


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--S", "0"], "--S"),
        (["--S", "48", "--batch-tokens", "64"], "64 is no multiple of S = 48"),
        (["--twins", "linear"], "--twins"),
        (["--config", "configs/none.yaml"], "configs/none.yaml"),
        (["--csv", "."], "--csv"),
    ],
)
def test_a_bad_flag_is_refused_in_one_line(args, named):
    done = run(*args)
    assert done.returncode == 2
    assert named in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


# The profile


def _event(category, name, start, duration, thread=1, **arguments):
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "tid": thread, "args": arguments}


def test_a_kernel_belongs_to_the_operator_that_launched_it():
    """On its own thread, whenever it runs; overlapping kernels keep the device busy once; annotations are no work."""
    work = runpy.run_path(str(ROOT / "bench/train_profile.py"))["work"]
    found = work(
        [
            _event("cpu_op", "nsa::selected_attention", 0, 10, **{"External id": 1}),
            _event("cuda_runtime", "cudaLaunchKernel", 3, 1, correlation=7),
            _event("cpu_op", "nsa::linear_cross_entropy", 20, 10, **{"External id": 2}),
            _event("cpu_op", "aten::mm", 22, 2, **{"External id": 3}),
            _event("cuda_driver", "cuLaunchKernelEx", 23, 1, correlation=8),
            _event("cuda_runtime", "cudaLaunchKernel", 4, 1, thread=2, correlation=9),  # another thread's
            _event("kernel", "block_forward", 100, 50, correlation=7),
            _event("kernel", "gemm", 140, 30, correlation=8),
            _event("kernel", "norm", 200, 5, correlation=9),
            _event("gpu_memcpy", "copy", 300, 2, correlation=99, **{"External id": 3}),  # launch not recorded
            _event("gpu_user_annotation", "Optimizer.step", 0, 10_000),
            {"ph": "M", "name": "process_name"},
        ]
    )
    assert found == (70 + 5 + 2, 50, 32)


def test_on_a_cpu_the_outermost_operators_are_the_work():
    work = runpy.run_path(str(ROOT / "bench/train_profile.py"))["work"]
    found = work(
        [
            _event("cpu_op", "aten::scaled_dot_product_attention", 0, 10),
            _event("cpu_op", "aten::_scaled_dot_product_flash_attention_for_cpu", 1, 8),
            _event("cpu_op", "nsa::linear_cross_entropy", 20, 6),
            _event("cpu_op", "aten::add", 30, 4),
        ]
    )
    assert found == (20, 10, 6)


# MFU


def test_the_operations_of_a_token_are_counted_by_hand():
    """One layer, one head, dense: 2 x (q, k, v, o, SwiGLU, head) + scores and sums over (S+1)/2 keys."""
    shape = {
        "vocab_size": 10,
        "dim": 4,
        "n_layers": 1,
        "n_heads": 1,
        "n_kv_groups": 1,
        "d_k": 2,
        "d_v": 3,
        "ffn_dim": 5,
    }
    dense = ModelConfig(**shape, attention="dense")
    weights = 4 * (2 + 2 + 3) + 3 * 4 + 3 * 4 * 5 + 10 * 4
    assert flops_per_token(dense, 7) == 3 * (2 * weights + 2 * (2 + 3) * 4)
    # NSA at S = 3: reads are 0, 1, 1 compressed blocks; 1, 2, 2 tokens of blocks and 1, 2, 3 of the window.
    nsa = ModelConfig(**shape, nsa=NSAConfig(l=2, d=2, l_sel=2, n_sel=3, w=3))
    branches = 2 * 4 * (2 + 3) + 4 * 3
    keys = (0 + 1 + 1 + 1 + 2 + 3 + 1 + 2 + 3) / 3
    assert flops_per_token(nsa, 3) == pytest.approx(3 * (2 * (weights + branches) + 2 * 5 * keys) + 2 * 2 * 2 / 3)


def test_the_125m_models_operations_are_about_six_a_weight_and_attentions_own():
    cfg = config.load(ROOT / "configs/m7c_125m.yaml").model
    assert flops_per_token(cfg, 4096) == pytest.approx(6 * 123.9e6, rel=0.25)
    dense = replace(cfg, attention="dense")
    assert flops_per_token(dense, 65536) > 3 * flops_per_token(cfg, 65536)
    growth = flops_per_token(dense, 65536) - flops_per_token(dense, 32768)
    assert growth == 3 * 12 * 2 * 12 * 128 * 32768 / 2


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_the_peak_of_a_card_is_its_data_sheets(name, tflops):
    assert peak_flops(name) == tflops * 1e12


def test_an_unknown_card_has_no_peak():
    assert peak_flops("NVIDIA B300") is None
