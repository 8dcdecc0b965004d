"""The training loop: one process, or one of several under torchrun; interrupted and resumed without a trace."""

from __future__ import annotations

import math
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nsa import routing
from nsa.model import Transformer
from nsa.records import TrainRow, ValRow
from nsa.train import checkpoint, dist
from nsa.train.config import TrainConfig
from nsa.train.data import Source, open_data, seed_of
from nsa.train.errors import CheckpointError, ConfigError, NonFiniteError
from nsa.train.optim import build_optimizer, build_scheduler
from nsa.train.telemetry import RunLog, check_target, environment, peak_memory, prepare, say

# A signal again within this time is the same one: a launcher forwards what the terminal already sent to the group.
_SAME_SIGNAL_S = 0.5


@dataclass(frozen=True)
class TrainResult:
    """`step` steps are done; `checkpoint` holds them; `signum` is the signal that ended the run, if one did."""

    step: int
    loss_first: float
    loss_last: float
    checkpoint: Path
    signum: int | None = None


class _Loss(nn.Module):
    """The loss as a forward, which is what DDP hooks into."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.model.loss(ids, targets)


class Stop:
    """Turns the first SIGTERM or Ctrl-C into a request; a second one ends the process at once."""

    def __init__(self) -> None:
        self.signum = 0
        self._at = 0.0

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signum and now - self._at > _SAME_SIGNAL_S:
            os._exit(128 + signum)
        if not self.signum:
            self.signum, self._at = signum, now
            name = signal.Signals(signum).name
            os.write(2, f"\n{name}: finishing the step, then a checkpoint; once more ends at once\n".encode())

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Python takes signals in the main thread only; elsewhere the caller's own handlers stay."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def train(cfg: TrainConfig, *, emit: Callable[[str], None] = print) -> TrainResult:
    """Train as configured; `emit` takes the log lines of rank 0.

    Raises TrainError: UsageError before anything is trained, NonFiniteError naming the step, SaveError.
    """
    stop = Stop()
    try:
        routing.flags()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    world = dist.init(cfg.runtime.ddp, cfg.runtime.device)
    try:
        with stop.listening():
            return _Run(cfg, world, stop, emit).run()
    finally:
        world.close()


class _Run:
    """The parts of one run and the steps that use them."""

    def __init__(self, cfg: TrainConfig, world: dist.World, stop: Stop, emit: Callable[[str], None]) -> None:
        self.cfg, self.world, self.stop, self.emit = cfg, world, stop, emit
        self.out_dir = Path(cfg.train.out_dir)
        self.step = 0
        self.history = {
            "loss_first": math.nan,
            "loss_last": math.nan,
            "val_loss": math.nan,
            "tokens": 0,
            "seconds": 0.0,
        }
        if cfg.train.save is not None:
            check_target(Path(cfg.train.save))
        self.source: Source = open_data(cfg, world)
        self._build()
        resumed = self._resume()
        self.latest = resumed[0] if resumed else self.out_dir
        self.since = _Meter()
        self.silent = False
        world.on_main(lambda: prepare(self.out_dir, resumed))

    def _build(self) -> None:
        """The same weights on every rank, then generators that differ by rank."""
        cfg, device = self.cfg, self.world.device
        _seed_all(cfg.train.seed)
        self.model = Transformer(cfg.model).to(device)
        self.model.gradient_checkpointing = cfg.runtime.gradient_checkpointing
        loss = _Loss(self.model)
        cards = [device.index] if device.type == "cuda" else None
        self.loss: nn.Module = DistributedDataParallel(loss, device_ids=cards) if self.world.ddp else loss
        self.optimizer = build_optimizer(self.model, cfg.train, device)
        self.scheduler = build_scheduler(self.optimizer, cfg.train)
        _seed_all(seed_of(cfg.train.seed, "rank", self.world.rank))

    def _resume(self) -> tuple[Path, int] | None:
        """Put everything back as the checkpoint has it; its path and step, or None for a new run."""
        if self.cfg.train.resume is None:
            return None
        path = checkpoint.find(self.cfg.train.resume)
        state = checkpoint.load(path)
        checkpoint.check_config(state["config"], self.cfg, path)
        if state["step"] > self.cfg.train.steps:
            raise CheckpointError(f"{path}: is at step {state['step']}, past train.steps = {self.cfg.train.steps}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        ranks: list[dict[str, Any]] = state["ranks"]
        known = self.world.rank < len(ranks)
        self.source.load_state_dict(ranks[self.world.rank if known else 0]["data"])
        if known:  # a rank that the checkpoint does not know draws from its own fresh seed
            checkpoint.set_rng_state(ranks[self.world.rank]["rng"], self.world.device)
        self.step, self.history = state["step"], state["history"]
        if self.world.is_main:
            say(f"resumed from {path} at step {self.step} of {self.cfg.train.steps}")
        return path, self.step

    def run(self) -> TrainResult:
        """Steps until the last, or until a signal."""
        train = self.cfg.train
        self.log = RunLog(self.out_dir, self.world, train.steps, self.step, self.emit)
        try:
            self._write_environment()
            self.log.heartbeat("start", self.step)
            signum = 0
            while self.step < train.steps and not signum:
                row, norm, signum = self._train_step()
                done = self.step == train.steps
                self._report(row, norm, last=done or signum != 0)
                if train.eval_every and (self.step % train.eval_every == 0 or done):
                    self._validate()
                if done or signum or (train.save_every and self.step % train.save_every == 0):
                    self.latest = checkpoint.path_of(self.out_dir, self.step)
                    self._save(self.latest)
                if train.save is not None and (done or signum):
                    self._save(Path(train.save))
            self._write_metrics(signum)
            self.log.heartbeat("end", self.step)
        finally:
            self.log.close()
        return TrainResult(
            self.step, self.history["loss_first"], self.history["loss_last"], self.latest, signum or None
        )

    def _report(self, row: TrainRow, norm: float, *, last: bool) -> None:
        """Every step's row; a log line when one is due, with the speed since the one before."""
        self.since.add(row, self._tokens_per_step)
        self.log.row(row)
        if self.step == 1 or self.step % self.cfg.train.log_every == 0 or last:
            self.log.line(self.since.row(), grad=f"{norm:.3f}")
            self.since = _Meter()

    @property
    def _tokens_per_step(self) -> int:
        train = self.cfg.train
        return train.batch_size * train.accumulate_grad_batches * train.seq_len

    def _train_step(self) -> tuple[TrainRow, float, int]:
        """One optimizer step: its row, the gradient's norm before clipping, and the signal to stop for (0: none)."""
        train, began = self.cfg.train, time.perf_counter()
        number = self.step + 1
        # Every micro-batch of every rank has the same number of targets, so the mean of means is the mean.
        share = 1.0 / train.accumulate_grad_batches
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        self.model.train()
        for micro in range(train.accumulate_grad_batches):
            windows = self.source.batch().to(self.world.device)
            with self._no_sync(micro + 1 < train.accumulate_grad_batches):
                with self._autocast():
                    loss = self.loss(windows[:, :-1], windows[:, 1:])
                (loss * share).backward()
            total += loss.detach().double() * share
        signum = self.stop.signum
        summed, terms, ints = self.world.sum(total.item(), signum == signal.SIGTERM, signum == signal.SIGINT)
        mean = summed / self.world.size
        norm = self._finite_norm(number, mean)
        lr = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        self.step = number
        seconds = time.perf_counter() - began
        self.history["loss_first"] = mean if number == 1 else self.history["loss_first"]
        self.history["loss_last"] = mean
        self.history["tokens"] += self._tokens_per_step
        self.history["seconds"] += seconds
        agreed = signal.SIGTERM if terms else signal.SIGINT if ints else 0
        return TrainRow(number, mean, lr, self._tokens_per_step / seconds), norm, int(agreed)

    def _finite_norm(self, number: int, loss: float) -> float:
        """Clip; the norm before. Raises NonFiniteError, on every rank alike, before the weights are touched."""
        clip = self.cfg.train.grad_clip or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)) if math.isfinite(loss) else math.nan
        if math.isfinite(loss) and math.isfinite(norm):
            return norm
        what = f"the gradient's norm is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
        good = self.world.on_main(lambda: checkpoint.last_good(self.out_dir))
        kept = f"go on from {good} with --resume" if good else "start again (no checkpoint was due yet)"
        raise NonFiniteError(
            f"step {number}: {what}; stopped before the weights changed;\n{kept}, with a lower train.lr"
        )

    def _no_sync(self, wait: bool) -> AbstractContextManager[Any]:
        """Only the last micro-batch's backward exchanges gradients."""
        return self.loss.no_sync() if wait and isinstance(self.loss, DistributedDataParallel) else nullcontext()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.cfg.runtime.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16)

    def _validate(self) -> None:
        """Mean loss of the held-out windows, over all ranks; nothing if none are held out."""
        self.model.eval()
        loss_sum, tokens = 0.0, 0
        with torch.no_grad(), self._autocast():
            for windows in self.source.validation(self.cfg.train.eval_batches):
                if len(windows):
                    windows = windows.to(self.world.device)
                    count = windows[:, 1:].numel()
                    loss_sum += float(self.model.loss(windows[:, :-1], windows[:, 1:])) * count
                    tokens += count
        loss_all, tokens_all = self.world.sum(loss_sum, tokens)
        if tokens_all:
            mean = loss_all / tokens_all
            self.history["val_loss"] = mean
            self.log.validation(ValRow(self.step, mean, math.exp(min(mean, 700.0))))
        elif self.world.is_main and not self.silent:
            self.silent = True
            say(f"no held-out window of {self.cfg.train.seq_len} tokens: no val.csv; raise data.val_fraction")

    def _save(self, path: Path) -> None:
        """Rank 0 writes; every rank gives its generators and data position, and learns of a failure."""
        mine = {"rng": checkpoint.rng_state(self.world.device), "data": self.source.state_dict()}
        ranks = self.world.gather(mine)

        def write() -> None:
            state = {
                "format": checkpoint.FORMAT,
                "step": self.step,
                "config": self.cfg.as_dict(),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "ranks": ranks,
                "history": self.history,
            }
            checkpoint.save(path, state, self.out_dir)

        self.world.on_main(write)
        self.log.saved(self.step, path)

    def _write_environment(self) -> None:
        parameters = sum(p.numel() for p in self.model.parameters())
        facts = {**environment(self.world), "parameters": parameters, "data": self.source.summary}
        self.log.document("env.json", {**facts, "config": self.cfg.as_dict()})

    def _write_metrics(self, signum: int) -> None:
        train, history = self.cfg.train, self.history
        metrics = {
            "device": str(self.world.device),
            "dtype": self.cfg.runtime.precision,
            "steps": self.step,
            "seq_len": train.seq_len,
            "batch_global": train.batch_size * train.accumulate_grad_batches,
            "lr": train.lr,
            "loss_first": history["loss_first"],
            "loss_last": history["loss_last"],
            "val_loss": None if math.isnan(history["val_loss"]) else history["val_loss"],
            "toks_per_s": history["tokens"] / history["seconds"] if history["seconds"] else None,
            "tokens": history["tokens"],
            "world_size": self.world.size,
            "peak_memory": peak_memory(self.world.device),
            "checkpoint": str(self.latest),
            "ended": signal.Signals(signum).name if signum else "finished",
        }
        self.log.document("metrics.json", metrics)


class _Meter:
    """Steps since the last log line: the last one's loss, and the tokens per second of all of them."""

    def __init__(self) -> None:
        self.tokens, self.seconds = 0, 0.0
        self.last: TrainRow | None = None

    def add(self, row: TrainRow, tokens: int) -> None:
        self.last = row
        self.tokens += tokens
        self.seconds += tokens / row.toks_per_s

    def row(self) -> TrainRow:
        assert self.last is not None, "a line is logged after a step"
        return TrainRow(self.last.step, self.last.loss, self.last.lr, self.tokens / self.seconds)


def _seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
