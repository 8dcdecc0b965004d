"""Text on disk as documents, and documents as token ids."""

from __future__ import annotations

import glob
import hashlib
import json
import platform
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nsa.train.errors import DataError

TEXT_SUFFIXES = (".txt", ".md", ".py")
RECORD_SUFFIXES = (".jsonl", ".parquet")
SUFFIXES = TEXT_SUFFIXES + RECORD_SUFFIXES
# Read whole into memory; more than this is a job for the streaming datasets.
MOST_BYTES = 2 << 30
# The library's own tests are a third of its files on one system and absent on the next.
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3", "idlelib"}


@dataclass(frozen=True)
class Tokenizer:
    """`encode` gives a document's ids; `end` closes a document; ids are below `vocab_size`."""

    encode: Callable[[bytes], list[int] | bytes]
    end: int
    vocab_size: int


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


def read_documents(files: list[Path], text_key: str) -> Iterator[bytes]:
    """The documents of the files, in order: a text file is one, a .jsonl line or .parquet row is one."""
    for file in files:
        try:
            if file.suffix == ".jsonl":
                yield from _jsonl(file, text_key)
            elif file.suffix == ".parquet":
                yield from _parquet(file, text_key)
            else:
                yield file.read_bytes()
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error


def _jsonl(file: Path, text_key: str) -> Iterator[bytes]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{file}:{number}: not a JSON record ({error}); mend or remove the line") from error
            if not isinstance(record, dict) or not isinstance(record.get(text_key), str):
                raise DataError(
                    f"{file}:{number}: no text under {text_key!r}; set data.text_key to the field that holds it"
                )
            yield record[text_key].encode()


def _parquet(file: Path, text_key: str) -> Iterator[bytes]:
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
        for batch in table.iter_batches(columns=[text_key]):
            for text in batch.column(0).to_pylist():
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
        return Tokenizer(encode=lambda text: text, end=0, vocab_size=256)
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise DataError(f"data.tokenizer = {name}: needs transformers; pip install transformers") from error
    try:
        bpe: Any = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise DataError(
            f"data.tokenizer = {name}: not in the local cache and not to be had from the hub; "
            "set data.tokenizer to a folder with a saved tokenizer, or to bytes"
        ) from error
    if bpe.eos_token_id is None:
        raise DataError(f"data.tokenizer = {name}: has no end-of-text token; save it with an eos_token")
    bpe.model_max_length = int(1e12)  # documents are cut into windows here, not there: no warning about length

    def encode(text: bytes) -> list[int]:
        return bpe(text.decode(errors="replace"), add_special_tokens=False)["input_ids"]

    return Tokenizer(encode, end=bpe.eos_token_id, vocab_size=len(bpe))


@dataclass(frozen=True)
class Corpus:
    """Documents end to end: `ids` [n] of the smallest dtype that holds them, split at `n_train`.

    `digest` is the hash of the ids; `summary` is for env.json and names no path of this machine.
    """

    ids: torch.Tensor
    n_train: int
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
    dtype = torch.uint8 if tokenizer.vocab_size <= 256 else torch.int32
    pieces, starts, total = [], [], 0
    for document in read_documents(files, text_key):
        if not document.strip():
            continue
        encoded = tokenizer.encode(document)
        piece = torch.empty(len(encoded) + 1, dtype=dtype)
        piece[:-1] = (
            torch.frombuffer(bytearray(encoded), dtype=dtype) if dtype == torch.uint8 else torch.tensor(encoded)
        )
        piece[-1] = tokenizer.end
        pieces.append(piece)
        starts.append(total)
        total += len(piece)
    if not pieces:
        raise DataError(f"{name}: {len(files)} files and no text in them; pass --local-path with some text")
    ids = torch.cat(pieces)
    digest = hashlib.sha256(ids.numpy().tobytes()).hexdigest()
    summary = {"files": len(files), "documents": len(pieces), "tokens": total, "sha256": digest}
    return Corpus(ids, _split(starts, total, val_fraction), digest, summary)


def _split(starts: list[int], total: int, val_fraction: float) -> int:
    """Where the held-out tail begins: a document's start if that holds out at most twice what was asked."""
    if not val_fraction:
        return total
    aim = total - int(total * val_fraction)
    before = max((start for start in starts if start <= aim), default=0)
    return before if total - before <= 2 * (total - aim) else aim
