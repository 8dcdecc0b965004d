"""One optimizer step, launched without waiting for the device, and what the host reads of it afterwards.

On a card the host runs a step ahead. Loss, gradient norm and the ranks' news stay in one small tensor on the device,
which the ranks add up and which is copied to pinned memory behind the step; the host reads it when it has launched
the next step. What cannot wait for the host is decided on the device: a loss or gradient that is not finite sets a
flag under which the optimizer leaves weights and moments alone, in that step and in every later one. So when the host
learns of the step, they are still those of the step before it. On a CPU nothing runs ahead: the same tensor is read,
and judged, before the optimizer steps.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nsa.model import Transformer
from nsa.train.config import TrainConfig
from nsa.train.dist import World, data_parallel
from nsa.train.optim import build_optimizer, set_lr


def runs_ahead(device: torch.device) -> bool:
    """Whether the host may launch a step before it has read the one before."""
    return device.type == "cuda"


def autocast(cfg: TrainConfig, device: torch.device) -> AbstractContextManager[Any]:
    """bf16 is autocast over fp32 weights."""
    return nullcontext() if cfg.runtime.precision == "fp32" else torch.autocast(device.type, dtype=torch.bfloat16)


class Mark:
    """This moment in the device's order of work, or on the host's clock where the device is the host."""

    def __init__(self, device: torch.device) -> None:
        self._at = time.perf_counter()
        self._event: Any = None
        if device.type == "cuda":
            # A host that sleeps while it waits leaves its core to the data processes.
            self._event = torch.cuda.Event(enable_timing=True, blocking=True)
            self._event.record()

    def wait(self) -> None:
        """Return when the device has come here."""
        if self._event is not None:
            self._event.synchronize()

    def since(self, earlier: Mark) -> float:
        """Seconds between two marks that were waited for."""
        if self._event is None:
            return self._at - earlier._at
        return float(earlier._event.elapsed_time(self._event)) / 1e3


@dataclass(frozen=True)
class News:
    """What a rank tells the others in a step.

    signum: the signal it was sent, 0 for none; waited: seconds for this step's data; lost: its data broke off, and
    the step's batch is made up so that no rank waits for this one.
    """

    signum: int
    waited: float
    lost: bool


@dataclass(frozen=True)
class Outcome:
    """What every rank learns of a step: the mean loss (nats), the gradient's norm before clipping, the signal to stop
    for (0: none), each rank's seconds of waiting for data, and the ranks whose data broke off.
    """

    loss: float
    norm: float
    signum: int
    waited: tuple[float, ...]
    lost: tuple[int, ...]

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.norm)


@dataclass(frozen=True)
class Launched:
    """A step on its way. `outcome` and `seconds` wait for the device."""

    told: torch.Tensor
    begin: Mark
    end: Mark
    ranks: int

    def outcome(self) -> Outcome:
        self.end.wait()
        return _outcome(self.told, self.ranks)

    def seconds(self) -> float:
        self.end.wait()
        return self.end.since(self.begin)


class _Loss(nn.Module):
    """The loss as a forward, which is what DDP hooks into."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.model.loss(ids, targets)


class Stepper:
    """The loss over the ranks and the optimizer of a model, and how a step goes through them."""

    def __init__(self, model: Transformer, cfg: TrainConfig, world: World, *, ahead: bool) -> None:
        self.model, self.cfg, self.world, self.ahead = model, cfg, world, ahead
        self.loss = data_parallel(_Loss(model), world, cfg.runtime.reduce)
        self.optimizer = build_optimizer(model, cfg.train, world.device, fused=ahead)
        if ahead:
            # Fused AdamW looks at this one, as the scaler of fp16 training has it do: at 1 it changes nothing.
            self.void = torch.zeros((), device=world.device)
            self.optimizer.found_inf = self.void  # type: ignore[attr-defined]

    def launch(
        self,
        lr: float,
        fetch: Callable[[], torch.Tensor],
        news: Callable[[], News],
        judge: Callable[[Outcome], None],
        begin: Mark | None,
    ) -> Launched:
        """Launch a step; it is timed from `begin`, or from now. `fetch` gives a micro-batch, int64 [rows, seq_len + 1]
        on the device; `news` is asked when all are fetched. Where the host does not run ahead, `judge` sees the
        outcome before the optimizer steps, and may raise.
        """
        device, train = self.world.device, self.cfg.train
        begin = begin or Mark(device)
        # Every micro-batch of every rank has the same number of targets, so the mean of means is the mean.
        share = 1.0 / train.accumulate_grad_batches
        total = torch.zeros((), dtype=torch.float64, device=device)
        self.model.train()
        for left in reversed(range(train.accumulate_grad_batches)):
            windows = fetch()
            with self._no_sync(left > 0):
                with autocast(self.cfg, device):
                    loss = self.loss(windows[:, :-1], windows[:, 1:])
                total += loss.detach().double() * share
                if not left:  # the ranks add this up while the backward runs
                    shared = self._packet(total, news())
                    adding = self.world.add_up(shared)
                (loss * share).backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), train.grad_clip or math.inf)
        if adding is not None:
            adding.wait()
        told = torch.cat([shared, norm.detach().double().reshape(1)])
        if self.ahead:
            # 0 times a number is 0, times an infinity or a NaN it is NaN; and what is set stays set.
            self.void.masked_fill_(((told[0] + told[-1]) * 0).ne(0), 1.0)
            told = _to_host(told)
        else:
            judge(_outcome(told, self.world.size))
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Launched(told, begin, Mark(device), self.world.size)

    def _no_sync(self, wait: bool) -> AbstractContextManager[Any]:
        """Only the last micro-batch's backward exchanges gradients."""
        return self.loss.no_sync() if wait and isinstance(self.loss, DistributedDataParallel) else nullcontext()

    def _packet(self, loss: torch.Tensor, news: News) -> torch.Tensor:
        """fp64 [3 + 2 ranks]: loss, SIGTERMs, SIGINTs, then each rank's wait and each rank's loss of data.

        fp64, so that a mean over ranks is as exact as one process's. Data that broke off makes the loss NaN, so that
        no rank's weights learn from what was made up.
        """
        rank, size = self.world.rank, self.world.size
        values = [0.0] * (3 + 2 * size)
        values[0] = math.nan if news.lost else 0.0
        values[1], values[2] = news.signum == signal.SIGTERM, news.signum == signal.SIGINT
        values[3 + rank], values[3 + size + rank] = news.waited, news.lost
        cuda = loss.device.type == "cuda"
        packet = torch.tensor(values, dtype=torch.float64, pin_memory=cuda).to(loss.device, non_blocking=True)
        packet[0].add_(loss)
        return packet


def _to_host(values: torch.Tensor) -> torch.Tensor:
    """A copy that will be there when the device has come here; no wait."""
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.device.type == "cuda")
    return host.copy_(values, non_blocking=True)


def _outcome(told: torch.Tensor, ranks: int) -> Outcome:
    loss, terms, ints, *each, norm = told.tolist()
    signum = int(signal.SIGTERM if terms else signal.SIGINT if ints else 0)
    lost = tuple(rank for rank, flag in enumerate(each[ranks:]) if flag)
    return Outcome(loss / ranks, norm, signum, tuple(each[:ranks]), lost)
