"""Windows of a stream of documents too large to hold: read here, tokenised by workers, in the stream's own order."""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from nsa.train import workers
from nsa.train.config import TrainConfig
from nsa.train.corpus import CHUNK_BYTES, LOCAL, RECORD_SUFFIXES, Ids, Tokenizer, find_files, read_documents
from nsa.train.dist import World
from nsa.train.errors import CheckpointError, DataError, LostDataError

Position = dict[str, Any]


class Documents(Protocol):
    """This rank's part of a stream. `reader` names the kind of its positions, `source` what a report says of it."""

    name: str
    reader: str
    source: str

    def first(self, count: int) -> list[bytes]:
        """The first documents of the whole stream, whichever rank's."""

    def begin(self, epoch: int, position: Position | None) -> Iterator[bytes]:
        """The documents from a position of this epoch on; None: from its start."""

    def position(self) -> Position:
        """Behind the last document that `begin`'s iterator gave."""


class FileDocuments:
    """.jsonl and .parquet files in the order of their names; rank r takes every size-th document."""

    reader, source = "files", LOCAL

    def __init__(self, path: str | None, text_key: str, world: World) -> None:
        if path is None:
            raise DataError(
                "data.dataset = fineweb_edu_local: pass --local-path with a folder of token shards "
                "(python -m nsa.train.prepare makes one), .parquet or .jsonl"
            )
        self.name, self._text_key, self._rank, self._size = path, text_key, world.rank, world.size if world.ddp else 1
        root, files = find_files(path, RECORD_SUFFIXES)
        self._files = [file for file in files if file.stat().st_size]
        if not self._files:
            raise DataError(f"{path}: {len(files)} files and nothing in them; pass --local-path with some text")
        known = [file.relative_to(root).as_posix() for file in self._files]
        self._digest = hashlib.sha256(repr(known).encode()).hexdigest()
        self._at = (0, 0, 0)

    def first(self, count: int) -> list[bytes]:
        return list(itertools.islice(read_documents(self._files, self._text_key), count))

    def begin(self, epoch: int, position: Position | None) -> Iterator[bytes]:
        if position is None:
            self._at = (0, 0, 0)
        elif position["files"] != self._digest:
            raise CheckpointError(
                f"{self.name}: its files are not those that the checkpoint was trained on (other names); "
                "bring them back, or start without --resume"
            )
        else:
            self._at = (position["file"], position["document"], position["number"])
        return self._read()

    def _read(self) -> Iterator[bytes]:
        index, document, number = self._at
        while index < len(self._files):
            for text in read_documents([self._files[index]], self._text_key, skip=document):
                document, number = document + 1, number + 1
                if (number - 1) % self._size == self._rank % self._size:
                    self._at = (index, document, number)
                    yield text
            index, document = index + 1, 0

    def position(self) -> Position:
        index, document, number = self._at
        return {"files": self._digest, "file": index, "document": document, "number": number}


class HubDocuments:
    """A dataset of the Hugging Face hub, streamed and split over the ranks."""

    reader = "hub"

    def __init__(self, cfg: TrainConfig, world: World) -> None:
        self.name = f"{cfg.data.hub_name}/{cfg.data.hub_subset}"
        self.source = f"hub {self.name}"
        self._text_key = cfg.data.text_key
        try:
            import datasets
            from datasets.distributed import split_dataset_by_node
        except ImportError as error:
            raise DataError(
                f"data.dataset = {cfg.data.dataset}: needs datasets; pip install datasets transformers, or {_NO_HUB}"
            ) from error
        try:
            self._whole = datasets.load_dataset(
                cfg.data.hub_name, name=cfg.data.hub_subset, split="train", streaming=True
            )
        except (OSError, ValueError) as error:
            raise DataError(f"{self.name}: cannot be reached ({type(error).__name__}); {_NO_HUB}") from error
        whole = self._whole
        self._stream = split_dataset_by_node(whole, rank=world.rank, world_size=world.size) if world.ddp else whole

    def first(self, count: int) -> list[bytes]:
        return list(self._texts(itertools.islice(self._whole, count)))

    def begin(self, epoch: int, position: Position | None) -> Iterator[bytes]:
        # Without a position, or with the number of another epoch than the position's, it starts at the beginning.
        self._stream.load_state_dict(position or {})
        self._stream.set_epoch(epoch)
        return self._texts(iter(self._stream))

    def position(self) -> Position:
        state: Position = self._stream.state_dict()
        return state

    def _texts(self, records: Iterator[Any]) -> Iterator[bytes]:
        from datasets.exceptions import DatasetsError
        from pyarrow import ArrowException

        try:
            for record in records:
                text = record.get(self._text_key)
                if not isinstance(text, str):
                    known = ", ".join(key for key, value in record.items() if isinstance(value, str))
                    raise DataError(
                        f"{self.name}: no text under {self._text_key!r}; set data.text_key to one of: "
                        f"{known or 'none holds text'}"
                    )
                yield text.encode(errors="replace")
        # What reading a stream raises when the file or the network is at fault.
        except (OSError, DatasetsError, ArrowException) as error:
            said = str(error).partition("\n")[0]
            raise LostDataError(
                f"{self.name}: the stream broke off ({type(error).__name__}: {said}); mend it and --resume the run"
            ) from error


_NO_HUB = (
    "without the hub make shards of local text: python -m nsa.train.prepare --out FOLDER, and pass "
    "--dataset fineweb_edu_local --local-path FOLDER"
)


class _Chunk(NamedTuple):
    """Ids of documents that were read and tokenised together; `position` is where the stream stood before them."""

    position: Position
    ids: Ids


class StreamWindows:
    """Documents, tokenised, end to end, cut into windows; this rank's part of a stream.

    The first `val_docs` documents are held out: no document with their text is trained on, wherever the stream's
    split puts it. Documents are dealt to the workers in chunks that depend on the stream alone and are taken back in
    order, so neither the workers' number nor their speed shows in the batches. The position is the stream's own
    before the oldest chunk that is not used up, and how many of its ids are.
    No shuffle buffer: what it holds is lost when a stream resumes, and these datasets come shuffled.
    """

    def __init__(
        self, documents: Documents, tokenizer: Tokenizer, cfg: TrainConfig, world: World, rows: int, mine: range
    ) -> None:
        self.documents, self.seq_len, self.rows, self.mine = documents, cfg.train.seq_len, rows, mine
        held = documents.first(cfg.data.val_docs)
        self._held = {hashlib.sha256(text).digest() for text in held}
        self._val = torch.from_numpy(tokenizer.encode(held)[0].astype(np.int64))
        self._world = [world.rank, world.size]
        # A host has no more ranks than cards.
        here = min(world.size, torch.cuda.device_count()) if world.device.type == "cuda" else world.size
        self._count = workers.per_rank(cfg.data.workers, here)
        self._tokenizer = tokenizer
        self._workers: workers.Workers | None = None
        self.summary = {
            "source": documents.source,
            "documents_val": len(held),
            "tokens_val": len(self._val),
            "workers": self._count,
        }
        self._chunks: deque[_Chunk] = deque()
        self._dealt: deque[tuple[Position, Future[tuple[Ids, Ids]]]] = deque()
        self._skip = 0  # ids of the oldest chunk that are used up
        self._begin(0, None)

    def _begin(self, epoch: int, position: Position | None) -> None:
        self._position: Position = {"stream": position, "epoch": epoch}
        self._texts = self.documents.begin(epoch, position)

    def _read(self) -> tuple[Position, list[bytes]]:
        """The next documents that are not held out, and where they begin; a stream that ends starts again."""
        for _ in range(2):
            position, texts, size = self._position, [], 0
            for text in self._texts:
                if text.strip() and hashlib.sha256(text).digest() not in self._held:
                    texts.append(text)
                    size += len(text)
                    if size >= CHUNK_BYTES:
                        break
            if texts:
                self._position = {**position, "stream": self.documents.position()}
                return position, texts
            self._begin(position["epoch"] + 1, None)
        raise DataError(
            f"{self.documents.name}: no document is left to train on; give more documents or a smaller data.val_docs"
        )

    def _deal(self) -> None:
        """Read ahead as far as keeps the workers busy. An error waits for its turn behind what was read before it."""
        if self._workers is None:
            self._workers = workers.Workers(self._tokenizer, self._count)
        while len(self._dealt) < self._workers.ahead and not (self._dealt and _failed(self._dealt[-1][1])):
            broken: Future[tuple[Ids, Ids]] = Future()
            try:
                position, texts = self._read()
                self._dealt.append((position, self._workers.submit(texts)))
            except DataError as error:
                # Before anything was read the data is at fault; later the run can end with a checkpoint.
                fresh = not (self._chunks or self._dealt)
                broken.set_exception(error if fresh else LostDataError(f"{error}; then --resume the run"))
                self._dealt.append((self._position, broken))
            except LostDataError as error:
                broken.set_exception(error)
                self._dealt.append((self._position, broken))

    def _take(self) -> _Chunk:
        self._deal()
        position, future = self._dealt[0]
        ids, _ = future.result()
        self._dealt.popleft()
        return _Chunk(position, ids)

    def batch(self) -> torch.Tensor:
        # The last id is a target here and the first input of the next batch, as in the in-memory datasets.
        used = len(self.mine) * self.seq_len
        while sum(len(chunk.ids) for chunk in self._chunks) - self._skip <= used:
            self._chunks.append(self._take())
        ids, filled, skip = np.empty(used + 1, dtype=np.int64), 0, self._skip
        for chunk in self._chunks:
            part = chunk.ids[skip : skip + len(ids) - filled]
            ids[filled : filled + len(part)] = part
            filled, skip = filled + len(part), max(0, skip - len(chunk.ids))
        self._skip += used
        while self._skip >= len(self._chunks[0].ids):
            self._skip -= len(self._chunks.popleft().ids)
        return torch.from_numpy(ids).unfold(0, self.seq_len + 1, self.seq_len).contiguous()

    def validation(self, batches: int) -> Iterator[torch.Tensor]:
        ids = self._val
        windows = ids.unfold(0, self.seq_len + 1, self.seq_len) if len(ids) > self.seq_len else ids.new_empty(0, 0)
        for start in range(0, min(batches * self.rows, len(windows)), self.rows):
            yield windows[start + self.mine.start : start + self.mine.stop]

    def _oldest(self) -> Position:
        if self._chunks:
            return self._chunks[0].position
        return self._dealt[0][0] if self._dealt else self._position

    @property
    def epoch(self) -> int:
        epoch: int = self._oldest()["epoch"]
        return epoch

    def state_dict(self) -> dict[str, Any]:
        return {**self._oldest(), "skip": self._skip, "reader": self.documents.reader, "world": self._world}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["world"] != self._world:
            raise CheckpointError(
                f"{self.documents.name}: the checkpoint's stream was split over {state['world'][1]} ranks and this run "
                f"has {self._world[1]}; resume with --nproc_per_node={state['world'][1]}"
            )
        # Checkpoints from before there was a reader's name hold the hub's kind of position, for local files too.
        if state.get("reader", "hub") != self.documents.reader:
            raise CheckpointError(
                f"{self.documents.name}: the checkpoint's position in the data is of another reader "
                f"({state.get('reader', 'an older one')}) than this run's ({self.documents.reader}); "
                "start without --resume"
            )
        self._chunks.clear()
        self._dealt.clear()
        self._skip = state.get("skip", 0)
        self._begin(state["epoch"], state["stream"])
        if "left" in state:  # ids that an earlier trainer had taken from the stream and not used up
            position = {"stream": state["stream"], "epoch": state["epoch"], "left": state["left"]}
            self._chunks.append(_Chunk(position, np.array(state["left"], dtype=np.uint32)))

    def check(self) -> None:
        if self._workers is not None:
            self._workers.check()

    def close(self) -> None:
        if self._workers is not None:
            self._workers.close()


def _failed(future: Future[Any]) -> bool:
    return future.done() and future.exception() is not None
