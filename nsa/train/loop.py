"""The training loop: one process, or one of several under torchrun; interrupted and resumed without a trace."""

from __future__ import annotations

import importlib.util
import math
import os
import random
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import numpy
import torch

from nsa import model as models
from nsa import routing
from nsa.records import TrainRow, ValRow
from nsa.train import checkpoint, dist
from nsa.train.config import TrainConfig
from nsa.train.data import Source, open_data, seed_of
from nsa.train.errors import CheckpointError, ConfigError, LostDataError, NonFiniteError, TrainError
from nsa.train.loader import Loader
from nsa.train.optim import lr_at, restore
from nsa.train.step import Launched, Mark, News, Outcome, Stepper, autocast, runs_ahead
from nsa.train.telemetry import RunLog, check_target, environment, peak_memory, prepare, say

# A signal again within this time is the same one: a launcher forwards what the terminal already sent to the group.
_SAME_SIGNAL_S = 0.5
# A step that waited longer than this for its data is told of at the terminal.
_SLOW_DATA_S = 10.0


@dataclass(frozen=True)
class TrainResult:
    """`step` steps are done; `checkpoint` holds them; `signum` is the signal that ended the run, if one did."""

    step: int
    loss_first: float
    loss_last: float
    checkpoint: Path
    signum: int | None = None


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

    Raises TrainError: UsageError before anything is trained, NonFiniteError naming the step, SaveError, and
    LostDataError, with a checkpoint of the last step whose data was whole.
    """
    stop = Stop()
    try:
        routing.flags()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    world = dist.init(cfg.runtime.ddp, cfg.runtime.device)
    try:
        if cfg.train.save is not None:
            check_target(Path(cfg.train.save))
        with stop.listening():
            source = open_data(cfg, world)
            with closing(Loader(source, world.device)) as loader:
                return _Run(cfg, world, stop, emit, source, loader).run()
    finally:
        world.close()


@dataclass(frozen=True)
class _Flight:
    """A step that was launched and is not yet told of. `before` is the data position that it started from."""

    number: int
    lr: float
    before: dict[str, Any]
    epoch: int
    launched: Launched


class _Run:
    """The parts of one run and the steps that use them."""

    def __init__(
        self,
        cfg: TrainConfig,
        world: dist.World,
        stop: Stop,
        emit: Callable[[str], None],
        source: Source,
        loader: Loader,
    ) -> None:
        self.cfg, self.world, self.stop, self.emit = cfg, world, stop, emit
        self.source, self.loader = source, loader
        self.out_dir = Path(cfg.train.out_dir)
        # `launched` counts the steps begun, `step` those that are done and told of.
        self.step = self.launched = 0
        self.flying: deque[_Flight] = deque()
        self.history: dict[str, Any] = {
            "loss_first": math.nan,
            "loss_last": math.nan,
            "val_loss": math.nan,
            "tokens": 0,
            "timed_tokens": 0,
            "seconds": 0.0,
            "waited": 0.0,
        }
        self._build()
        resumed = self._resume()
        self.latest = resumed[0] if resumed else self.out_dir
        self.since = _Meter()
        self.first_step_s: float | None = None
        self.begin: Mark | None = None
        self.signum = 0
        self.lost: LostDataError | None = None
        self.epoch = self.loader.epoch
        self.silent = False
        world.on_main(lambda: prepare(self.out_dir, resumed))

    def _build(self) -> None:
        """The same weights on every rank, then generators that differ by rank."""
        cfg, device = self.cfg, self.world.device
        _seed_all(cfg.train.seed)
        self.model = models.Transformer(cfg.model).to(device)
        self.model.gradient_checkpointing = cfg.runtime.gradient_checkpointing
        self.compiled = self._compile()
        self.stepper = Stepper(self.model, cfg, self.world, ahead=runs_ahead(device))
        self.peak = _peak_tokens(cfg, self.world)
        _seed_all(seed_of(cfg.train.seed, "rank", self.world.rank))

    def _compile(self) -> bool:
        """Compile the blocks if the configuration says so; whether they are."""
        if not getattr(self.cfg.runtime, "compile", False):
            return False
        if self.world.ddp:
            # It would cut each block's graph at bucket borders; a block's gradients are about a bucket as they are.
            torch._dynamo.config.optimize_ddp = False
        why_not: str | None = models.compile_blocks(self.model)  # type: ignore[attr-defined]
        if self.world.is_main:
            say(f"blocks run eagerly: {why_not}" if why_not else "blocks are compiled: the first step takes longer")
        return why_not is None

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
        restore(self.stepper.optimizer, state["optimizer"])
        ranks: list[dict[str, Any]] = state["ranks"]
        known = self.world.rank < len(ranks)
        self.loader.load_state_dict(ranks[self.world.rank if known else 0]["data"])
        if known:  # a rank that the checkpoint does not know draws from its own fresh seed
            checkpoint.set_rng_state(ranks[self.world.rank]["rng"], self.world.device)
        self.step = self.launched = state["step"]
        self.history.update(state["history"])
        if self.world.is_main:
            say(f"resumed from {path} at step {self.step} of {self.cfg.train.steps}")
        return path, self.step

    def run(self) -> TrainResult:
        """Steps until the last, or until a signal."""
        self.log = RunLog(self.out_dir, self.world, self.cfg.train.steps, self.step, self.emit)
        with closing(self.log):
            self._write_environment()
            self.log.heartbeat("start", self.step)
            try:
                while self.launched < self.cfg.train.steps and not self.signum:
                    self._launch()
                    self._settle(keep=1 if self.stepper.ahead else 0)
                    self._between_steps()
            except _NoDataError as broken:
                self._end_without_data(broken)
            self._write_metrics(signal.Signals(self.signum).name if self.signum else "finished")
            self.log.heartbeat("end", self.step)
        return TrainResult(
            self.step, self.history["loss_first"], self.history["loss_last"], self.latest, self.signum or None
        )

    def _between_steps(self) -> None:
        """Validation and checkpoints when they are due; both see every launched step done and told of."""
        train, step = self.cfg.train, self.launched
        done = step == train.steps
        evaluate = train.eval_every and (step % train.eval_every == 0 or done)
        save = done or (train.save_every and step % train.save_every == 0)
        if not (evaluate or save or self.signum):
            return
        self._settle()
        if evaluate:
            self._validate()
        if save or self.signum:
            self.latest = checkpoint.path_of(self.out_dir, self.step)
            self._save(self.latest, self.loader.state_dict())
        if train.save is not None and (done or self.signum):
            self._save(Path(train.save), self.loader.state_dict())

    # --- a step ---

    def _launch(self) -> None:
        """Launch the next optimizer step."""
        number, lr, before = self.launched + 1, lr_at(self.launched, self.cfg.train), self.loader.state_dict()
        waited, told = self.loader.waited, 0

        def news() -> News:
            nonlocal told
            told = self.stop.signum
            return News(told, self.loader.waited - waited, self.lost is not None)

        def judge(outcome: Outcome) -> None:
            self._judge(number, before, outcome)

        try:
            launched = self.stepper.launch(lr, self._windows, news, judge, self.begin)
        except torch.cuda.OutOfMemoryError as error:
            raise TrainError(self._too_large(number)) from error
        self.begin, self.launched = launched.end, number
        self.flying.append(_Flight(number, lr, before, self.loader.epoch, launched))
        if not self.world.ddp:  # nobody else has to agree
            self.signum = self.signum or told

    def _windows(self) -> torch.Tensor:
        """The next micro-batch; zeros once the data has broken off, so that no rank waits for this one's part."""
        if self.lost is None:
            try:
                return self.loader.next()
            except LostDataError as error:
                self.lost = error
        train = self.cfg.train
        shape = (train.batch_size // self.world.size, train.seq_len + 1)
        return torch.zeros(shape, dtype=torch.int64, device=self.world.device)

    def _too_large(self, number: int) -> str:
        train = self.cfg.train
        return (
            f"step {number}: {self.world.device} has not the memory for {train.batch_size // self.world.size} windows "
            f"of {train.seq_len} tokens;\nlower train.batch_size and raise train.accumulate_grad_batches, or set "
            "runtime.gradient_checkpointing=true"
        )

    def _settle(self, keep: int = 0) -> None:
        """Tell of the launched steps, oldest first, all but the newest `keep`. The ranks agree on what they learn."""
        while len(self.flying) > keep:
            flight = self.flying.popleft()
            outcome = flight.launched.outcome()
            self._judge(flight.number, flight.before, outcome)
            self.signum = self.signum or outcome.signum
            self._tell(flight, outcome)
        if not keep:
            self.begin = None  # what comes between is no step's time

    def _judge(self, number: int, before: dict[str, Any], outcome: Outcome) -> None:
        """Raise, on every rank alike, if the step changed no weights: NonFiniteError or _NoDataError."""
        if outcome.lost:
            raise _NoDataError(number, before, outcome.lost[0])
        if outcome.finite:
            return
        nan_loss = not math.isfinite(outcome.loss)
        what = f"the loss is {outcome.loss}" if nan_loss else f"the gradient's norm is {outcome.norm}"
        good = self.world.on_main(lambda: checkpoint.last_good(self.out_dir))
        kept = f"go on from {good} with --resume" if good else "start again (no checkpoint was due yet)"
        raise NonFiniteError(
            f"step {number}: {what}; stopped before the weights changed;\n{kept}, with a lower train.lr"
        )

    def _tell(self, flight: _Flight, outcome: Outcome) -> None:
        """A step's row, its share of the run's totals, and a log line when one is due."""
        train, history, tokens, seconds = self.cfg.train, self.history, self._tokens_per_step, flight.launched.seconds()
        self.step, waited, first = flight.number, max(outcome.waited), self.first_step_s is None
        history["loss_first"] = outcome.loss if self.step == 1 else history["loss_first"]
        history["loss_last"] = outcome.loss
        history["tokens"] += tokens
        history["waited"] += waited
        if first:  # compiles, and warms allocators and caches: not the run's speed
            self.first_step_s = seconds
        else:
            history["timed_tokens"] += tokens
            history["seconds"] += seconds
        row = TrainRow(self.step, outcome.loss, flight.lr, tokens / seconds)
        self.log.row(row)
        self._tell_of_data(flight, outcome, waited)
        self.since.add(tokens, seconds, waited)
        done = self.launched == train.steps or self.signum
        if self.step == 1 or self.step % train.log_every == 0 or (self.step == self.launched and done):
            speed = self.since.toks_per_s
            line = TrainRow(row.step, row.loss, row.lr, speed)
            self.log.line(line, mfu=self._mfu(speed), wait=self.since.waited, grad=outcome.norm)
            self.since = _Meter()
        elif first:
            self.since = _Meter()

    def _tell_of_data(self, flight: _Flight, outcome: Outcome, waited: float) -> None:
        if waited > _SLOW_DATA_S and self.world.is_main:
            rank = outcome.waited.index(waited)
            say(f"step {self.step} waited {waited:.0f} s for the data of rank {rank}: its source is slow")
        if flight.epoch > self.epoch:
            self.epoch = flight.epoch
            if self.world.is_main:
                say(f"step {self.step}: the text was used up, epoch {self.epoch + 1} has begun")

    @property
    def _tokens_per_step(self) -> int:
        train = self.cfg.train
        return train.batch_size * train.accumulate_grad_batches * train.seq_len

    def _mfu(self, toks_per_s: float | None) -> float | None:
        return None if self.peak is None or toks_per_s is None else toks_per_s / self.peak

    # --- between steps ---

    def _validate(self) -> None:
        """Mean loss of the held-out windows, over all ranks; nothing if none are held out."""
        self.model.eval()
        loss_sum, tokens = 0.0, 0
        with torch.no_grad(), autocast(self.cfg, self.world.device):
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

    def _save(self, path: Path, data: dict[str, Any]) -> None:
        """Rank 0 writes; every rank gives its generators and data position, and learns of a failure."""
        ranks = self.world.gather({"rng": checkpoint.rng_state(self.world.device), "data": data})

        def write() -> None:
            state = {
                "format": checkpoint.FORMAT,
                "step": self.step,
                "config": self.cfg.as_dict(),
                "model": self.model.state_dict(),
                "optimizer": self.stepper.optimizer.state_dict(),
                "ranks": ranks,
                "history": self.history,
            }
            checkpoint.save(path, state, self.out_dir)

        self.world.on_main(write)
        self.log.saved(self.step, path)

    def _end_without_data(self, broken: _NoDataError) -> NoReturn:
        """A checkpoint of the last step that all ranks had data for, and the error of the rank that had none."""
        self.flying.clear()
        if self.step and self.latest != checkpoint.path_of(self.out_dir, self.step):
            self.latest = checkpoint.path_of(self.out_dir, self.step)
            self._save(self.latest, broken.before)
        self._write_metrics("lost data")
        errors = self.world.gather(self.lost and str(self.lost))
        said = self.world.share(errors[broken.rank] if errors else None)
        kept = f"go on from {self.latest} with --resume" if self.step else "nothing was trained"
        raise LostDataError(f"step {broken.number}: {said};\n{kept}")

    def _write_environment(self) -> None:
        parameters = sum(p.numel() for p in self.model.parameters())
        facts = {**environment(self.world), "parameters": parameters, "data": self.source.summary}
        self.log.document("env.json", {**facts, "config": self.cfg.as_dict()})

    def _write_metrics(self, ended: str) -> None:
        """toks_per_s is of all steps but the first of every start, which compiles; that one's time is first_step_s."""
        train, history = self.cfg.train, self.history
        speed = history["timed_tokens"] / history["seconds"] if history["seconds"] else None
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
            "toks_per_s": speed,
            "mfu": self._mfu(speed),
            "first_step_s": self.first_step_s,
            "seconds_waiting_for_data": history["waited"],
            "tokens": history["tokens"],
            "epoch": self.epoch,
            "compiled": self.compiled,
            "world_size": self.world.size,
            "peak_memory": peak_memory(self.world.device),
            "checkpoint": str(self.latest),
            "ended": ended,
        }
        self.log.document("metrics.json", metrics)


class _NoDataError(Exception):
    """Step `number` was not made, for want of rank `rank`'s data; it would have started from the position `before`."""

    def __init__(self, number: int, before: dict[str, Any], rank: int) -> None:
        super().__init__(f"step {number}: no data on rank {rank}")
        self.number, self.before, self.rank = number, before, rank


class _Meter:
    """Speed and waiting of the steps since the last log line."""

    def __init__(self) -> None:
        self.tokens, self.seconds, self.waited = 0, 0.0, 0.0

    def add(self, tokens: int, seconds: float, waited: float) -> None:
        self.tokens += tokens
        self.seconds += seconds
        self.waited += waited

    @property
    def toks_per_s(self) -> float:
        return self.tokens / self.seconds


def _peak_tokens(cfg: TrainConfig, world: dist.World) -> float | None:
    """Tokens per second at which all cards would be at their peak; None where a card's is not known."""
    if world.device.type != "cuda" or importlib.util.find_spec("nsa.train.flops") is None:
        return None
    from nsa.train import flops  # type: ignore[attr-defined]

    peak: float | None = flops.peak_flops(torch.cuda.get_device_name(world.device))
    return None if peak is None else world.size * peak / flops.flops_per_token(cfg.model, cfg.train.seq_len)


def _seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
