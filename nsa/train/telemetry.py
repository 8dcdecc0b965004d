"""What a run leaves in its out_dir and on the terminal: CSVs, TensorBoard, heartbeats, metrics, log lines.

Rank 0 writes everything but the heartbeats, which every rank writes its own of.
"""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from nsa.records import CsvLog, TrainRow, ValRow, header
from nsa.train import checkpoint
from nsa.train.dist import World
from nsa.train.errors import SaveError, UsageError

KEPT_RUNS = 5
# Between log lines that are far apart a rank still says that it is alive.
QUIET_S = 30.0
_RUN_FILES = ("training.csv", "val.csv", "metrics.json", "env.json")


def say(text: str) -> None:
    """To the person at the terminal: stdout is the run's deliverable."""
    tqdm.write(text, file=sys.stderr)


def peak_memory(device: torch.device) -> int:
    """Bytes: of the card's allocator on CUDA, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def environment(world: World) -> dict[str, Any]:
    """What the figures of this run depend on. No name, path or variable of the machine."""
    cuda = world.device.type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "device": torch.cuda.get_device_name(world.device) if cuda else platform.machine(),
        "system": platform.system(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "world_size": world.size,
    }


def _own_files(out_dir: Path) -> list[Path]:
    """What a run wrote there, checkpoints left out."""
    named = [out_dir / name for name in _RUN_FILES]
    return [f for f in [*named, *out_dir.glob("heartbeat_rank*.jsonl"), *out_dir.glob("tb/events.*")] if f.is_file()]


def prepare(out_dir: Path, resume: tuple[Path, int] | None) -> None:
    """Make out_dir ready. A new run moves an older one aside; a resumed one (its checkpoint and step) goes on with
    the CSV rows up to that step. Raises UsageError if the folder cannot be used.
    """
    try:
        in_place = resume is not None and resume[0].parent.resolve() == out_dir.resolve()
        if not in_place and out_dir.is_dir() and (_own_files(out_dir) or checkpoint.list_checkpoints(out_dir)):
            _move_aside(out_dir)
        out_dir.mkdir(parents=True, exist_ok=True)
        checkpoint.remove_partial(out_dir)
        if resume is not None:
            for row_type, name in ((TrainRow, "training.csv"), (ValRow, "val.csv")):
                _carry_rows(resume[0].parent / name, out_dir / name, row_type, resume[1])
            _set_newer_aside(out_dir, resume[1])
        else:
            (out_dir / "val.csv").unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(
            f"train.out_dir = {out_dir}: cannot be used ({error.strerror or error}); set train.out_dir to a folder "
            "that can be written"
        ) from error


def check_target(save: Path) -> None:
    """Raise UsageError if train.save cannot be written, before a run is trained for it; makes its folder."""
    if save.is_dir():
        raise UsageError(f"train.save = {save}: is a directory; name the file to write")
    try:
        save.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=save.parent):
            pass
    except OSError as error:
        raise UsageError(
            f"train.save = {save}: cannot be written ({error.strerror}); name a file in a folder that can be written"
        ) from error


def _move_aside(out_dir: Path) -> None:
    numbered = re.compile(re.escape(out_dir.name) + r"\.(\d+)")
    beside = out_dir.resolve().parent
    older = sorted((int(m[1]), d) for d in beside.iterdir() if d.is_dir() and (m := numbered.fullmatch(d.name)))
    target = beside / f"{out_dir.name}.{older[-1][0] + 1 if older else 1}"
    os.rename(out_dir, target)
    say(f"{out_dir} held a run: it is now {out_dir.parent / target.name}")
    for _, old in older[: max(0, len(older) + 1 - KEPT_RUNS)]:
        for file in _own_files(old):
            file.unlink()
        for folder in (old / "tb", old):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()  # what is not the run's log, such as a checkpoint, keeps its folder


def _carry_rows(source: Path, target: Path, row_type: type, step: int) -> None:
    """Rows up to `step`: later ones will come again, and a killed run's last line may be half a line."""
    if not source.is_file():
        return
    lines = source.read_text().splitlines()
    kept = [line for line in lines[1:] if line.partition(",")[0].isdigit() and int(line.partition(",")[0]) <= step]
    head = ",".join(header(row_type))
    if lines and lines[0] != head:
        raise UsageError(f"{source}: wrong header {lines[0]!r}; expected {head}: move the file away to resume")
    partial = target.with_name(f".{target.name}.partial")
    partial.write_text("".join(line + "\n" for line in [head, *kept]))
    os.replace(partial, target)


def _set_newer_aside(out_dir: Path, step: int) -> None:
    """Checkpoints of a future that this run will write anew must not be taken for its own."""
    for file in checkpoint.list_checkpoints(out_dir):
        if file > checkpoint.path_of(out_dir, step):
            number = 1
            while (target := file.with_name(f"{file.name}.superseded{number}")).exists():
                number += 1
            os.rename(file, target)
            say(f"{file} is newer than the checkpoint resumed from: it is now {target.name}")


class RunLog:
    """Rows, curves and lines as the run goes; on ranks other than 0 only the heartbeat.

    Every method that writes raises SaveError, naming the last good checkpoint, if the disk refuses.
    """

    def __init__(self, out_dir: Path, world: World, steps: int, start: int, emit: Callable[[str], None]) -> None:
        self.out_dir, self.world, self.emit = out_dir, world, emit
        self._open = ExitStack()
        self._heartbeat = self._open.enter_context((out_dir / f"heartbeat_rank{world.rank}.jsonl").open("a"))
        self._beat_at = time.monotonic()
        self._val: CsvLog | None = None
        self._bar: tqdm[Any] | None = None
        if world.is_main:
            self._rows = self._open.enter_context(closing(CsvLog(out_dir / "training.csv", TrainRow, append=True)))
            self._curves = _tensorboard(out_dir / "tb", start)
            if self._curves is not None:
                self._open.enter_context(closing(self._curves))
            if sys.stderr.isatty():
                bar = tqdm(total=steps, initial=start, unit="step", file=sys.stderr, dynamic_ncols=True)
                self._bar = self._open.enter_context(closing(bar))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            good = checkpoint.last_good(self.out_dir)
            kept = f"go on from {good} with --resume" if good else "start again"
            raise SaveError(
                f"{self.out_dir}: the log cannot be written: {error.strerror or error};\nmake room, then {kept}"
            ) from error

    def row(self, row: TrainRow) -> None:
        if time.monotonic() - self._beat_at > QUIET_S:
            self.heartbeat("step", row.step)
        if self.world.is_main:
            with self._writing():
                self._rows.write(row)
            if self._bar is not None:
                self._bar.update()
                self._bar.set_postfix(loss=f"{row.loss:.3f}", refresh=False)

    def line(self, row: TrainRow, *, mfu: float | None, wait: float, grad: float) -> None:
        """The log line of a step, its curves, and a heartbeat. mfu: None where the card's peak is not known; wait:
        seconds spent waiting for data since the line before; grad: the gradient's norm before clipping.
        """
        self.heartbeat("step", row.step, loss=row.loss, toks_per_s=round(row.toks_per_s, 1))
        if self.world.is_main:
            fields = [
                f"step {row.step:04d}",
                f"loss {row.loss:.4f}",
                f"lr {row.lr:.2e}",
                f"toks/s {row.toks_per_s:.0f}",
                *([] if mfu is None else [f"mfu {mfu:.2f}"]),
                f"wait {wait:.1f}s",
                f"grad {grad:.3f}",
            ]
            self._print(" | ".join(fields))
            if self._curves is not None:
                curves = {"loss": row.loss, "toks_per_s": row.toks_per_s, "lr": row.lr, "mfu": mfu, "wait": wait}
                for name, value in curves.items():
                    if value is not None:
                        self._curves.add_scalar(f"train/{name}", value, row.step)

    def validation(self, row: ValRow) -> None:
        self.heartbeat("eval", row.step)
        if self.world.is_main:
            with self._writing():
                if self._val is None:
                    log = CsvLog(self.out_dir / "val.csv", ValRow, append=True)
                    self._val = self._open.enter_context(closing(log))
                self._val.write(row)
            self._print(f"step {row.step:04d} | val_loss {row.val_loss:.4f} | ppl {row.ppl:.2f}")
            if self._curves is not None:
                self._curves.add_scalar("val/loss", row.val_loss, row.step)

    def saved(self, step: int, path: Path) -> None:
        self.heartbeat("checkpoint", step)
        if self.world.is_main:
            self._print(f"step {step:04d} | checkpoint {path}")

    def document(self, name: str, value: dict[str, Any]) -> None:
        """A JSON file of rank 0, whole or not at all, for whoever reads while the run goes on."""
        if self.world.is_main:
            partial = self.out_dir / f".{name}.partial"
            with self._writing():
                partial.write_text(json.dumps(value, indent=2) + "\n")
                os.replace(partial, self.out_dir / name)

    def heartbeat(self, event: str, step: int, **more: float) -> None:
        """A line that says this rank is alive; a file that stops growing names the rank that hangs."""
        beat = {"time": round(time.time(), 3), "rank": self.world.rank, "event": event, "step": step, **more}
        beat["memory"] = peak_memory(self.world.device)
        with self._writing():
            self._heartbeat.write(json.dumps(beat) + "\n")
            self._heartbeat.flush()
        self._beat_at = time.monotonic()

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        with self._writing():
            self.emit(text)
        if self._bar is not None:
            self._bar.refresh()

    def close(self) -> None:
        with self._writing():
            self._open.close()


def _tensorboard(folder: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        say("tensorboard is not installed: no curves under tb/ (pip install tensorboard)")
        return None
    return SummaryWriter(str(folder), purge_step=start + 1 if start else None)
