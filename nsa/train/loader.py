"""Batches on the device, and the position in the data of what was consumed."""

from __future__ import annotations

import time
from typing import Any

import torch

from nsa.train.data import Source, TextWindows


class Loader:
    """`next()` is this rank's windows of the next micro-batch, int64 [rows, seq_len + 1], on the device.

    waited: seconds spent in `next` so far; epoch: times that the text was used up. Raises LostDataError.
    """

    def __init__(self, source: Source, device: torch.device) -> None:
        self.source, self.device, self.waited = source, device, 0.0

    def next(self) -> torch.Tensor:
        began = time.perf_counter()
        windows = self.source.batch().to(self.device)
        self.waited += time.perf_counter() - began
        return windows

    @property
    def epoch(self) -> int:
        source = self.source
        return source.next // source.n_train if isinstance(source, TextWindows) else 0

    def state_dict(self) -> dict[str, Any]:
        return self.source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.source.load_state_dict(state)

    def close(self) -> None:
        pass
