"""A run that is interrupted and resumed is the run that was not, and a damaged checkpoint is never believed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nsa.records import TrainRow, ValRow, read_rows
from nsa.train import checkpoint, config
from nsa.train.errors import CheckpointError, SaveError
from nsa.train.loop import train

ROOT = Path(__file__).resolve().parents[1]
STEPS = 8


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """So little text that the steps take it more than once: a resume falls inside an epoch."""
    folder = tmp_path_factory.mktemp("text")
    for n in range(5):
        (folder / f"{n}.txt").write_text(" ".join(f"word{n}x{i}" for i in range(30)))
    return folder


def a_config(out_dir, text, **loop):
    """Text, accumulation, validation and a schedule: everything whose position a checkpoint must hold."""
    step = {"seq_len": 32, "batch_size": 4, "accumulate_grad_batches": 2, "lr": 5e-3, "warmup_steps": 2, "seed": 5}
    cadence = {"steps": STEPS, "save_every": 3, "eval_every": 2, "eval_batches": 2, "log_every": 1}
    return config.build(
        {
            "model": {"dim": 16, "n_heads": 2, "n_kv_groups": 1, "d_k": 8, "d_v": 8},
            "nsa": {"l": 4, "d": 2, "l_sel": 4, "n_sel": 3, "w": 8, "phi": "mlp"},
            "data": {"dataset": "text", "path": str(text)},
            "runtime": {"device": "cpu"},
            "train": {**step, **cadence, **loop, "out_dir": str(out_dir)},
        }
    )


def drawing(line: str) -> None:
    """Draws from every generator once a step, as dropout would: a resume must bring their states back."""
    if "| loss" in line:
        random.random()
        torch.rand(1)
        pytest.importorskip("numpy", reason="its generator is part of the state").random.rand()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text):
    """The run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(a_config(out, text), emit=drawing)
    return out


def columns(out):
    """training.csv and val.csv without the one thing that may differ: the speed."""
    rows = [line.rsplit(",", 1)[0] for line in (out / "training.csv").read_text().splitlines()]
    return rows, (out / "val.csv").read_text()


def assert_same_run(out, whole):
    assert columns(out) == columns(whole)
    ours, theirs = (checkpoint.load(checkpoint.path_of(folder, STEPS)) for folder in (out, whole))
    assert ours["model"].keys() == theirs["model"].keys()
    for name, value in theirs["model"].items():
        assert torch.equal(ours["model"][name], value), name
    for index, state in theirs["optimizer"]["state"].items():
        assert all(torch.equal(ours["optimizer"]["state"][index][key], state[key]) for key in state)
    assert ours["optimizer"]["param_groups"] == theirs["optimizer"]["param_groups"]
    assert ours["ranks"][0]["data"] == theirs["ranks"][0]["data"]
    generators, expected = ours["ranks"][0]["rng"], theirs["ranks"][0]["rng"]
    assert torch.equal(generators["torch"], expected["torch"])
    assert (generators["python"], generators["numpy"]) == (expected["python"], expected["numpy"])
    assert json.loads((out / "metrics.json").read_text())["loss_first"] == pytest.approx(
        read_rows(whole / "training.csv", TrainRow)[0].loss, rel=1e-5
    )


def interrupted(out, text, *, at, signum=signal.SIGTERM):
    """A run that gets a signal when it logs step `at`."""

    def emit(line: str) -> None:
        drawing(line)
        if line.startswith(f"step {at:04d} | loss"):
            os.kill(os.getpid(), signum)

    return train(a_config(out, text), emit=emit)


def test_a_run_resumed_from_a_checkpoint_elsewhere_repeats_the_whole_run(tmp_path, text, whole):
    out = tmp_path / "run"
    train(a_config(out, text, resume=str(checkpoint.path_of(whole, 3))), emit=drawing)
    assert_same_run(out, whole)


@pytest.mark.parametrize(("signum", "at"), [(signal.SIGTERM, 4), (signal.SIGINT, 1)])
def test_a_signal_ends_the_step_and_the_run_goes_on_from_there(tmp_path, text, whole, signum, at):
    out, before = tmp_path / "run", signal.getsignal(signum)
    result = interrupted(out, text, at=at, signum=signum)
    assert result.signum == signum
    # the signal came after step `at` was done: one more step is finished
    assert result.checkpoint == checkpoint.path_of(out, at + 1)
    assert json.loads((out / "metrics.json").read_text())["ended"] == signal.Signals(signum).name
    assert signal.getsignal(signum) == before, "handlers are put back"
    resumed = train(a_config(out, text, resume=str(out)), emit=drawing)
    assert resumed.signum is None
    assert_same_run(out, whole)


def test_a_finished_run_resumed_does_nothing_more(tmp_path, text, whole):
    out = tmp_path / "run"
    train(a_config(out, text), emit=drawing)
    before = (out / "checkpoint_000008.pt").stat().st_mtime_ns
    assert train(a_config(out, text, resume=str(out)), emit=drawing).step == STEPS
    assert (out / "checkpoint_000008.pt").stat().st_mtime_ns == before
    assert_same_run(out, whole)


def start(config_path, *arguments):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "train_showcase.py"), *arguments],
        env={**os.environ, "CONFIG": str(config_path), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_line(process, start_of_line):
    for line in process.stdout:
        if line.startswith(start_of_line):
            return
    pytest.fail(f"the run ended before it printed {start_of_line!r}: {process.stderr.read()}")


def test_a_killed_run_resumes_from_its_last_checkpoint(tmp_path, text):
    """SIGKILL in the middle of a step, with rows written past the checkpoint."""
    path, out = tmp_path / "c.yaml", tmp_path / "run"
    path.write_text(json.dumps(a_config(out, text, steps=10_000, lr_schedule="constant", save_every=3).as_dict()))
    process = start(path)
    wait_for_line(process, "step 0005 | loss")
    process.kill()
    process.communicate()
    with (out / "training.csv").open("a") as file:
        file.write("6,4.2")  # half a line, as a kill may leave it
    last = checkpoint.list_checkpoints(out)[-1]
    step = int(last.stem.rpartition("_")[2])
    (out / f".{last.name}.partial").write_bytes(b"half a checkpoint")
    end = step + 4
    whole = tmp_path / "whole"
    train(a_config(whole, text, steps=end, lr_schedule="constant"), emit=drawing)
    train(a_config(out, text, steps=end, lr_schedule="constant", resume=str(out)), emit=drawing)
    assert columns(out) == columns(whole)
    assert [row.step for row in read_rows(out / "training.csv", TrainRow)] == list(range(1, end + 1))
    assert not list(out.glob(".*partial"))


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_script_exits_as_the_signal_says_after_a_checkpoint(tmp_path, text, signum, code):
    path, out = tmp_path / "c.yaml", tmp_path / "run"
    path.write_text(json.dumps(a_config(out, text, steps=10_000, save_every=0).as_dict()))
    process = start(path)
    wait_for_line(process, "step 0002 | loss")
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert signal.Signals(signum).name in stderr
    assert "Traceback" not in stderr
    (last,) = checkpoint.list_checkpoints(out)
    assert checkpoint.load(last)["step"] == read_rows(out / "training.csv", TrainRow)[-1].step


def test_a_second_signal_ends_at_once(tmp_path, text):
    """The step it interrupts would take far longer than the test waits."""
    path, out = tmp_path / "c.yaml", tmp_path / "run"
    endless = a_config(out, text, steps=2, accumulate_grad_batches=1_000_000)
    path.write_text(json.dumps(endless.as_dict()))
    process = start(path)
    while not (out / "heartbeat_rank0.jsonl").exists() and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert not list(out.glob("*checkpoint*"))


# --- damage ---


@pytest.fixture
def run_dir(tmp_path, whole):
    """A copy of the whole run, to damage."""
    out = tmp_path / "run"
    out.mkdir()
    for file in (f for f in whole.iterdir() if f.is_file()):
        (out / file.name).write_bytes(file.read_bytes())
    return out


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("harm", [cut, flip, empty])
def test_a_damaged_checkpoint_is_refused_and_the_last_good_one_named(run_dir, text, harm):
    damaged = run_dir / "checkpoint_000008.pt"
    harm(damaged)
    harm(run_dir / "checkpoint_000006.pt")
    for resume in (run_dir, damaged):
        with pytest.raises(CheckpointError) as error:
            train(a_config(run_dir, text, resume=str(resume)), emit=drawing)
        message = str(error.value).splitlines()
        assert message[0].startswith(f"{damaged}: damaged: ")
        assert message[1].endswith(f"pass --resume {run_dir / 'checkpoint_000003.pt'}")
        assert len(message) == 2
    assert len(read_rows(run_dir / "training.csv", TrainRow)) == STEPS, "nothing was trimmed"


def test_what_is_no_checkpoint_is_named(tmp_path, text):
    with pytest.raises(CheckpointError, match=r"gone\.pt: no such checkpoint"):
        checkpoint.find(tmp_path / "gone.pt")
    with pytest.raises(CheckpointError, match=r"holds no checkpoint_\*\.pt"):
        checkpoint.find(tmp_path)
    torch.save({"weights": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"other\.pt: is not a checkpoint of this trainer"):
        checkpoint.load(tmp_path / "other.pt")
    torch.save({"format": "nsa-train-0", "step": 3}, tmp_path / "old.pt")
    with pytest.raises(CheckpointError, match=r"old\.pt: is of format nsa-train-0 and this trainer reads nsa-train-"):
        checkpoint.load(tmp_path / "old.pt")


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint_000001.pt"
    checkpoint.save(path, {"format": checkpoint.FORMAT, "step": 1})

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(SaveError, match=r"No space left on device;\nthe last good one is .*checkpoint_000001\.pt"):
        checkpoint.save(path, {"format": checkpoint.FORMAT, "step": 2})
    assert checkpoint.load(path)["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_checkpoint_gets_its_name_only_after_its_bytes_are_on_the_disk(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint_000001.pt"
    done = []
    real_fsync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(("fsync", path.exists())), real_fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(("rename", path.exists())), real_replace(a, b))[1])
    checkpoint.save(path, {"format": checkpoint.FORMAT, "step": 1})
    assert done == [("fsync", False), ("rename", False), ("fsync", True)]


# --- what must match, and what may differ ---


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seq_len": 16}, r"train\.seq_len = 16, but .*checkpoint_000003\.pt was trained with 32"),
        ({"lr": 1.0}, r"train\.lr = 1\.0, but .* with 0\.005"),
        ({"steps": 9}, r"train\.steps = 9, but .* with 8"),
        ({"seed": 6}, r"train\.seed = 6, but .* with 5"),
    ],
)
def test_a_resume_under_another_configuration_names_the_key(tmp_path, text, whole, changed, said):
    cfg = a_config(tmp_path / "run", text, resume=str(whole / "checkpoint_000003.pt"), **changed)
    with pytest.raises(CheckpointError, match=said):
        train(cfg, emit=drawing)
    assert not (tmp_path / "run").exists()


def test_cadences_and_the_place_of_the_text_may_differ(tmp_path, text, whole):
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in text.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    out = tmp_path / "run"
    cfg = a_config(out, moved, resume=str(whole / "checkpoint_000006.pt"), log_every=7, save_every=1)
    train(cfg, emit=drawing)
    assert columns(out) == columns(whole)


def test_resuming_from_an_older_checkpoint_sets_the_newer_ones_aside(run_dir, text, whole):
    train(a_config(run_dir, text, steps=STEPS, resume=str(run_dir / "checkpoint_000003.pt")), emit=drawing)
    assert {"checkpoint_000006.pt.superseded1", "checkpoint_000008.pt.superseded1"} <= {
        f.name for f in run_dir.iterdir()
    }
    assert_same_run(run_dir, whole)
    assert [row.step for row in read_rows(run_dir / "val.csv", ValRow)] == [2, 4, 6, 8]


def test_every_generator_comes_back():
    numpy = pytest.importorskip("numpy", reason="its generator is part of the state")
    cpu = torch.device("cpu")
    draws = []
    state = checkpoint.rng_state(cpu)
    for _ in range(2):
        draws.append((random.random(), random.gauss(0, 1), numpy.random.rand(), torch.rand(3).tolist()))
        checkpoint.set_rng_state(state, cpu)
    assert draws[0] == draws[1]
