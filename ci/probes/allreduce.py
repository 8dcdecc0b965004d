"""Do N devices add up? A sum over N processes with a known answer, by NCCL on GPUs or gloo on a CPU. JSON on stdout.

Usage: python allreduce.py N [nccl | gloo]
"""

from __future__ import annotations

import datetime
import json
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE = datetime.timedelta(seconds=120)
SIZE = 1 << 20


def rank(index: int, count: int, backend: str, store: str) -> None:
    """Integers below 2^24 add exactly in fp32, so any difference is a broken link."""
    device = torch.device("cuda", index) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=index, world_size=count, timeout=PATIENCE)
    x = (torch.arange(SIZE, device=device) % 1000 + 1).float() * (index + 1)
    dist.all_reduce(x)
    expected = (torch.arange(SIZE) % 1000 + 1).float() * (count * (count + 1) // 2)
    wrong = int((x.cpu() != expected).sum())
    dist.destroy_process_group()
    if wrong:
        raise RuntimeError(f"rank {index}: {wrong} of {SIZE} sums are wrong")


def all_reduce(count: int, backend: str) -> str:
    """Empty string: every rank got the right sum."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            mp.spawn(rank, (count, backend, str(Path(folder, "store"))), nprocs=count)
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            return str(error).strip().splitlines()[-1]
    return ""


if __name__ == "__main__":
    print(json.dumps({"all_reduce": all_reduce(int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "nccl")}))
