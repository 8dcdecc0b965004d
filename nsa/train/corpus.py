"""Text on disk as documents, and documents as token ids. Without torch: processes that tokenise import this too."""

from __future__ import annotations

import glob
import hashlib
import json
import platform
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nsa.train.errors import DataError

Ids = npt.NDArray[Any]

TEXT_SUFFIXES = (".txt", ".md", ".py")
RECORD_SUFFIXES = (".jsonl", ".parquet")
SUFFIXES = TEXT_SUFFIXES + RECORD_SUFFIXES
# Read whole into memory; more than this is a job for the streaming datasets.
MOST_BYTES = 2 << 30
# The library's own tests are a third of its files on one system and absent on the next.
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3", "idlelib"}
# Documents of about this many bytes are tokenised together: a quarter of a second of one core.
CHUNK_BYTES = 1 << 18
# What a report says of text that did not come from the hub.
LOCAL = "local text"


@dataclass(frozen=True)
class Tokenizer:
    """Ids are below `vocab_size`; `end` closes a document. `json` is a fast tokenizer's own form of itself (the
    contents of its tokenizer.json), from which another process makes the same one; None: a byte is an id.
    """

    name: str
    end: int
    vocab_size: int
    json: str | None = None

    @cached_property
    def _fast(self) -> Any:
        from tokenizers import Tokenizer as Fast

        fast = Fast.from_str(str(self.json))
        fast.no_truncation()
        fast.no_padding()
        return fast

    def encode(self, texts: Sequence[bytes]) -> tuple[Ids, Ids]:
        """Documents end to end, each closed by `end`: ids uint32 [n], and each document's share of n, int64."""
        if self.json is None:
            parts: list[Any] = [np.frombuffer(text, dtype=np.uint8) for text in texts]
        else:
            decoded = [text.decode(errors="replace") for text in texts]
            parts = self._fast.encode_batch_fast(decoded, add_special_tokens=False)
        lengths = np.fromiter((len(part) + 1 for part in parts), dtype=np.int64, count=len(parts))
        ids = np.full(int(lengths.sum()), self.end, dtype=np.uint32)
        begin = 0
        for part, length in zip(parts, lengths.tolist(), strict=True):
            ids[begin : begin + length - 1] = part if self.json is None else part.ids
            begin += length
        return ids, lengths

    def token(self, number: int) -> str:
        """How an id of a fast tokenizer is written."""
        return str(self._fast.id_to_token(number))


def chunks(texts: Iterable[bytes], size: int = CHUNK_BYTES) -> Iterator[list[bytes]]:
    """The documents in lists of at least `size` bytes, but for the last."""
    held, held_bytes = [], 0
    for text in texts:
        held.append(text)
        held_bytes += len(text)
        if held_bytes >= size:
            yield held
            held, held_bytes = [], 0
    if held:
        yield held


def find_files(path: str | None, suffixes: tuple[str, ...] = SUFFIXES) -> tuple[Path, list[Path]]:
    """The files that `path` (a file, a folder, a glob; None: Python's standard library) stands for, and their root.

    Sorted by path. Raises DataError for a path that holds none.
    """
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        files = [f for f in root.rglob("*.py") if not _NOT_LIBRARY.intersection(f.relative_to(root).parts)]
        if not files:
            raise DataError(
                f"no .py files of Python {platform.python_version()} found; pass --local-path with some text"
            )
        return root, sorted(files)
    root = Path(path)
    if root.is_file():
        if root.suffix not in suffixes:
            raise DataError(f"{path}: unknown kind of file {root.suffix!r}; readable are {', '.join(suffixes)}")
        return root.parent, [root]
    if root.is_dir():
        files = [f for f in root.rglob("*") if f.suffix in suffixes and f.is_file()]
    else:
        files = [Path(f) for f in glob.glob(path, recursive=True)]
        files = [f for f in files if f.suffix in suffixes and f.is_file()]
        root = Path(path.partition("*")[0] or ".")
        root = root if root.is_dir() else root.parent
        if not files and not glob.has_magic(path):
            raise DataError(f"{path}: no such file, folder or glob; pass --local-path with one that exists")
    if not files:
        raise DataError(f"{path}: no file there ends in {', '.join(suffixes)}; pass --local-path with some text")
    return root, sorted(files)


def python_tree() -> list[Path]:
    """The .py files of the running Python, its standard library and its site-packages; without their tests."""
    roots = {Path(sysconfig.get_path(kind)) for kind in ("stdlib", "purelib", "platlib")}
    skipped = _NOT_LIBRARY - {"site-packages", "dist-packages"}
    found = {
        file for root in roots for file in root.rglob("*.py") if not skipped.intersection(file.relative_to(root).parts)
    }
    return sorted(file for file in found if file.is_file())


def read_documents(files: Iterable[Path], text_key: str, skip: int = 0) -> Iterator[bytes]:
    """The documents of the files, in order: a text file is one, a .jsonl line or .parquet row is one. The first
    `skip` of every file are passed over.
    """
    for file in files:
        try:
            if file.suffix == ".jsonl":
                yield from _jsonl(file, text_key, skip)
            elif file.suffix == ".parquet":
                yield from _parquet(file, text_key, skip)
            elif not skip:
                yield file.read_bytes()
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error


def _jsonl(file: Path, text_key: str, skip: int) -> Iterator[bytes]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            if skip:
                skip -= 1
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{file}:{number}: not a JSON record ({error}); mend or remove the line") from error
            text = record.get(text_key) if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise DataError(
                    f"{file}:{number}: no text under {text_key!r}; set data.text_key to {_texts_in(record)}"
                )
            yield text.encode(errors="replace")


def _texts_in(record: object) -> str:
    """Which fields of a record hold text, for a person who named another."""
    known = [key for key, value in record.items() if isinstance(value, str)] if isinstance(record, dict) else []
    return f"one of: {', '.join(known)}" if known else "the field that holds it (none in this record does)"


def _parquet(file: Path, text_key: str, skip: int) -> Iterator[bytes]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"{file}: reading parquet needs pyarrow; pip install pyarrow") from error
    try:
        table = pq.ParquetFile(file)
        if text_key not in table.schema_arrow.names:
            names = ", ".join(table.schema_arrow.names)
            raise DataError(f"{file}: no column {text_key!r}; set data.text_key to one of {names}")
        groups: list[int] = []
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if not groups and skip >= rows:
                skip -= rows
            else:
                groups.append(group)
        for batch in table.iter_batches(row_groups=groups, columns=[text_key]) if groups else ():
            passed = min(skip, len(batch))
            skip -= passed
            for text in batch.column(0)[passed:].to_pylist():
                if text is not None and not isinstance(text, str):
                    raise DataError(
                        f"{file}: column {text_key!r} holds {type(text).__name__}, not text; set data.text_key"
                    )
                yield (text or "").encode()
    except pa.ArrowInvalid as error:
        raise DataError(f"{file}: not a readable parquet file ({str(error).splitlines()[0]})") from error


def open_tokenizer(name: str) -> Tokenizer:
    """`bytes`, or a tokenizer that transformers knows by name or folder. Raises DataError saying what to pass."""
    if name == "bytes":
        # Text never holds byte 0, so it can close a document.
        return Tokenizer(name, end=0, vocab_size=256)
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise DataError(f"data.tokenizer = {name}: needs transformers; pip install transformers") from error
    try:
        bpe: Any = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise DataError(
            f"data.tokenizer = {name}: not in the local cache and not to be had from the hub; set data.tokenizer to a "
            "folder with a saved tokenizer (python -m nsa.train.prepare makes one), or to bytes"
        ) from error
    if bpe.eos_token_id is None:
        raise DataError(f"data.tokenizer = {name}: has no end-of-text token; save it with an eos_token")
    if not getattr(bpe, "is_fast", False):
        raise DataError(f"data.tokenizer = {name}: has no fast form; save it with a tokenizer.json")
    return Tokenizer(name, bpe.eos_token_id, len(bpe), json=bpe.backend_tokenizer.to_str())


class Tokens:
    """Arrays of ids end to end, cut by position; they may lie in memory or be mapped from files."""

    def __init__(self, arrays: Sequence[Ids]) -> None:
        self._arrays = list(arrays)
        self._ends = np.cumsum([len(array) for array in self._arrays], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def cut(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Ids start .. stop - 1, int64 [stop - start]."""
        out = np.empty(stop - start, dtype=np.int64)
        part, filled = int(np.searchsorted(self._ends, start, side="right")), 0
        while filled < len(out):
            array = self._arrays[part]
            inside = start + filled - (int(self._ends[part]) - len(array))
            piece = array[inside : inside + len(out) - filled]
            out[filled : filled + len(piece)] = piece
            filled, part = filled + len(piece), part + 1
        return out


@dataclass(frozen=True)
class Corpus:
    """Documents end to end, to train on and held out. `digest` identifies the ids; `summary` is for env.json and
    names no path of this machine.
    """

    train: Tokens
    val: Tokens
    digest: str
    summary: dict[str, Any]


def load_corpus(path: str | None, tokenizer: Tokenizer, *, text_key: str, val_fraction: float, name: str) -> Corpus:
    """Read a text dataset whole. Documents come in an order that mixes the files and depends on nothing but them;
    the last `val_fraction` of the ids is held out, from a document's start where one is near.

    Raises DataError.
    """
    root, files = find_files(path)
    size = sum(file.stat().st_size for file in files)
    if size > MOST_BYTES:
        raise DataError(
            f"{name}: {size / 1e9:.1f} GB of text does not fit the in-memory dataset ({MOST_BYTES / 1e9:.1f} GB); "
            "use --dataset fineweb_edu_local, which streams .parquet and .jsonl"
        )

    def mixed(file: Path) -> bytes:
        return hashlib.sha256(file.relative_to(root).as_posix().encode()).digest()

    files = sorted(files, key=mixed)
    dtype = np.uint8 if tokenizer.vocab_size <= 256 else np.int32
    texts = (document for document in read_documents(files, text_key) if document.strip())
    encoded = [tokenizer.encode(chunk) for chunk in chunks(texts)]
    if not encoded:
        raise DataError(f"{name}: {len(files)} files and no text in them; pass --local-path with some text")
    ids = np.concatenate([part for part, _ in encoded], dtype=dtype, casting="unsafe")
    lengths = np.concatenate([part for _, part in encoded])
    starts, total = (np.cumsum(lengths) - lengths).tolist(), len(ids)
    n_train = _split(starts, total, val_fraction)
    digest = hashlib.sha256(ids.tobytes()).hexdigest()
    summary = {"source": LOCAL, "files": len(files), "documents": len(lengths), "tokens": total, "sha256": digest}
    return Corpus(Tokens([ids[:n_train]]), Tokens([ids[n_train:]]), digest, summary)


def _split(starts: list[int], total: int, val_fraction: float) -> int:
    """Where the held-out tail begins: a document's start if that holds out at most twice what was asked."""
    if not val_fraction:
        return total
    aim = total - int(total * val_fraction)
    before = max((start for start in starts if start <= aim), default=0)
    return before if total - before <= 2 * (total - aim) else aim
