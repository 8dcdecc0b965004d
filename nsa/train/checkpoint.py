"""Checkpoints: written whole or not at all, checked before they are believed, and everything a run goes on from.

A checkpoint is one file of torch.save (a zip), `checkpoint_<step>.pt`. The zip's CRC-32 of each record is its
checksum: torch.load alone reads a file with a flipped bit without a word.
"""

from __future__ import annotations

import os
import random
import re
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy
import torch

from nsa.train.config import TrainConfig
from nsa.train.errors import CheckpointError, SaveError

FORMAT = "nsa-train-1"
_NAME = re.compile(r"checkpoint_(\d+)\.pt")
# What may differ between a run and its continuation without changing what is learned.
_FREE = {
    "runtime.device",
    "runtime.gradient_checkpointing",
    "runtime.compile",
    "runtime.ddp",
    "data.workers",
    "train.log_every",
    "train.eval_every",
    "train.eval_batches",
    "train.save_every",
    "train.out_dir",
    "train.resume",
    "train.save",
}


def path_of(out_dir: Path, step: int) -> Path:
    return out_dir / f"checkpoint_{step:06d}.pt"


def list_checkpoints(out_dir: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    found = [(int(match[1]), file) for file in out_dir.glob("checkpoint_*.pt") if (match := _NAME.fullmatch(file.name))]
    return [file for _, file in sorted(found)]


def damage(path: Path) -> str | None:
    """What is wrong with the file, or None if every record is whole."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        return f"it is cut short or not a checkpoint ({error})"
    except OSError as error:
        return f"it cannot be read ({error.strerror or error})"
    return f"its record {broken} has a wrong checksum" if broken else None


def last_good(out_dir: Path, but: Path | None = None) -> Path | None:
    """The newest checkpoint of a run that is whole, other than `but`."""
    return next((f for f in reversed(list_checkpoints(out_dir)) if f != but and damage(f) is None), None)


def find(path: str | Path) -> Path:
    """The checkpoint that --resume means: the file itself, or a run folder's newest. Raises CheckpointError."""
    path = Path(path)
    if path.is_dir():
        found = list_checkpoints(path)
        if not found:
            raise CheckpointError(f"{path}: holds no checkpoint_*.pt; name another folder or start without --resume")
        return found[-1]
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; pass --resume a checkpoint_*.pt or a run's out_dir")
    return path


def load(path: Path) -> dict[str, Any]:
    """A checkpoint's contents, on the CPU. Raises CheckpointError naming the last good one if this one is damaged."""
    reason = damage(path)
    if reason is None:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, ValueError, KeyError, EOFError) as error:
            reason = f"torch cannot read it ({str(error).splitlines()[0]})"
        except MemoryError as error:
            raise CheckpointError(f"{path}: does not fit into memory") from error
        else:
            if isinstance(state, dict) and state.get("format") == FORMAT:
                return state
            raise CheckpointError(f"{path}: {_foreign(state)}")
    good = last_good(path.parent, but=path)
    remedy = f"the last good one is {good}: pass --resume {good}" if good else "there is no good one beside it"
    raise CheckpointError(f"{path}: damaged: {reason};\n{remedy}")


def _foreign(state: Any) -> str:
    """Why a whole file is not ours to read."""
    known = state.get("format") if isinstance(state, dict) else None
    if isinstance(known, str) and known.startswith(FORMAT.rstrip("0123456789")):
        return f"is of format {known} and this trainer reads {FORMAT}; resume with the version that wrote it"
    return f"is not a checkpoint of this trainer (format {FORMAT}); name one that is"


def save(path: Path, state: dict[str, Any], out_dir: Path | None = None) -> None:
    """Write to a temporary file, force it to the disk, then give it its name; never half a file.

    Raises SaveError naming the last good checkpoint of the run in `out_dir` (default: path's folder).
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the name is on the disk too
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch.save turns some write errors into RuntimeError
        with suppress(OSError):  # where no file can be written, there may be no folder to look into either
            partial.unlink()
        good = last_good(out_dir or path.parent)
        kept = f"the last good one is {good}: make room, then --resume it" if good else "there is no earlier one"
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise SaveError(f"{path}: checkpoint not written: {reason};\n{kept}") from error


def remove_partial(out_dir: Path) -> None:
    """Clear what a killed run left of a checkpoint that it was writing."""
    for file in out_dir.glob(".checkpoint_*.pt.partial"):
        file.unlink()


def check_config(saved: dict[str, dict[str, Any]], cfg: TrainConfig, path: Path) -> None:
    """Raise CheckpointError naming the first key that makes this run another one than the checkpoint's."""
    free = set(_FREE)
    if cfg.train.lr_schedule == "constant":
        free.add("train.steps")
    if cfg.data.dataset == "text":
        free.add("data.path")  # the text itself is compared, wherever it lies
    for section, values in cfg.as_dict().items():
        for key, value in values.items():
            before = saved.get(section, {}).get(key, value)
            if before != value and f"{section}.{key}" not in free:
                raise CheckpointError(
                    f"{section}.{key} = {value!r}, but {path} was trained with {before!r};\n"
                    f"resume with --set {section}.{key}={before}, or start without --resume"
                )


def rng_state(device: torch.device) -> dict[str, Any]:
    """The state of every generator a step may draw from, as tensors and plain values."""
    name, keys, position, has_gauss, gauss = numpy.random.get_state()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": list(random.getstate()),
        "numpy": [name, [int(key) for key in keys], int(position), int(has_gauss), float(gauss)],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
