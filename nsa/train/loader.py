"""Batches on the device, made ahead in the background, and the position in the data of what was consumed."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch

from nsa.train.data import Source

# Batches made ahead of the one that a step works on.
DEPTH = 4
# How often a waiting `next` looks whether what it waits for is still alive.
_LOOK_S = 0.5
# How long the end of a run waits for a read that may never return.
_PATIENCE_S = 10.0


class _Batch(NamedTuple):
    """Windows on the host and where the source stood behind them; `slot` is the pinned buffer that holds them."""

    windows: torch.Tensor
    position: dict[str, Any]
    epoch: int
    slot: int | None


class Loader:
    """`next()` is this rank's windows of the next micro-batch, int64 [rows, seq_len + 1], on the device.

    A thread makes up to `depth` batches ahead. `state_dict` is the position behind the last batch that `next` gave,
    whatever was made ahead of it: a loader that loads it goes on with exactly the batches that would have followed.
    On CUDA a batch goes through pinned memory and its copy is queued on the current stream; the host does not wait.
    waited: seconds spent in `next` so far, waiting for data; epoch: times that the text was used up.
    What stops the source is raised by `next`, the same error, once the batches before it are used up; the death of a
    worker process at once (LostDataError).
    """

    def __init__(self, source: Source, device: torch.device, depth: int = DEPTH) -> None:
        self.source, self.device, self.depth, self.waited = source, device, depth, 0.0
        self._position, self._epoch = source.state_dict(), source.epoch
        self._making: _Making | None = None

    def next(self) -> torch.Tensor:
        if self._making is None:
            self._making = _Making(self.source, self.device, self.depth)
        began = time.perf_counter()
        try:
            batch = self._making.take()
        finally:
            self.waited += time.perf_counter() - began
        self._position, self._epoch = batch.position, batch.epoch
        if batch.slot is None:
            return batch.windows.to(self.device)
        windows = batch.windows.to(self.device, non_blocking=True)
        self._making.give_back(batch.slot)
        return windows

    @property
    def epoch(self) -> int:
        return self._epoch

    def state_dict(self) -> dict[str, Any]:
        return self._position

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._stop()
        self.source.load_state_dict(state)
        self._position, self._epoch = self.source.state_dict(), self.source.epoch

    def close(self) -> None:
        """End the thread and the source's processes."""
        self.source.close()  # wakes the thread, if it waits for a process
        self._stop()
        self.source.close()  # what the thread had begun to start

    def _stop(self) -> None:
        if self._making is not None:
            self._making.stop()
            self._making = None


class _HandOn:
    """Hands the error that ends a thread to the one that can raise it to somebody, of whatever kind it is."""

    def __init__(self, offer: Callable[[BaseException], None]) -> None:
        self._offer = offer

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if error is not None:
            self._offer(error)
        return True


class _Making:
    """The thread that makes batches, and what it shares with the thread that takes them."""

    def __init__(self, source: Source, device: torch.device, depth: int) -> None:
        self._source, self._device = source, device
        self._ready: queue.Queue[_Batch | BaseException] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._broken: BaseException | None = None
        self._pinned: list[torch.Tensor] = []
        self._free: queue.SimpleQueue[tuple[int, torch.cuda.Event | None]] = queue.SimpleQueue()
        if device.type == "cuda":
            for slot in range(depth + 2):  # those that wait, the one being filled, the one being copied
                self._free.put((slot, None))
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
        self._thread.start()

    def take(self) -> _Batch:
        """The next batch, waiting for it. Raises what the source raised."""
        while self._broken is None:
            self._source.check()
            try:
                item = self._ready.get(timeout=_LOOK_S)
            except queue.Empty:
                continue
            if isinstance(item, _Batch):
                return item
            self._broken = item
        raise self._broken

    def give_back(self, slot: int) -> None:
        """The pinned buffer may be filled again once what the current stream now holds is done."""
        copied = torch.cuda.Event(blocking=True)
        copied.record()
        self._free.put((slot, copied))

    def stop(self) -> None:
        """Returns when the thread no longer touches the source; a read that never returns is left to itself."""
        self._stopped.set()
        until = time.monotonic() + _PATIENCE_S
        while self._thread.is_alive() and time.monotonic() < until:
            with suppress(queue.Empty):
                self._ready.get_nowait()
            self._thread.join(timeout=0.01)

    def _run(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # a new thread's is card 0, whose memory is another rank's
        with _HandOn(self._offer):
            while not self._stopped.is_set():
                windows = self._source.batch()
                position, epoch = self._source.state_dict(), self._source.epoch
                self._offer(self._pin(windows, position, epoch))

    def _offer(self, item: _Batch | BaseException) -> None:
        while not self._stopped.is_set():
            try:
                return self._ready.put(item, timeout=_LOOK_S)
            except queue.Full:
                continue

    def _pin(self, windows: torch.Tensor, position: dict[str, Any], epoch: int) -> _Batch:
        if self._device.type != "cuda":
            return _Batch(windows, position, epoch, None)
        slot, copied = self._free.get()
        if copied is not None:
            copied.synchronize()
        while len(self._pinned) <= slot:
            self._pinned.append(torch.empty(windows.shape, dtype=windows.dtype, pin_memory=True))
        return _Batch(self._pinned[slot].copy_(windows), position, epoch, slot)
