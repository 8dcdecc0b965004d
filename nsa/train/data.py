"""Batches of token windows, and the position in them that a checkpoint keeps.

A window is seq_len + 1 ids: its inputs are all but the last, its targets all but the first. `text`, `synthetic` and
token shards number the windows of the run 0, 1, 2, ...: a batch is the next `rows` numbers, a rank takes its slice of
them, and the position is one number, so any number of ranks sees the same global batches. The other fineweb datasets
are streams (`nsa.train.stream`), split by rank: each rank has its own position.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from nsa.train import shards
from nsa.train.config import TrainConfig
from nsa.train.corpus import Corpus, Tokenizer, Tokens, load_corpus, open_tokenizer
from nsa.train.dist import World, slice_of
from nsa.train.errors import CheckpointError, DataError
from nsa.train.stream import Documents, FileDocuments, HubDocuments, StreamWindows


class Source(Protocol):
    """Where batches come from. `summary` is for env.json; its "source" says what kind of data this is."""

    summary: dict[str, Any]

    @property
    def epoch(self) -> int:
        """How often the text was used up."""

    def batch(self) -> torch.Tensor:
        """This rank's windows of the next global batch, int64 [rows / ranks, seq_len + 1]."""

    def validation(self, batches: int) -> Iterator[torch.Tensor]:
        """This rank's windows of at most `batches` global batches, the same ones every time."""

    def state_dict(self) -> dict[str, Any]:
        """The position behind the last batch: plain values that nothing changes later."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def check(self) -> None:
        """Raise LostDataError if what makes the batches is no longer there. Any thread may ask."""

    def close(self) -> None: ...


def seed_of(*parts: object) -> int:
    """A 63-bit seed from whatever distinguishes a draw; close inputs give unrelated seeds."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def _generator(*parts: object) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*parts))


class _Numbered:
    """Windows by number: `window(i)` for training and `held_out(i)` for validation are the subclass's."""

    def __init__(self, rows: int, mine: range) -> None:
        self.rows, self.mine, self.next = rows, mine, 0

    def window(self, number: int) -> torch.Tensor:
        raise NotImplementedError

    def held_out(self, number: int) -> torch.Tensor | None:
        raise NotImplementedError

    def batch(self) -> torch.Tensor:
        windows = torch.stack([self.window(self.next + row) for row in self.mine])
        self.next += self.rows
        return windows

    def validation(self, batches: int) -> Iterator[torch.Tensor]:
        """At most `batches` global batches, always the same; the last may be short, and a rank's share of it empty."""
        for start in range(0, batches * self.rows, self.rows):
            found = [self.held_out(start + row) for row in self.mine]
            windows = [window for window in found if window is not None]
            if self.held_out(start) is None:
                return
            yield torch.stack(windows) if windows else torch.empty(0, 0, dtype=torch.int64)

    @property
    def epoch(self) -> int:
        return 0

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next = state["next"]

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass


class TextWindows(_Numbered):
    """Non-overlapping windows of a corpus, each epoch in a new order that the seed decides."""

    def __init__(self, corpus: Corpus, seq_len: int, rows: int, mine: range, seed: int, name: str) -> None:
        super().__init__(rows, mine)
        self.corpus, self.seq_len, self.seed = corpus, seq_len, seed
        self.n_train = (len(corpus.train) - 1) // seq_len
        self.n_val = max(0, (len(corpus.val) - 1) // seq_len)
        if self.n_train < 1:
            raise DataError(
                f"{name}: {len(corpus.train)} tokens to train on are fewer than one window of train.seq_len + 1 = "
                f"{seq_len + 1}; pass more text or a shorter --seq-len"
            )
        self.summary = {**corpus.summary, "windows_train": self.n_train, "windows_val": self.n_val}
        self._order: tuple[int, torch.Tensor] = (-1, torch.empty(0))
        # Mixed, so that a few batches are of many files; without the run's seed, so that runs compare.
        self._val_order = torch.randperm(self.n_val, generator=_generator("val"))

    def window(self, number: int) -> torch.Tensor:
        epoch, index = divmod(number, self.n_train)
        if self._order[0] != epoch:
            self._order = (epoch, torch.randperm(self.n_train, generator=_generator(self.seed, "epoch", epoch)))
        return self._cut(self.corpus.train, int(self._order[1][index]))

    @property
    def epoch(self) -> int:
        return self.next // self.n_train

    def held_out(self, number: int) -> torch.Tensor | None:
        if number >= self.n_val:
            return None
        return self._cut(self.corpus.val, int(self._val_order[number]))

    def _cut(self, tokens: Tokens, index: int) -> torch.Tensor:
        return torch.from_numpy(tokens.cut(index * self.seq_len, (index + 1) * self.seq_len + 1))

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next, "corpus": self.corpus.digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("corpus") != self.corpus.digest:
            raise CheckpointError(
                "data.path: the text is not the one that the checkpoint was trained on (its hash differs); "
                "bring that text back, or start without --resume"
            )
        self.next = state["next"]


class SyntheticWindows(_Numbered):
    """Phrases that repeat: a phrase of 8 to 32 ids, drawn with a skew, over and over. What a model can learn is the
    skew first, then to copy from one period back. Every window is drawn from the seed and its own number.
    """

    ALPHABET = 64
    N_HELD_OUT = 1 << 20

    def __init__(self, vocab_size: int, seq_len: int, rows: int, mine: range, seed: int) -> None:
        super().__init__(rows, mine)
        self.seq_len, self.seed = seq_len, seed
        self.weights = 1.0 / torch.arange(1, min(vocab_size, self.ALPHABET) + 1)
        self.summary = {"source": "synthetic", "alphabet": len(self.weights)}

    def window(self, number: int) -> torch.Tensor:
        return self._draw("train", number)

    def held_out(self, number: int) -> torch.Tensor | None:
        return self._draw("val", number) if number < self.N_HELD_OUT else None

    def _draw(self, part: str, number: int) -> torch.Tensor:
        generator = _generator(self.seed, part, number)
        period = int(torch.randint(8, 33, (), generator=generator))
        phrase = torch.multinomial(self.weights, period, replacement=True, generator=generator)
        return phrase.repeat(-(-(self.seq_len + 1) // period))[: self.seq_len + 1]


def open_data(cfg: TrainConfig, world: World) -> Source:
    """The dataset that the configuration names, positioned at its start. Raises DataError or ConfigError."""
    rows = cfg.train.batch_size
    mine = slice_of(rows, world, "train.batch_size")
    if cfg.data.dataset == "synthetic":
        return SyntheticWindows(cfg.model.vocab_size, cfg.train.seq_len, rows, mine, cfg.train.seed)
    if cfg.data.dataset == "text":
        name = cfg.data.path or "the standard library"
        tokenizer = _fitting(cfg)
        corpus = load_corpus(
            cfg.data.path, tokenizer, text_key=cfg.data.text_key, val_fraction=cfg.data.val_fraction, name=name
        )
        return TextWindows(corpus, cfg.train.seq_len, rows, mine, cfg.train.seed, name)
    if cfg.data.dataset == "fineweb_edu_local" and cfg.data.path is not None and shards.found(cfg.data.path):
        corpus = shards.load(cfg.data.path, cfg.model.vocab_size)
        return TextWindows(corpus, cfg.train.seq_len, rows, mine, cfg.train.seed, cfg.data.path)
    documents: Documents = (
        HubDocuments(cfg, world)
        if cfg.data.dataset == "fineweb_edu"
        else FileDocuments(cfg.data.path, cfg.data.text_key, world)
    )
    return StreamWindows(documents, _fitting(cfg), cfg, world, rows, mine)


def _fitting(cfg: TrainConfig) -> Tokenizer:
    tokenizer = open_tokenizer(cfg.data.tokenizer)
    if tokenizer.vocab_size > cfg.model.vocab_size:
        raise DataError(
            f"model.vocab_size = {cfg.model.vocab_size} is below the {tokenizer.vocab_size} ids of data.tokenizer = "
            f"{cfg.data.tokenizer}; set model.vocab_size={tokenizer.vocab_size}"
        )
    return tokenizer
