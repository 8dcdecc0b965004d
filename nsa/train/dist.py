"""Who this process is among the ranks, and the few words the ranks exchange. Nothing else reads RANK or WORLD_SIZE.

torchrun starts the processes and sets the variables; one process without them is a world of one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as td
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nsa.train.errors import ConfigError, TrainError

T = TypeVar("T")

# What torchrun sets and a process group needs.
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# A rank that waits longer than this for another fails, so that a run ends rather than hangs.
PATIENCE = timedelta(minutes=10)
# About one layer's gradient in the 125M model (28 MB in fp32), which a compiled block's backward hands over at once.
# NCCL is near its full rate from some 16 MB on; smaller buckets launch more kernels, which take multiprocessors from
# the backward, and larger ones set out later.
_BUCKET_MB = 32


def rank() -> int:
    """This process's rank before, or without, a process group."""
    return int(os.environ.get("RANK", "0"))


@dataclass(frozen=True)
class World:
    """`ddp` says whether there is a process group; without one the helpers return what they are given."""

    rank: int
    size: int
    device: torch.device
    ddp: bool

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the ranks, the same on every rank."""
        if not self.ddp:
            return list(values)
        # fp64, so that a mean over ranks is as exact as one process's; NCCL wants it on the card.
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        td.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def add_up(self, values: torch.Tensor) -> td.Work | None:
        """Begin to sum a tensor over the ranks, in place. Its wait() holds up the device's stream, not the host, on
        CUDA; over gloo the host. None without a process group.
        """
        return td.all_reduce(values, async_op=True) if self.ddp else None

    def gather(self, value: Any) -> list[Any]:
        """A picklable value of each rank, by rank, on rank 0; an empty list on the others."""
        if not self.ddp:
            return [value]
        out: list[Any] = [None] * self.size if self.is_main else []
        td.gather_object(value, out if self.is_main else None)
        return out

    def share(self, value: Any) -> Any:
        """Rank 0's picklable value, on every rank."""
        if not self.ddp:
            return value
        box = [value]
        td.broadcast_object_list(box)
        return box[0]

    def on_main(self, action: Callable[[], T]) -> T:
        """Do it on rank 0; every rank gets the result, or raises the TrainError that rank 0 met."""
        outcome: T | TrainError | None = None
        if self.is_main:
            try:
                outcome = action()
            except TrainError as error:
                outcome = error
        outcome = self.share(outcome)
        if isinstance(outcome, TrainError):
            raise outcome
        return cast(T, outcome)

    def close(self) -> None:
        if self.ddp and td.is_initialized():
            td.destroy_process_group()


def init(ddp: int, device: str) -> World:
    """Join the process group that torchrun prepared (gloo on a CPU, NCCL on CUDA), or be alone.

    ddp: -1 joins if there is more than one process, 0 never, 1 always. device: auto, cpu, cuda or cuda:N; under
    torchrun every rank takes the card of its LOCAL_RANK. Raises ConfigError naming the setting that does not fit.
    """
    size, local_rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    if ddp == 0 and size > 1:
        raise ConfigError(f"runtime.ddp = 0 with WORLD_SIZE = {size}: start one process, or drop --ddp 0")
    if ddp == 1 and "RANK" not in os.environ:
        raise ConfigError(
            "runtime.ddp = 1 but RANK is not set: start with torchrun --nproc_per_node=N, or drop --ddp 1"
        )
    join = ddp == 1 or size > 1
    if join and (absent := [name for name in _LAUNCHED if name not in os.environ]):
        raise ConfigError(
            f"WORLD_SIZE = {size} but {', '.join(absent)} not set: start with torchrun --nproc_per_node=N, or unset "
            "WORLD_SIZE and RANK for one process"
        )
    where = _device(device, local_rank, join)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if join:
        td.init_process_group("nccl" if where.type == "cuda" else "gloo", timeout=PATIENCE)
    return World(rank() if join else 0, size, where, join)


def _device(name: str, local_rank: int, join: bool) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(f"runtime.device = {name}: torch {torch.__version__} sees no CUDA; set runtime.device=cpu")
    index = local_rank if join else int(name.partition(":")[2] or 0)
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"runtime.device = {name}: card {index} is asked for and there are {torch.cuda.device_count()}; "
            "start fewer processes (--nproc_per_node) or name another card"
        )
    return torch.device("cuda", index)


def data_parallel(module: nn.Module, world: World, reduce: str) -> nn.Module:
    """The module with its gradients averaged over the ranks as the backward goes; itself without a process group.

    reduce: fp32, or bf16, which halves what is sent and rounds it. Raises ConfigError where that cannot be done.
    """
    if reduce == "bf16" and world.device.type != "cuda":
        raise ConfigError(f"runtime.reduce = bf16: NCCL can, gloo on a {world.device.type} cannot; set it to fp32")
    if not world.ddp:
        return module
    # Gradients are views of the buckets, so they are not held and copied twice. No static graph: it would spare a
    # search for unused parameters that is not made, and it takes the first backward for every other, while under
    # accumulation the first ones do not exchange. Buffers are tables that every rank computes alike.
    wrapped = DistributedDataParallel(
        module,
        device_ids=[world.device.index] if world.device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        bucket_cap_mb=_BUCKET_MB,
    )
    if reduce == "bf16":
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

        wrapped.register_comm_hook(None, bf16_compress_hook)
    return wrapped


def slice_of(rows: int, world: World, name: str) -> range:
    """The rows of a global batch that are this rank's. Raises ConfigError if they do not divide."""
    if rows % world.size:
        raise ConfigError(
            f"{name} = {rows} is not a multiple of WORLD_SIZE = {world.size}: it is global, split over the ranks; "
            f"use {max(1, rows // world.size) * world.size}"
        )
    each = rows // world.size
    return range(world.rank * each, (world.rank + 1) * each)
