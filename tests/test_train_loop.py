"""The loop: it learns, counts in optimizer steps, leaves the promised files, and stops for a reason it names."""

from __future__ import annotations

import io
import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from nsa import routing
from nsa.model import Block, Transformer
from nsa.records import TrainRow, ValRow, read_rows
from nsa.train import checkpoint, config, loop
from nsa.train.errors import LostDataError, NonFiniteError, SaveError, UsageError
from nsa.train.loader import Loader
from nsa.train.loop import train
from nsa.train.optim import build_optimizer, lr_factor, parameter_groups, restore
from nsa.train.step import Launched, Stepper

ROOT = Path(__file__).resolve().parents[1]


def tiny(out_dir, *, precision="fp32", gradient_checkpointing=False, phi="avg", data=None, **loop):
    """A model that takes a step in some 20 ms and is sparse all the same."""
    loop = {"steps": 4, "seq_len": 32, "batch_size": 4, "lr": 1e-2, "log_every": 2, "seed": 3, **loop}
    return config.build(
        {
            "model": {"vocab_size": 64, "dim": 16, "n_layers": 1, "n_heads": 2, "n_kv_groups": 1, "d_k": 8, "d_v": 8},
            "nsa": {"l": 4, "d": 2, "l_sel": 4, "n_sel": 3, "w": 8, "phi": phi},
            "data": data or {"dataset": "synthetic"},
            "runtime": {
                "device": "cpu",
                "precision": precision,
                "gradient_checkpointing": gradient_checkpointing,
            },
            "train": {**loop, "out_dir": str(out_dir)},
        }
    )


def quiet(line: str) -> None:
    pass


def run(out_dir, **settings):
    """Train; the rows of training.csv."""
    train(tiny(out_dir, **settings), emit=quiet)
    return read_rows(out_dir / "training.csv", TrainRow)


def weights(out_dir, step):
    return torch.load(out_dir / f"checkpoint_{step:06d}.pt", weights_only=True)["model"]


def test_training_learns_what_repeats(tmp_path):
    rows = run(tmp_path / "run", steps=60)
    first = sum(row.loss for row in rows[:15]) / 15
    last = sum(row.loss for row in rows[-15:]) / 15
    assert abs(rows[0].loss - math.log(64)) < 0.5
    assert last < 0.93 * first


def test_every_step_has_a_row_and_the_files_are_those_promised(tmp_path):
    out = tmp_path / "run"
    lines: list[str] = []
    result = train(tiny(out, steps=5, eval_every=2, eval_batches=2, save_every=2), emit=lines.append)
    assert (out / "training.csv").read_text().splitlines()[0] == "step,loss,lr,toks_per_s"
    assert (out / "val.csv").read_text().splitlines()[0] == "step,val_loss,ppl"
    rows = read_rows(out / "training.csv", TrainRow)
    assert [row.step for row in rows] == [1, 2, 3, 4, 5]
    assert [row.step for row in read_rows(out / "val.csv", ValRow)] == [2, 4, 5]
    assert sorted(file.name for file in out.glob("checkpoint*")) == [f"checkpoint_00000{n}.pt" for n in (2, 4, 5)]
    metrics = json.loads((out / "metrics.json").read_text())
    assert {"device", "dtype", "steps", "seq_len", "batch_global", "lr", "loss_first", "loss_last"} <= set(metrics)
    assert metrics["checkpoint"] == str(out / "checkpoint_000005.pt") == str(result.checkpoint)
    assert (metrics["steps"], metrics["batch_global"], metrics["device"], metrics["dtype"]) == (5, 4, "cpu", "fp32")
    assert metrics["loss_last"] == pytest.approx(rows[-1].loss, rel=1e-5)
    beats = [json.loads(line) for line in (out / "heartbeat_rank0.jsonl").read_text().splitlines()]
    assert [beat["event"] for beat in beats][0 :: len(beats) - 1] == ["start", "end"]
    assert {beat["step"] for beat in beats} >= {0, 2, 4, 5}
    assert json.loads((out / "env.json").read_text())["config"]["train"]["steps"] == 5
    pattern = r"step \d{4} \| loss \d+\.\d{4} \| lr \d\.\d\de-\d\d \| toks/s \d+ \| wait \d+\.\ds \| grad [\d.]+"
    steps = [line for line in lines if re.fullmatch(pattern, line)]
    assert [line[:9] for line in steps] == ["step 0001", "step 0002", "step 0004", "step 0005"]


def test_tensorboard_has_the_curves(tmp_path):
    pytest.importorskip("tensorboard", reason="curves need tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = run(tmp_path / "run", steps=4, log_every=1)
    events = EventAccumulator(str(tmp_path / "run" / "tb"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/toks_per_s", "train/lr", "train/wait"}
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx([r.loss for r in rows], rel=1e-5)


def test_accumulation_repeats_the_larger_batch(tmp_path):
    whole = run(tmp_path / "whole", batch_size=8, steps=5)
    parts = run(tmp_path / "parts", batch_size=2, accumulate_grad_batches=4, steps=5)
    assert [row.loss for row in parts] == pytest.approx([row.loss for row in whole], rel=1e-5)
    assert [row.lr for row in parts] == [row.lr for row in whole]
    ours, theirs = weights(tmp_path / "parts", 5), weights(tmp_path / "whole", 5)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4)


def test_the_schedule_counts_optimizer_steps(tmp_path):
    rows = run(tmp_path / "run", steps=10, warmup_steps=4, accumulate_grad_batches=3, batch_size=1, lr=1.0e-3)
    assert [row.lr for row in rows[:4]] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
    assert [row.lr for row in rows[4:]] == sorted((row.lr for row in rows[4:]), reverse=True)
    assert rows[-1].lr == pytest.approx(1e-4), "cosine ends at a tenth on the last step"


def test_a_constant_schedule_stays_and_a_warmup_longer_than_the_run_only_rises():
    constant = config.build({"train": {"lr_schedule": "constant", "warmup_steps": 2, "steps": 10}}).train
    assert [lr_factor(s, constant) for s in (0, 1, 2, 9)] == [0.5, 1, 1, 1]
    short = config.build({"train": {"warmup_steps": 100, "steps": 10}}).train
    assert [lr_factor(s, short) for s in range(10)] == pytest.approx([(s + 1) / 100 for s in range(10)])


@pytest.mark.parametrize("phi", ["avg", "linear", "mlp"])
def test_only_matrices_decay(phi, tmp_path):
    model = Transformer(tiny(tmp_path, phi=phi).model)
    decay, still = parameter_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, kept = ({names[id(p)] for p in group["params"]} for group in (decay, still))
    assert (decay["weight_decay"], still["weight_decay"]) == (0.1, 0.0)
    assert decayed | kept == set(names.values())
    assert not decayed & kept
    assert "embed.weight" in kept
    for name in names.values():
        if "norm" in name or name.endswith("bias") or "position" in name:
            assert name in kept, name
        elif name.endswith("proj.weight") or "ffn" in name:
            assert name in decayed, name


@contextmanager
def calls_of(kind):
    """The calls of modules of a kind, each with the dtype of its output (None where it was not finished)."""
    seen: list[list] = []

    def before(module, inputs):
        if isinstance(module, kind):
            seen.append([None])

    def after(module, inputs, output):
        if isinstance(module, kind):
            seen[-1][0] = output.dtype

    hooks = [register_module_forward_pre_hook(before), register_module_forward_hook(after)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def test_bf16_is_autocast_over_fp32_weights(tmp_path):
    exact = run(tmp_path / "fp32")
    with calls_of(torch.nn.Linear) as calls:
        rough = run(tmp_path / "bf16", precision="bf16")
    assert {dtype for (dtype,) in calls} == {torch.bfloat16}
    saved = torch.load(tmp_path / "bf16" / "checkpoint_000004.pt", weights_only=True)
    moments = [t for state in saved["optimizer"]["state"].values() for t in state.values()]
    assert {t.dtype for t in [*saved["model"].values(), *moments]} == {torch.float32}
    assert [row.loss for row in rough] == pytest.approx([row.loss for row in exact], rel=2e-2)


def test_gradient_checkpointing_changes_no_number(tmp_path):
    with calls_of(Block) as once:
        plain = run(tmp_path / "plain")
    with calls_of(Block) as twice:
        again = run(tmp_path / "again", gradient_checkpointing=True)
    assert [row.loss for row in again] == [row.loss for row in plain]
    assert len(twice) == 2 * len(once), "every block's forward is run again in the backward"


def test_clipping_bounds_the_gradient_and_zero_switches_it_off(tmp_path):
    losses = {clip: [r.loss for r in run(tmp_path / str(clip), grad_clip=clip)] for clip in (0.0, 1e9, 1e-3)}
    assert losses[0.0] == losses[1e9]
    assert losses[0.0] != losses[1e-3]


def test_a_non_finite_loss_stops_and_names_the_step_and_the_last_good_checkpoint(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(NonFiniteError, match=r"step 2: .*stopped before the weights changed;\n.*checkpoint_000001\.pt"):
        run(out, lr=1e30, save_every=1)
    assert [file.name for file in out.glob("checkpoint*")] == ["checkpoint_000001.pt"]
    assert [row.step for row in read_rows(out / "training.csv", TrainRow)] == [1]


# --- a host that runs a step ahead, as it does on a card ---


@pytest.fixture(params=[False, True], ids=["at once", "a step late"])
def ahead(request, monkeypatch):
    """Whether the host reads a step when it has launched the next; the update is then the fused one."""
    monkeypatch.setattr(loop, "runs_ahead", lambda device: request.param)
    return request.param


@pytest.fixture
def steppers(monkeypatch):
    """The Stepper of each run, to look at the weights that a run ended with."""
    seen: list[Stepper] = []
    build = Stepper.__init__

    def remember(self, *arguments, **settings):
        build(self, *arguments, **settings)
        seen.append(self)

    monkeypatch.setattr(Stepper, "__init__", remember)
    return seen


def on_call(monkeypatch, owner, name, number, instead):
    """Replace a method's call `number` (1 is the first) by `instead(real, self, *arguments)`; what is counted."""
    real, calls = getattr(owner, name), []

    def method(self, *arguments):
        calls.append(1)
        return instead(real, self, *arguments) if len(calls) == number else real(self, *arguments)

    monkeypatch.setattr(owner, name, method)
    return calls


def speechless(lines):
    """Log lines without what a clock decides."""
    return [re.sub(r"toks/s \d+ \| wait [\d.]+s", "", line) for line in lines]


def test_reading_a_step_late_changes_no_row_and_no_line(tmp_path, monkeypatch):
    cadence = {"steps": 7, "log_every": 2, "eval_every": 3, "eval_batches": 2, "save_every": 4, "warmup_steps": 2}
    lines, rows, order = {}, {}, []
    launch = Stepper.launch

    def launch_and_tell(self, *arguments):
        order.append("launch")
        return launch(self, *arguments)

    for name, late in (("at once", False), ("late", True)):
        monkeypatch.setattr(loop, "runs_ahead", lambda device, late=late: late)
        monkeypatch.setattr(Stepper, "launch", launch_and_tell)
        lines[name] = []
        order.clear()

        def emit(line, name=name):
            lines[name].append(line.replace(str(tmp_path / name), ""))
            order.append(line[:9])

        train(tiny(tmp_path / name, **cadence), emit=emit)
        rows[name] = read_rows(tmp_path / name / "training.csv", TrainRow)
    assert order[:4] == ["launch", "launch", "step 0001", "launch"], "the host was not ahead"
    assert [row.step for row in rows["late"]] == list(range(1, 8))
    assert [row.loss for row in rows["late"]] == pytest.approx([row.loss for row in rows["at once"]], rel=1e-5)
    assert [row.lr for row in rows["late"]] == [row.lr for row in rows["at once"]]
    assert speechless(lines["late"]) == speechless(lines["at once"])
    for step in (4, 7):
        for key, value in weights(tmp_path / "at once", step).items():
            torch.testing.assert_close(weights(tmp_path / "late", step)[key], value, rtol=1e-4, atol=1e-5)


def test_a_launch_reads_nothing_from_the_device(tmp_path, monkeypatch):
    """What a host reads of a step's tensors, it would have to wait for; the model's own forward is not judged here."""
    monkeypatch.setattr(loop, "runs_ahead", lambda device: True)
    monkeypatch.setattr(Transformer, "loss", lambda self, ids, targets: self.head(self.embed(ids)).float().var())
    monkeypatch.setattr(Loader, "next", lambda self: torch.zeros(2, 33, dtype=torch.int64))
    read = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
            if operator in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                read.append(operator)
            return operator(*arguments, **(keywords or {}))

    launch, tolist = Stepper.launch, torch.Tensor.tolist

    def watched(self, *arguments):
        with Reads(), monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "tolist", lambda values: read.append("tolist") or tolist(values))
            return launch(self, *arguments)

    monkeypatch.setattr(Stepper, "launch", watched)
    run(tmp_path / "run", accumulate_grad_batches=2, batch_size=2)
    assert read == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: asks torch whether a step synchronises")
def test_a_step_on_a_card_does_not_synchronise(tmp_path, monkeypatch):
    """The whole step, the model's kernels included; the first one compiles and may."""
    plain = tiny(tmp_path / "run", precision="bf16", seq_len=256, steps=5).as_dict()
    shape = {"vocab_size": 64, "dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_groups": 2, "d_k": 64, "d_v": 64}
    sparse = {"l": 32, "d": 16, "l_sel": 64, "n_sel": 3, "w": 64}
    cfg = config.build({**plain, "model": shape, "nsa": sparse, "runtime": {**plain["runtime"], "device": "cuda"}})
    windows = torch.randint(0, 64, (4, 257), device="cuda")
    monkeypatch.setattr(Loader, "next", lambda self: windows)
    launch, launches = Stepper.launch, []

    def watched(self, *arguments):
        launches.append(self)
        torch.cuda.set_sync_debug_mode("error" if len(launches) > 1 else "default")
        try:
            return launch(self, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Stepper, "launch", watched)
    train(cfg, emit=quiet)
    assert [row.step for row in read_rows(tmp_path / "run" / "training.csv", TrainRow)] == [1, 2, 3, 4, 5]


def poison_loss(real, model, ids, targets):
    return real(model, ids, targets) * math.nan


def poison_gradient(real, model, ids, targets):
    loss = real(model, ids, targets)
    loss.register_hook(lambda gradient: gradient * math.inf)
    return loss


@pytest.mark.parametrize(
    ("poison", "said"),
    [(poison_loss, "the loss is nan"), (poison_gradient, "the gradient's norm is (nan|inf)")],
)
def test_a_step_that_is_not_finite_changes_no_weight_whenever_it_is_learned_of(
    tmp_path, monkeypatch, ahead, steppers, poison, said
):
    """The step after it is finite again, and on its way before the host knows."""
    out = tmp_path / "run"
    calls = on_call(monkeypatch, Transformer, "loss", 3, poison)
    with pytest.raises(NonFiniteError, match=rf"step 3: {said}; stopped before .*;\n.*checkpoint_000002\.pt"):
        run(out, steps=8, save_every=2)
    assert len(calls) == (4 if ahead else 3)
    good = checkpoint.load(out / "checkpoint_000002.pt")
    (stepper,) = steppers
    for name, value in stepper.model.state_dict().items():
        assert torch.equal(value, good["model"][name]), name
    for index, state in stepper.optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, good["optimizer"]["state"][index][key]) for key, value in state.items())
    assert [row.step for row in read_rows(out / "training.csv", TrainRow)] == [1, 2]


def test_a_signal_ends_a_run_that_is_ahead_with_all_its_steps_told_of(tmp_path, ahead):
    out = tmp_path / "run"

    def emit(line: str) -> None:
        if line.startswith("step 0002 | loss"):
            os.kill(os.getpid(), signal.SIGTERM)

    result = train(tiny(out, steps=50), emit=emit)
    assert result.signum == signal.SIGTERM
    assert result.step == (4 if ahead else 3)
    assert result.checkpoint == checkpoint.path_of(out, result.step)
    assert [row.step for row in read_rows(out / "training.csv", TrainRow)] == list(range(1, result.step + 1))
    train(tiny(out, steps=50, resume=str(out)), emit=quiet)
    whole = run(tmp_path / "whole", steps=50)
    assert [row.loss for row in read_rows(out / "training.csv", TrainRow)] == [row.loss for row in whole]


def test_an_update_is_fused_or_not_as_the_run_has_it_not_as_the_checkpoint(tmp_path):
    cfg = tiny(tmp_path / "run").train
    layer = torch.nn.Linear(2, 2)
    plain, fused = (build_optimizer(layer, cfg, torch.device("cpu"), fused=fused) for fused in (False, True))
    layer(torch.ones(1, 2)).sum().backward()
    plain.step()
    restore(fused, plain.state_dict())
    assert [group["fused"] for group in fused.param_groups] == [True, True]
    fused.found_inf = torch.ones(())
    before = layer.weight.clone()
    fused.step()
    assert torch.equal(layer.weight, before)
    restore(plain, fused.state_dict())
    assert [group["fused"] for group in plain.param_groups] == [False, False]


# --- data ---


def test_data_that_breaks_off_leaves_a_checkpoint_of_the_step_before_and_is_named(tmp_path, monkeypatch, ahead):
    """In the middle of step 4, after its first micro-batch."""
    out, settings = tmp_path / "run", {"steps": 6, "batch_size": 2, "accumulate_grad_batches": 2}

    def die(real, loader):
        raise LostDataError("data process 1 (pid 4711) died (exit code -9)")

    with monkeypatch.context() as patch:
        on_call(patch, Loader, "next", 8, die)
        with pytest.raises(LostDataError) as error:
            run(out, **settings)
    assert str(error.value).splitlines() == [
        "step 4: data process 1 (pid 4711) died (exit code -9);",
        f"go on from {out / 'checkpoint_000003.pt'} with --resume",
    ]
    assert error.value.exit_code == 1
    assert json.loads((out / "metrics.json").read_text())["ended"] == "lost data"
    assert [row.step for row in read_rows(out / "training.csv", TrainRow)] == [1, 2, 3]
    whole = run(tmp_path / "whole", **settings)
    assert run(out, **settings, resume=str(out))[-1].loss == whole[-1].loss
    assert [row.loss for row in read_rows(out / "training.csv", TrainRow)] == [row.loss for row in whole]
    for name, value in weights(tmp_path / "whole", 6).items():
        assert torch.equal(weights(out, 6)[name], value), name


def test_data_that_never_came_leaves_nothing(tmp_path, monkeypatch):
    def die(real, loader):
        raise LostDataError("data process 0 died")

    on_call(monkeypatch, Loader, "next", 1, die)
    with pytest.raises(LostDataError, match=r"^step 1: data process 0 died;\nnothing was trained$"):
        run(tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoint*"))


def test_a_slow_source_is_told_of(tmp_path, monkeypatch, capsys, ahead):
    def slow(real, loader):
        loader.waited += 12.5
        return real(loader)

    on_call(monkeypatch, Loader, "next", 3, slow)
    lines: list[str] = []
    train(tiny(tmp_path / "run", steps=6, log_every=2), emit=lines.append)
    assert capsys.readouterr().err.count("waited") == 1
    waits = [re.search(r"step (\d+) .* wait (\d+\.\d)s", line) for line in lines if "| loss" in line]
    assert [(int(w[1]), round(float(w[2]) - 12.5) >= 0) for w in waits] == [
        (1, False),
        (2, False),
        (4, True),
        (6, False),
    ]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["seconds_waiting_for_data"] >= 12.5


def test_each_time_the_text_is_used_up_is_said(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("some words to learn " * 60)
    plain = tiny(tmp_path / "run", data={"dataset": "text", "path": str(tmp_path / "a.txt")}, steps=20).as_dict()
    cfg = config.build({**plain, "model": {**plain["model"], "vocab_size": 256}})
    train(cfg, emit=quiet)
    epoch = json.loads((tmp_path / "run" / "metrics.json").read_text())["epoch"]
    said = re.findall(r"the text was used up, epoch (\d+) has begun", capsys.readouterr().err)
    assert epoch >= 2
    assert said == [str(n) for n in range(2, epoch + 2)]


# --- speed ---


@pytest.fixture
def a_second_a_step(monkeypatch):
    """Steps take a second by the clock, the first of a start a hundred."""
    steps: list[Launched] = []

    def seconds(self):
        steps.append(self)
        return 100.0 if len(steps) == 1 else 1.0

    monkeypatch.setattr(Launched, "seconds", seconds)


def test_the_first_step_is_not_the_runs_speed(tmp_path, a_second_a_step):
    lines: list[str] = []
    train(tiny(tmp_path / "run", steps=5), emit=lines.append)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["first_step_s"], metrics["toks_per_s"], metrics["tokens"]) == (100.0, 128.0, 5 * 128)
    assert [re.search(r"toks/s (\d+)", line)[1] for line in lines if "| loss" in line] == ["1", "128", "128", "128"]
    assert [row.toks_per_s for row in read_rows(tmp_path / "run" / "training.csv", TrainRow)] == [1.28, *4 * [128.0]]


def test_the_first_step_after_a_resume_is_not_the_lines_speed(tmp_path, monkeypatch, a_second_a_step):
    run(tmp_path / "run", steps=1, lr_schedule="constant")
    monkeypatch.setattr(Launched, "seconds", lambda self, left=[100.0]: left.pop() if left else 1.0)
    lines: list[str] = []
    train(
        tiny(tmp_path / "run", steps=4, lr_schedule="constant", resume=str(tmp_path / "run"), log_every=4),
        emit=lines.append,
    )
    assert "step 0004" in lines[0]
    assert "toks/s 128 " in lines[0]


@pytest.mark.parametrize(("peak", "field", "value"), [(512.0, "| mfu 0.25 |", 0.25), (None, None, None)])
def test_mfu_is_the_share_of_the_peak_where_that_is_known(tmp_path, monkeypatch, a_second_a_step, peak, field, value):
    monkeypatch.setattr(loop, "_peak_tokens", lambda cfg, world: peak)
    lines: list[str] = []
    train(tiny(tmp_path / "run"), emit=lines.append)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["mfu"] == value
    assert (field in lines[1]) if field else ("mfu" not in lines[1])


def test_a_rerun_moves_the_old_run_aside_and_loses_nothing(tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    for n in range(8):
        run(out, steps=1, seed=n)
        if n == 0:
            (out / "note.txt").write_text("mine")
    aside = sorted(tmp_path.glob("run.*"), key=lambda folder: int(folder.suffix[1:]))
    assert [folder.name for folder in aside] == [f"run.{n}" for n in range(1, 8)]
    assert all((folder / "checkpoint_000001.pt").is_file() for folder in aside)
    assert [(folder / "training.csv").is_file() for folder in aside] == [False, False, *5 * [True]]
    assert (tmp_path / "run.1" / "note.txt").read_text() == "mine", "what is not the run's own stays"
    assert "run held a run: it is now" in capsys.readouterr().err


def test_text_too_short_to_hold_any_out_is_said_once(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a short text " * 20)
    cfg = tiny(tmp_path / "run", data={"dataset": "text", "path": str(tmp_path / "a.txt")}, eval_every=1)
    train(config.build({**cfg.as_dict(), "model": {**cfg.as_dict()["model"], "vocab_size": 256}}), emit=quiet)
    assert capsys.readouterr().err.count("no held-out window of 32 tokens: no val.csv") == 1
    assert not (tmp_path / "run" / "val.csv").exists()


def test_a_folder_of_other_things_is_left_where_it_is(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("mine")
    run(tmp_path / "run", steps=1)
    assert (tmp_path / "run" / "precious.txt").read_text() == "mine"
    assert not list(tmp_path.glob("run.*"))


def test_an_out_dir_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match=r"train\.out_dir = .*file.*: cannot be used"):
            run(out)


def test_a_full_disk_is_said_and_the_last_checkpoint_kept(tmp_path):
    resource = pytest.importorskip("resource", reason="needs POSIX limits")
    out = tmp_path / "run"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(line: str) -> None:
        if line.startswith("step 0002 | loss"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))

    try:
        with pytest.raises(SaveError, match=r"checkpoint_000002\.pt: .* not written: .*\n.*checkpoint_000001\.pt"):
            train(tiny(out, save_every=1), emit=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [file.name for file in out.iterdir() if "checkpoint" in file.name] == ["checkpoint_000001.pt"]


def test_a_log_that_cannot_be_written_names_the_last_checkpoint(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    out = tmp_path / "run"

    def fill(line: str) -> None:
        if line.startswith("step 0002 | checkpoint"):
            os.dup2(os.open("/dev/full", os.O_WRONLY), _descriptor_of(out / "training.csv"))

    with pytest.raises(SaveError, match=r"run: the log cannot be written: No space left on device;\n.*000002\.pt"):
        train(tiny(out, save_every=2), emit=fill)


def _descriptor_of(path: Path) -> int:
    return next(int(link.name) for link in Path("/proc/self/fd").iterdir() if os.path.realpath(link) == str(path))


@pytest.mark.parametrize("terminal", [True, False])
def test_the_progress_bar_is_for_a_terminal_only(tmp_path, monkeypatch, terminal):
    stderr = io.StringIO()
    stderr.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stderr)
    run(tmp_path / "run")
    assert ("4/4" in stderr.getvalue()) == terminal


def test_save_writes_the_last_checkpoint_there_too(tmp_path):
    run(tmp_path / "run", save=str(tmp_path / "kept" / "final.pt"))
    assert torch.load(tmp_path / "kept" / "final.pt", weights_only=True)["step"] == 4
    assert (tmp_path / "run" / "checkpoint_000004.pt").is_file()
    with pytest.raises(UsageError, match=r"train\.save = .* is a directory"):
        run(tmp_path / "again", save=str(tmp_path))
    (tmp_path / "a_file").write_text("")
    with pytest.raises(UsageError, match=r"train\.save = .* cannot be written .*; name a file in a folder"):
        run(tmp_path / "again", save=str(tmp_path / "a_file" / "final.pt"))
    assert not (tmp_path / "again").exists(), "steps were trained for a file that cannot be written"


def test_a_copy_that_fails_does_not_hide_the_runs_own_checkpoint(tmp_path, monkeypatch):
    def refuse(path, state, out_dir=None, real=checkpoint.save):
        if path.parent.name == "kept":
            path = path / "under" / "a" / "file"
            path.parents[2].write_text("")
        real(path, state, out_dir)

    monkeypatch.setattr(checkpoint, "save", refuse)
    with pytest.raises(SaveError, match=r"the last good one is .*checkpoint_000004\.pt"):
        run(tmp_path / "run", save=str(tmp_path / "kept" / "final.pt"))


# --- the script ---


def showcase(arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "train_showcase.py"), *arguments.split()],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def write_config(path: Path, **settings) -> str:
    path.write_text(json.dumps(tiny(path.parent / "run", **settings).as_dict()))
    return str(path)


def test_the_script_takes_the_documented_flags_and_prints_log_lines_only(tmp_path):
    path = write_config(tmp_path / "c.yaml")
    done = showcase(
        "--dataset synthetic --steps 3 --seq-len 24 --batch-size 2 --accum-batches 2 --ddp -1 --save last.pt "
        "--set train.log_every=1 --set train.lr=1e-3",
        cwd=tmp_path,
        CONFIG=path,
    )
    assert done.returncode == 0, done.stderr
    steps = [line.partition(" |")[0] for line in done.stdout.splitlines() if "| loss" in line]
    assert steps == ["step 0001", "step 0002", "step 0003"]
    assert all(line.startswith("step 000") for line in done.stdout.splitlines())
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["steps"], metrics["seq_len"], metrics["batch_global"], metrics["lr"]) == (3, 24, 4, 1e-3)
    assert (tmp_path / "last.pt").is_file()


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The script's main, in this process and with a config of its own."""
    monkeypatch.setenv("CONFIG", write_config(tmp_path / "c.yaml"))
    monkeypatch.chdir(tmp_path)
    return runpy.run_path(str(ROOT / "scripts" / "train_showcase.py"), run_name="script")["main"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "train.stepz=3"], "--set: unknown key train.stepz; did you mean train.steps?"),
        (["--resume", "gone.pt"], "gone.pt: no such checkpoint"),
        (["--steps", "0"], "--steps: train.steps = 0: input should be greater than or equal to 1"),
        (["--set", "train.out_dir=c.yaml"], "train.out_dir = c.yaml: cannot be used"),
        (["--ddp", "1"], "runtime.ddp = 1 but RANK is not set"),
        (
            ["--dataset", "text", "--local-path", "gone", "--set", "model.vocab_size=256"],
            "gone: no such file, folder or glob",
        ),
    ],
)
def test_the_script_tells_a_users_mistake_in_a_line(script, capsys, arguments, said):
    assert script(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"train_showcase: {said}")
    assert len(err.splitlines()) == 1


def test_a_routing_flag_that_is_neither_1_nor_0_is_a_users_mistake(script, capsys, monkeypatch):
    monkeypatch.setenv("NSA_USE_FA2", "maybe")
    routing.flags.cache_clear()
    assert script([]) == 2
    assert capsys.readouterr().err == "train_showcase: NSA_USE_FA2='maybe': use 1 or 0, or leave it unset\n"


def test_a_mistake_is_told_by_rank_0_alone(script, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert script(["--set", "train.stepz=3"]) == 2
    assert capsys.readouterr() == ("", "")


def test_a_non_finite_loss_makes_the_script_fail(script, capsys):
    assert script(["--set", "train.lr=1e30"]) == 1
    assert "train_showcase: step 2: " in capsys.readouterr().err


def test_a_missing_config_is_named(script, capsys, monkeypatch):
    monkeypatch.setenv("CONFIG", "none.yaml")
    assert script([]) == 2
    assert "none.yaml: no such config file; set CONFIG to one" in capsys.readouterr().err
