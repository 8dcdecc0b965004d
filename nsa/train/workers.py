"""Documents to ids in processes of their own, whatever the trainer's threads do.

A worker is a fresh Python that reads chunks of documents from its stdin and writes their ids to its stdout: nothing
is forked after CUDA was touched, the parent's main module is not run again, torch is not loaded, and a worker whose
parent dies reads the end of the file and leaves. One thread of the parent serves one worker.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import IO, cast

import numpy as np

from nsa.train.corpus import Ids, Tokenizer
from nsa.train.errors import LostDataError

MOST = 8
_ROOT = Path(__file__).resolve().parents[2]


def per_rank(setting: str | int, ranks: int) -> int:
    """How many processes `data.workers` means for one of `ranks` ranks on this machine.
    auto: the rank's share of the cores, less one for the step, between 1 and 8. One core tokenises 218,000 tokens/s
    and a step of the 125M model takes 400,000, so four give it twice what it needs.
    """
    if isinstance(setting, int):
        return setting
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST, cores // ranks - 1))


class Workers:
    """Tokenises chunks of documents in `count` processes, or in the caller's for 0. Whatever the count and whoever
    is first, `submit` gives the same ids. Raises LostDataError, there and in its futures, once a process died.
    """

    def __init__(self, tokenizer: Tokenizer, count: int) -> None:
        self.tokenizer = tokenizer
        self._tasks: queue.SimpleQueue[tuple[Sequence[bytes], Future[tuple[Ids, Ids]]] | None] = queue.SimpleQueue()
        self._closing = False
        self.processes = [_start() for _ in range(count)]
        self._threads = [
            threading.Thread(target=self._serve, args=(process,), name=f"tokenise-{process.pid}", daemon=True)
            for process in self.processes
        ]
        for thread in self._threads:
            thread.start()

    @property
    def ahead(self) -> int:
        """How many chunks to submit before taking the first's ids: two a process keep it busy."""
        return max(1, 2 * len(self.processes))

    def submit(self, texts: Sequence[bytes]) -> Future[tuple[Ids, Ids]]:
        """The future of `Tokenizer.encode(texts)`."""
        future: Future[tuple[Ids, Ids]] = Future()
        if self._closing:
            future.set_exception(LostDataError("the tokenising processes were ended"))
        elif self.processes:
            self._tasks.put((texts, future))
        else:
            future.set_result(self.tokenizer.encode(texts))
        return future

    def check(self) -> None:
        """Raise LostDataError if a process has died."""
        for process in self.processes:
            if process.poll() is not None and not self._closing:
                raise _lost(process)

    def close(self) -> None:
        self._closing = True
        for process in self.processes:
            process.kill()
            self._tasks.put(None)
        for process, thread in zip(self.processes, self._threads, strict=True):
            process.wait()
            thread.join(timeout=5)
        with suppress(queue.Empty):  # submitted behind the ends of the threads
            while True:
                if (task := self._tasks.get_nowait()) is not None:
                    task[1].set_exception(LostDataError("the tokenising processes were ended"))

    def _serve(self, process: subprocess.Popen[bytes]) -> None:
        """Chunks to one worker and ids back, until there is no more; once it died, its error for every chunk taken."""
        error: LostDataError | None = None
        greeting = [str(self.tokenizer.end).encode(), (self.tokenizer.json or "").encode()]
        while (task := self._tasks.get()) is not None:
            texts, future = task
            if error is None:
                try:
                    future.set_result(_ask(process, greeting, texts))
                    greeting = []
                    continue
                except (OSError, EOFError):  # what its process came to says why
                    error = _lost(process)
            future.set_exception(error)
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):  # what was not flushed to a dead worker
                cast(IO[bytes], pipe).close()


def _start() -> subprocess.Popen[bytes]:
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-m", "nsa.train.workers"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
        # A Ctrl-C at the terminal asks the trainer for a checkpoint, for which it needs its workers.
        start_new_session=True,
    )


def _ask(process: subprocess.Popen[bytes], greeting: list[bytes], texts: Sequence[bytes]) -> tuple[Ids, Ids]:
    """A worker's answer to a chunk. Raises OSError or EOFError if it is gone."""
    requests, replies = cast(IO[bytes], process.stdin), cast(IO[bytes], process.stdout)
    if greeting:
        _send(requests, greeting)
    _send(requests, texts)
    lengths, ids = _receive(replies)
    return np.frombuffer(ids, np.uint32), np.frombuffer(lengths, np.int64)


def _lost(process: subprocess.Popen[bytes]) -> LostDataError:
    """What became of a worker whose pipe is closed."""
    try:
        code = process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
    what = f"exit code {code}" + (f", {signal.Signals(-code).name}" if -code in set(signal.Signals) else "")
    return LostDataError(
        f"the tokenising process {process.pid} died ({what}); if it was killed for want of memory, lower data.workers, "
        "and --resume the run"
    )


def _send(pipe: IO[bytes], parts: Sequence[bytes]) -> None:
    """A message: how many parts, the bytes of each, the parts."""
    sizes = np.array([len(parts), *map(len, parts)], dtype="<u8")
    pipe.write(sizes.tobytes())
    for part in parts:
        pipe.write(part)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> list[bytes]:
    """The parts of the next message. Raises EOFError if the other side is gone."""

    def exactly(size: int) -> bytes:
        data = pipe.read(size)
        if len(data) < size:
            raise EOFError
        return data

    count = int(np.frombuffer(exactly(8), dtype="<u8")[0])
    return [exactly(size) for size in np.frombuffer(exactly(8 * count), dtype="<u8").tolist()]


def serve() -> None:
    """Be a worker."""
    # The parent decides when this ends, by closing the pipe: with a signal to all, it still finishes its step.
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints does not write into a message
    with suppress(EOFError, BrokenPipeError):  # the parent has no more to ask, or is gone
        end, json = _receive(requests)
        tokenizer = Tokenizer("", int(end), 0, json.decode() or None)
        while True:
            ids, lengths = tokenizer.encode(_receive(requests))
            _send(replies, [lengths.tobytes(), ids.tobytes()])
    os._exit(0)  # without flushing to a pipe that nobody reads


if __name__ == "__main__":
    serve()
