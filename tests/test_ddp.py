"""Two processes over gloo are one process; only rank 0 writes; no rank waits for one that is gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nsa.records import TrainRow, ValRow, read_rows
from nsa.train import checkpoint, config, dist
from nsa.train.errors import ConfigError
from nsa.train.loop import train

ROOT = Path(__file__).resolve().parents[1]
STEPS = 6


def a_config(out_dir, *, reduce="fp32", **loop):
    step = {"seq_len": 32, "batch_size": 4, "accumulate_grad_batches": 2, "lr": 5e-3, "seed": 5}
    cadence = {"steps": STEPS, "save_every": 3, "eval_every": 3, "eval_batches": 2, "log_every": 1}
    return config.build(
        {
            "model": {"vocab_size": 64, "dim": 16, "n_heads": 2, "n_kv_groups": 1, "d_k": 8, "d_v": 8},
            "nsa": {"l": 4, "d": 2, "l_sel": 4, "n_sel": 3, "w": 8, "phi": "mlp"},
            "data": {"dataset": "synthetic"},
            "runtime": {"device": "cpu", "gradient_checkpointing": True, "reduce": reduce},
            "train": {**step, **cadence, **loop, "out_dir": str(out_dir)},
        }
    )


def quiet(line: str) -> None:
    pass


def start(cfg, *arguments, ranks=2, first=""):
    """Start the script on each rank; `first` is Python that each runs before it."""
    path = Path(cfg.train.out_dir).with_suffix(".yaml")
    path.write_text(json.dumps(cfg.as_dict()))
    script = path.with_suffix(".py")
    main = str(ROOT / "scripts" / "train_showcase.py")
    script.write_text(
        f"import runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\n{first}\n"
        f"runpy.run_path({main!r}, run_name='__main__')\n"
    )
    # The launcher's module form: the same interpreter as this test's, whatever PATH holds.
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.Popen(
        [*launcher, str(script), *arguments],
        env={**os.environ, "CONFIG": str(path), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    try:
        stdout, stderr = process.communicate(timeout=150)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, stdout, stderr


def wait_for_line(process, start_of_line):
    for line in process.stdout:
        if line.startswith(start_of_line):
            return
    pytest.fail(f"the run ended before it printed {start_of_line!r}: {process.stderr.read()[-2000:]}")


def test_two_ranks_repeat_one_process(tmp_path):
    code, stdout, stderr = finish(start(a_config(tmp_path / "two")))
    assert code == 0, stderr[-2000:]
    train(a_config(tmp_path / "one"), emit=quiet)
    one, two = (read_rows(tmp_path / name / "training.csv", TrainRow) for name in ("one", "two"))
    assert [row.step for row in two] == list(range(1, STEPS + 1))
    assert [row.loss for row in two] == pytest.approx([row.loss for row in one], rel=1e-5)
    assert [row.lr for row in two] == [row.lr for row in one]
    validations = [read_rows(tmp_path / name / "val.csv", ValRow) for name in ("one", "two")]
    assert [row.val_loss for row in validations[1]] == pytest.approx([r.val_loss for r in validations[0]], rel=1e-5)
    # one writer: rank 0's lines once, one file of each kind, a heartbeat of each rank
    assert [line[:9] for line in stdout.splitlines() if "| loss" in line] == [
        f"step {n:04d}" for n in range(1, STEPS + 1)
    ]
    files = sorted(file.name for file in (tmp_path / "two").iterdir() if file.is_file())
    kept = [
        "checkpoint_000003.pt",
        "checkpoint_000006.pt",
        "env.json",
        "heartbeat_rank0.jsonl",
        "heartbeat_rank1.jsonl",
    ]
    assert files == [*kept, "metrics.json", "training.csv", "val.csv"]
    metrics = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert (metrics["world_size"], metrics["batch_global"], metrics["tokens"]) == (2, 8, STEPS * 8 * 32)
    ours, theirs = (checkpoint.load(checkpoint.path_of(tmp_path / name, STEPS)) for name in ("two", "one"))
    for name, value in theirs["model"].items():
        torch.testing.assert_close(ours["model"][name], value, rtol=1e-4, atol=1e-5)
    states = [rank["rng"]["torch"] for rank in ours["ranks"]]
    assert len(states) == 2
    assert not torch.equal(*states), "each rank draws from its own generator"
    # and one process goes on from what two began
    resumed = a_config(tmp_path / "on", resume=str(checkpoint.path_of(tmp_path / "two", 3)))
    train(resumed, emit=quiet)
    rows = read_rows(tmp_path / "on" / "training.csv", TrainRow)
    assert [row.loss for row in rows] == pytest.approx([row.loss for row in one], rel=1e-5)


# Each rank's host reads a step when it has launched the next, as on cards.
AHEAD = "from nsa.train import loop\nloop.runs_ahead = lambda device: True"


def test_ranks_that_run_ahead_stop_at_one_step_and_repeat_one_process(tmp_path):
    out = tmp_path / "run"
    process = start(a_config(out, steps=100_000, lr_schedule="constant", save_every=0, eval_every=0), first=AHEAD)
    wait_for_line(process, "step 0003 | loss")
    os.kill(_pid_of_rank_1(process.pid), signal.SIGTERM)
    code, _, _ = finish(process)
    assert code != 0
    (last,) = checkpoint.list_checkpoints(out)
    rows = read_rows(out / "training.csv", TrainRow)
    assert [row.step for row in rows] == list(range(1, checkpoint.load(last)["step"] + 1))
    few = min(len(rows), 8)
    train(a_config(tmp_path / "one", steps=few, lr_schedule="constant"), emit=quiet)
    one = read_rows(tmp_path / "one" / "training.csv", TrainRow)
    assert [row.loss for row in rows[:few]] == pytest.approx([row.loss for row in one], rel=1e-5)
    ends = [json.loads((out / f"heartbeat_rank{r}.jsonl").read_text().splitlines()[-1]) for r in range(2)]
    assert {(end["event"], end["step"]) for end in ends} == {("end", rows[-1].step)}


DATA_DIES = """
import os
from nsa.train.errors import LostDataError
from nsa.train.loader import Loader
real, calls = Loader.next, []
def next(self):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 8:
        raise LostDataError("data process 3 died")
    return real(self)
Loader.next = next
"""


@pytest.mark.parametrize("ahead", ["", AHEAD], ids=["at once", "a step late"])
def test_a_rank_whose_data_breaks_off_stops_all_with_a_checkpoint(tmp_path, ahead):
    """In its step 4, after a micro-batch of it; rank 0 has the data of that step and of the next."""
    out = tmp_path / "run"
    code, _, stderr = finish(start(a_config(out, save_every=0, eval_every=0), first=ahead + DATA_DIES))
    assert code == 1
    assert "step 4: data process 3 died;\ngo on from " + str(out / "checkpoint_000003.pt") in stderr
    (last,) = checkpoint.list_checkpoints(out)
    train(a_config(tmp_path / "one", save_every=3), emit=quiet)
    ours, theirs = checkpoint.load(last), checkpoint.load(tmp_path / "one" / "checkpoint_000003.pt")
    assert (last.name, ours["step"]) == ("checkpoint_000003.pt", 3)
    assert [rank["data"] for rank in ours["ranks"]] == 2 * [theirs["ranks"][0]["data"]]
    for name, value in theirs["model"].items():
        torch.testing.assert_close(ours["model"][name], value, rtol=1e-4, atol=1e-5)


def test_bf16_reduction_where_it_cannot_be_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"runtime\.reduce = bf16: NCCL can, gloo on a cpu cannot; set it to fp32"):
        train(a_config(tmp_path / "run", reduce="bf16"), emit=quiet)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: NCCL reduces")
def test_gradients_reduced_in_bf16_are_rounded_and_still_learn_the_same(tmp_path):
    """A group of one card: what it sends is rounded all the same."""
    losses, moments = [], []
    for reduce in ("fp32", "bf16"):
        cfg = a_config(tmp_path / reduce, reduce=reduce)
        cuda = {**cfg.as_dict()["runtime"], "device": "cuda", "ddp": 1}
        code, _, stderr = finish(start(config.build({**cfg.as_dict(), "runtime": cuda}), ranks=1))
        assert code == 0, stderr[-2000:]
        losses.append([row.loss for row in read_rows(tmp_path / reduce / "training.csv", TrainRow)])
        saved = checkpoint.load(checkpoint.path_of(tmp_path / reduce, STEPS))
        moments.append(saved["optimizer"]["state"][0]["exp_avg"])
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)
    assert not torch.allclose(*moments, rtol=1e-4, atol=1e-7)


def test_a_launcher_that_is_told_to_stop_leaves_a_checkpoint(tmp_path):
    out = tmp_path / "run"
    process = start(a_config(out, steps=100_000, save_every=0, eval_every=0))
    wait_for_line(process, "step 0002 | loss")
    process.send_signal(signal.SIGTERM)
    code, _, _ = finish(process)
    assert code != 0
    (last,) = checkpoint.list_checkpoints(out)
    assert checkpoint.load(last)["step"] == read_rows(out / "training.csv", TrainRow)[-1].step
    ends = [json.loads((out / f"heartbeat_rank{r}.jsonl").read_text().splitlines()[-1]) for r in range(2)]
    assert {(end["event"], end["step"]) for end in ends} == {("end", int(last.stem[-6:]))}


def test_a_rank_that_dies_ends_the_run(tmp_path):
    out = tmp_path / "run"
    process = start(a_config(out, steps=100_000, save_every=2, eval_every=0))
    wait_for_line(process, "step 0004 | loss")
    victim = _pid_of_rank_1(process.pid)
    os.kill(victim, signal.SIGKILL)
    began = time.monotonic()
    code, _, _ = finish(process)
    assert code != 0
    assert time.monotonic() - began < 120
    assert checkpoint.last_good(out) == checkpoint.list_checkpoints(out)[-1]


def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path):
    out = tmp_path / "run"
    process = start(a_config(out, steps=100_000, save_every=0, eval_every=0))
    wait_for_line(process, "step 0002 | loss")
    os.kill(_pid_of_rank_1(process.pid), signal.SIGTERM)
    code, _, _ = finish(process)
    assert code != 0
    (last,) = checkpoint.list_checkpoints(out)
    assert checkpoint.load(last)["step"] == read_rows(out / "training.csv", TrainRow)[-1].step


def _pid_of_rank_1(launcher):
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{child}/environ").read_bytes() + b"\0":
            return int(child)
    pytest.fail("the launcher has no child of rank 1")


@pytest.mark.parametrize(
    ("ddp", "variables", "said"),
    [
        (1, {}, r"runtime\.ddp = 1 but RANK is not set"),
        (0, {"RANK": "0", "WORLD_SIZE": "2"}, r"runtime\.ddp = 0 with WORLD_SIZE = 2"),
        (-1, {"WORLD_SIZE": "2"}, r"WORLD_SIZE = 2 but RANK, MASTER_ADDR, MASTER_PORT not set: start with torchrun"),
    ],
)
def test_a_launch_that_does_not_fit_is_named(monkeypatch, ddp, variables, said):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=said):
        dist.init(ddp, "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")
def test_cuda_where_there_is_none_is_named():
    with pytest.raises(ConfigError, match=r"runtime\.device = cuda: .* sees no CUDA; set runtime\.device=cpu"):
        dist.init(-1, "cuda")
