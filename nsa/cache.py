"""What a decoder keeps: preallocated buffers a layer, and the raw tail that is not yet a compressed block.

For inference: no gradient flows through a cache.
"""

from __future__ import annotations

import torch

from nsa.blocks import Reads, n_compressed
from nsa.config import ModelConfig
from nsa.rope import Rope


class BranchKV:
    """Keys [B, rows, G, Dk] and values [B, rows, G, Dv] of one branch, every row kept."""

    def __init__(self, batch: int, rows: int, cfg: ModelConfig, device: torch.device | str, dtype: torch.dtype) -> None:
        G = cfg.n_kv_groups
        self.k = torch.zeros(batch, rows, G, cfg.d_k, device=device, dtype=dtype)
        self.v = torch.zeros(batch, rows, G, cfg.d_v, device=device, dtype=dtype)

    def write(self, at: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put k, v [B,T,G,D] at row `at`; returns all rows up to their end."""
        end = at + k.shape[1]
        self.k[:, at:end], self.v[:, at:end] = k, v
        return self.k[:, :end], self.v[:, :end]


class RecentKV:
    """The last `keep` rows before whatever comes next: a buffer that slides, twice as long so that it slides rarely."""

    def __init__(
        self, batch: int, keep: int, cfg: ModelConfig, device: torch.device | str, dtype: torch.dtype, slack: int = 64
    ) -> None:
        self.keep, self.rows, self.end = keep, 2 * keep + slack, 0
        self.buffer = BranchKV(batch, self.rows, cfg, device, dtype)

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add T rows; returns the rows kept from before and the new ones, the newest last."""
        kept = min(self.keep, self.end)
        if self.end + k.shape[1] > self.rows:
            old = slice(self.end - kept, self.end)
            k_all = torch.cat([self.buffer.k[:, old], k.to(self.buffer.k.dtype)], dim=1)
            v_all = torch.cat([self.buffer.v[:, old], v.to(self.buffer.v.dtype)], dim=1)
            self.end = min(self.rows - self.keep, k_all.shape[1])
            self.buffer.write(0, k_all[:, -self.end :], v_all[:, -self.end :])
            return k_all, v_all
        first = self.end - kept
        k_all, v_all = self.buffer.write(self.end, k, v)
        self.end += k.shape[1]
        return k_all[:, first:], v_all[:, first:]

    def can_drop(self, n: int, length: int) -> bool:
        """Whether the last n of `length` rows can go and leave min(keep, length - n) behind."""
        return self.end - n >= min(self.keep, length - n)


class LayerCache:
    """What every layer's state has: `length` positions of at most `max_len`."""

    def __init__(self, cfg: ModelConfig, max_len: int) -> None:
        self.cfg, self.max_len, self.length = cfg, max_len, 0

    def check_room(self, T: int) -> None:
        """ValueError if T more positions do not fit."""
        if self.length + T > self.max_len:
            raise ValueError(
                f"cache holds max_len = {self.max_len} positions, but {self.length} + {T} = {self.length + T} "
                "are asked for; build it with a larger max_len"
            )

    def rewind(self, n: int) -> None:
        """Forget the last n positions."""
        if not 0 <= n <= self.length:
            raise ValueError(f"cannot rewind {n} of {self.length} positions")
        self.length -= n


class SparseCache(LayerCache):
    """An NSA layer's: compressed keys, all selected keys, the last window, the raw tail."""

    def __init__(
        self, cfg: ModelConfig, batch: int, max_len: int, *, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        super().__init__(cfg, max_len)
        self.cmp = BranchKV(batch, n_compressed(max_len, cfg.nsa), cfg, device, dtype)
        self.sel = BranchKV(batch, max_len, cfg, device, dtype)
        self.win = RecentKV(batch, cfg.nsa.w - 1, cfg, device, dtype)
        self.tail = RecentKV(batch, cfg.nsa.l - 1, cfg, device, dtype)
        self.reads = torch.zeros(3, batch, cfg.n_kv_groups, dtype=torch.int64, device=device)  # cmp, sel, win

    def rewind(self, n: int) -> None:
        """Forget the last n positions. ValueError if older rows of the window have already been let go."""
        if 0 <= n <= self.length and not (self.win.can_drop(n, self.length) and self.tail.can_drop(n, self.length)):
            raise ValueError(f"cannot rewind {n} positions: the window rows before them are gone; prefill again")
        super().rewind(n)
        self.win.end -= n
        self.tail.end -= n


class DenseCache(LayerCache):
    """A dense layer's: keys and values of every position."""

    def __init__(
        self, cfg: ModelConfig, batch: int, max_len: int, *, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        super().__init__(cfg, max_len)
        self.kv = BranchKV(batch, max_len, cfg, device, dtype)


class KVCache:
    """The caches of all layers of a model, one after the other in `layers`.

    cfg's shapes, `batch` rows, up to `max_len` positions. ValueError from a forward that would pass max_len.
    """

    def __init__(
        self, cfg: ModelConfig, batch: int, max_len: int, *, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        self.cfg, self.batch = cfg, batch
        kind = SparseCache if cfg.attention == "nsa" else DenseCache
        self.layers = [kind(cfg, batch, max_len, device=device, dtype=dtype) for _ in range(cfg.n_layers)]

    @property
    def length(self) -> int:
        """Positions held."""
        return self.layers[0].length

    def check_fits(self, cfg: ModelConfig, batch: int) -> None:
        """ValueError if it was built for another model or another number of rows; nothing has been written then."""
        if batch != self.batch:
            raise ValueError(f"cache holds {self.batch} batch rows, but ids have {batch}; build it with batch={batch}")
        if cfg != self.cfg:
            raise ValueError("cache was built for another ModelConfig than the model's; build it with model.cfg")

    def rope(self, T: int, x: torch.Tensor) -> Rope:
        """The rotation of the next T positions, for inputs like x."""
        return Rope.of(self.cfg, self.length, T, x.device, x.dtype)

    def rewind(self, n: int) -> None:
        """Forget the last n positions of every layer."""
        for layer in self.layers:
            layer.rewind(n)

    def reads(self) -> Reads:
        """Tokens read so far, as counted where they were loaded: mean over layers, batch rows and KV groups.

        They all read the same number, so the mean is whole; RuntimeError says so if it ever is not. ValueError for a
        dense model, whose layers count nothing.
        """
        counts = torch.stack([layer.reads for layer in self._sparse()])  # [L,3,B,G]
        if not bool((counts == counts[:1, :, :1, :1]).all()):
            raise RuntimeError("layers, rows or groups read different numbers of tokens; see SparseCache.reads")
        return Reads(*counts[0, :, 0, 0].tolist())

    def reset_reads(self) -> None:
        """Start counting anew."""
        for layer in self._sparse():
            layer.reads.zero_()

    def _sparse(self) -> list[SparseCache]:
        found = [layer for layer in self.layers if isinstance(layer, SparseCache)]
        if not found:
            raise ValueError("reads are those of NSA's branches; a dense step at S positions reads all S of them")
        return found
