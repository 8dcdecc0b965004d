"""Batches of token windows, and the position in them that a checkpoint keeps.

A window is seq_len + 1 ids: its inputs are all but the last, its targets all but the first. `text` and `synthetic`
number the windows of the run 0, 1, 2, ...: a batch is the next `rows` numbers, a rank takes its slice of them, and
the position is one number, so any number of ranks sees the same global batches. The fineweb datasets are streams,
split by rank: each rank has its own position.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from nsa.train.config import TrainConfig
from nsa.train.corpus import RECORD_SUFFIXES, Corpus, Tokenizer, find_files, load_corpus, open_tokenizer
from nsa.train.dist import World, slice_of
from nsa.train.errors import CheckpointError, DataError, LostDataError


class Source(Protocol):
    """Where batches come from: this rank's windows of the next global batch, int64 [rows / ranks, seq_len + 1]."""

    summary: dict[str, Any]

    def batch(self) -> torch.Tensor: ...
    def validation(self, batches: int) -> Iterator[torch.Tensor]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


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

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next = state["next"]


class TextWindows(_Numbered):
    """Non-overlapping windows of a corpus, each epoch in a new order that the seed decides."""

    def __init__(self, corpus: Corpus, seq_len: int, rows: int, mine: range, seed: int, name: str) -> None:
        super().__init__(rows, mine)
        self.corpus, self.seq_len, self.seed = corpus, seq_len, seed
        self.n_train = (corpus.n_train - 1) // seq_len
        self.n_val = max(0, (len(corpus.ids) - corpus.n_train - 1) // seq_len)
        if self.n_train < 1:
            raise DataError(
                f"{name}: {corpus.n_train} tokens to train on are fewer than one window of train.seq_len + 1 = "
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
        return self._cut(int(self._order[1][index]) * self.seq_len)

    def held_out(self, number: int) -> torch.Tensor | None:
        if number >= self.n_val:
            return None
        return self._cut(self.corpus.n_train + int(self._val_order[number]) * self.seq_len)

    def _cut(self, start: int) -> torch.Tensor:
        return self.corpus.ids[start : start + self.seq_len + 1].long()

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
        self.summary = {"alphabet": len(self.weights)}

    def window(self, number: int) -> torch.Tensor:
        return self._draw("train", number)

    def held_out(self, number: int) -> torch.Tensor | None:
        return self._draw("val", number) if number < self.N_HELD_OUT else None

    def _draw(self, part: str, number: int) -> torch.Tensor:
        generator = _generator(self.seed, part, number)
        period = int(torch.randint(8, 33, (), generator=generator))
        phrase = torch.multinomial(self.weights, period, replacement=True, generator=generator)
        return phrase.repeat(-(-(self.seq_len + 1) // period))[: self.seq_len + 1]


class StreamWindows:
    """Documents of a Hugging Face stream, tokenized, end to end, cut into windows; this rank's part of the stream.

    The first `val_docs` documents are held out: no document with their text is trained on, wherever the stream's
    split puts it. The position is the stream's own and the ids of the documents that are begun and not used up.
    No shuffle buffer: what it holds is lost when a stream resumes, and these datasets come shuffled.
    """

    def __init__(
        self, stream: Any, tokenizer: Tokenizer, cfg: TrainConfig, world: World, rows: int, mine: range, name: str
    ) -> None:
        from datasets.distributed import split_dataset_by_node

        self.tokenizer, self.text_key, self.seq_len, self.name = tokenizer, cfg.data.text_key, cfg.train.seq_len, name
        self.mine, self.rows = mine, rows
        held = list(self._texts(itertools.islice(stream, cfg.data.val_docs)))
        self._held = {hashlib.sha256(text).digest() for text in held}
        self._val = self._flat(held)
        self._stream = split_dataset_by_node(stream, rank=world.rank, world_size=world.size) if world.ddp else stream
        self._begin(0)
        self._left: list[int] = []
        self._rank, self._size = world.rank, world.size
        self.summary = {"documents_val": len(held), "tokens_val": len(self._val)}

    def _texts(self, records: Iterator[Any]) -> Iterator[bytes]:
        """The text of each record. Raises DataError if there is none, LostDataError if the stream breaks off."""
        try:
            for record in records:
                text = record.get(self.text_key)
                if not isinstance(text, str):
                    known = (
                        ", ".join(key for key, value in record.items() if isinstance(value, str)) or "none holds text"
                    )
                    raise DataError(
                        f"{self.name}: no text under {self.text_key!r}; set data.text_key to one of: {known}"
                    )
                yield text.encode()
        except _stream_errors() as error:
            said = str(error).partition("\n")[0]
            raise LostDataError(
                f"{self.name}: the stream broke off ({type(error).__name__}: {said}); mend it and --resume the run"
            ) from error

    def _flat(self, documents: list[bytes]) -> list[int]:
        return [i for text in documents for i in (*self.tokenizer.encode(text), self.tokenizer.end)]

    def _begin(self, epoch: int) -> None:
        """Without its number a new epoch would start where the stream was resumed, not at its beginning."""
        self._epoch = epoch
        self._stream.set_epoch(epoch)
        self._records: Iterator[Any] = iter(self._stream)

    def _next_document(self) -> bytes:
        """The next document that is not held out; a stream that ends starts again."""
        for _ in range(2):
            for text in self._texts(self._records):
                if text.strip() and hashlib.sha256(text).digest() not in self._held:
                    return text
            self._begin(self._epoch + 1)
        raise DataError(f"{self.name}: no document is left to train on; give more documents or a smaller data.val_docs")

    def batch(self) -> torch.Tensor:
        want = len(self.mine) * self.seq_len + 1
        while len(self._left) < want:
            self._left += self._flat([self._next_document()])
        ids = torch.tensor(self._left[:want])
        # The last id is a target here and the first input of the next batch, as in the in-memory datasets.
        self._left = self._left[want - 1 :]
        return ids.unfold(0, self.seq_len + 1, self.seq_len).contiguous()

    def validation(self, batches: int) -> Iterator[torch.Tensor]:
        ids = torch.tensor(self._val)
        windows = ids.unfold(0, self.seq_len + 1, self.seq_len) if len(ids) > self.seq_len else ids.new_empty(0, 0)
        for start in range(0, min(batches * self.rows, len(windows)), self.rows):
            yield windows[start + self.mine.start : start + self.mine.stop]

    def state_dict(self) -> dict[str, Any]:
        return {
            "stream": self._stream.state_dict(),
            "left": list(self._left),
            "epoch": self._epoch,
            "world": [self._rank, self._size],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["world"] != [self._rank, self._size]:
            raise CheckpointError(
                f"{self.name}: the checkpoint's stream was split over {state['world'][1]} ranks and this run has "
                f"{self._size}; resume with --nproc_per_node={state['world'][1]}"
            )
        self._stream.load_state_dict(state["stream"])
        self._begin(state["epoch"])
        self._left = list(state["left"])


def _stream_errors() -> tuple[type[Exception], ...]:
    """What reading a stream raises when the file or the network is at fault."""
    from datasets.exceptions import DatasetsError
    from pyarrow import ArrowException

    return (OSError, DatasetsError, ArrowException)


def _open_stream(cfg: TrainConfig) -> tuple[Any, str]:
    """The Hugging Face stream of a fineweb dataset, and what to call it in an error."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"data.dataset = {cfg.data.dataset}: needs datasets; pip install datasets transformers"
        ) from error
    if cfg.data.dataset == "fineweb_edu_local":
        if cfg.data.path is None:
            raise DataError("data.dataset = fineweb_edu_local: pass --local-path with a folder of .parquet or .jsonl")
        _, files = find_files(cfg.data.path, RECORD_SUFFIXES)
        kinds = {file.suffix for file in files}
        if len(kinds) > 1:
            raise DataError(f"{cfg.data.path}: holds both .parquet and .jsonl; pass a glob that takes one kind")
        reader = "json" if kinds == {".jsonl"} else "parquet"
        names = [str(file) for file in files if file.stat().st_size]
        if not names:
            raise DataError(
                f"{cfg.data.path}: {len(files)} files and nothing in them; pass --local-path with some text"
            )
        try:
            return datasets.load_dataset(reader, data_files=names, split="train", streaming=True), cfg.data.path
        except _stream_errors() as error:
            said = str(error).partition("\n")[0]
            raise DataError(f"{cfg.data.path}: not readable as {reader}: {said}; mend or remove the file") from error
    name = f"{cfg.data.hub_name}/{cfg.data.hub_subset}"
    try:
        stream = datasets.load_dataset(cfg.data.hub_name, name=cfg.data.hub_subset, split="train", streaming=True)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{name}: cannot be reached ({type(error).__name__}); with a copy on disk pass "
            "--dataset fineweb_edu_local --local-path FOLDER, without one --dataset text"
        ) from error
    return stream, name


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
    stream, name = _open_stream(cfg)
    return StreamWindows(stream, _fitting(cfg), cfg, world, rows, mine, name)


def _fitting(cfg: TrainConfig) -> Tokenizer:
    tokenizer = open_tokenizer(cfg.data.tokenizer)
    if tokenizer.vocab_size > cfg.model.vocab_size:
        raise DataError(
            f"model.vocab_size = {cfg.model.vocab_size} is below the {tokenizer.vocab_size} ids of data.tokenizer = "
            f"{cfg.data.tokenizer}; set model.vocab_size={tokenizer.vocab_size}"
        )
    return tokenizer
