"""Token shards: documents already tokenised, in files that are mapped into memory.

A folder holds `train_00000.bin ...` and `val_00000.bin ...`, ids end to end in little-endian uint16 or uint32, every
document closed by the end-of-document id; `tokenizer.json`; and `meta.json`, which is written last and says what the
ids are: format, version, tokenizer (name, sha256), vocab_size, dtype, end, documents, tokens, and of every shard its
name, split, tokens and sha256.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nsa.train.corpus import LOCAL, Corpus, Ids, Tokens
from nsa.train.errors import DataError

FORMAT, VERSION = "nsa-tokens", 1
META = "meta.json"
# 134 MB of uint16: written from memory, and hashed in a moment.
SHARD_TOKENS = 1 << 26
_AGAIN = "make the folder again with python -m nsa.train.prepare"

Split = Literal["train", "val"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TokenizerMeta(_Part):
    name: str
    sha256: str


class ShardMeta(_Part):
    name: str = Field(pattern=r"^(train|val)_\d{5}\.bin$")
    split: Split
    tokens: int = Field(ge=1)
    sha256: str


class Meta(_Part):
    """The contents of meta.json."""

    format: Literal["nsa-tokens"]
    version: Literal[1]
    tokenizer: TokenizerMeta
    vocab_size: int = Field(ge=1)
    dtype: Literal["uint16", "uint32"]
    end: int = Field(ge=0)
    documents: int = Field(ge=1)
    tokens: int = Field(ge=1)
    shards: list[ShardMeta] = Field(min_length=1)

    @property
    def digest(self) -> str:
        """Of all ids in their order, and of what they mean."""
        known = [self.tokenizer.sha256, *((shard.split, shard.sha256) for shard in self.shards)]
        return hashlib.sha256(repr(known).encode()).hexdigest()

    def of(self, split: Split) -> list[ShardMeta]:
        return [shard for shard in self.shards if shard.split == split]


class Writer:
    """Writes shards into a folder that exists; `finish` writes meta.json. Nothing there is valid before."""

    def __init__(self, folder: Path, vocab_size: int, shard_tokens: int = SHARD_TOKENS) -> None:
        self.folder, self.vocab_size, self._shard_tokens = folder, vocab_size, shard_tokens
        self.dtype: Literal["uint16", "uint32"] = "uint16" if vocab_size <= 1 << 16 else "uint32"
        self._held: dict[Split, list[Ids]] = {"train": [], "val": []}
        self._shards: dict[Split, list[ShardMeta]] = {"train": [], "val": []}

    def add(self, split: Split, ids: Ids) -> None:
        assert not len(ids) or int(ids.max()) < self.vocab_size, "an id is not of this vocabulary"
        held = self._held[split]
        held.append(ids.astype(self.dtype))
        while sum(map(len, held)) >= self._shard_tokens:
            whole = np.concatenate(held)
            self._write(split, whole[: self._shard_tokens])
            held[:] = [whole[self._shard_tokens :]]

    def _write(self, split: Split, ids: Ids) -> None:
        name = f"{split}_{len(self._shards[split]):05d}.bin"
        data = ids.astype("<u2" if self.dtype == "uint16" else "<u4").tobytes()
        _write_through(self.folder / name, data)
        meta = ShardMeta(name=name, split=split, tokens=len(ids), sha256=hashlib.sha256(data).hexdigest())
        self._shards[split].append(meta)

    def finish(self, tokenizer_name: str, tokenizer_json: str, end: int, documents: int) -> Meta:
        for split, held in self._held.items():
            if sum(map(len, held)):
                self._write(split, np.concatenate(held))
        shards = [*self._shards["train"], *self._shards["val"]]
        digest = hashlib.sha256(tokenizer_json.encode()).hexdigest()
        meta = Meta(
            format="nsa-tokens",
            version=1,
            tokenizer=TokenizerMeta(name=tokenizer_name, sha256=digest),
            vocab_size=self.vocab_size,
            dtype=self.dtype,
            end=end,
            documents=documents,
            tokens=sum(shard.tokens for shard in shards),
            shards=shards,
        )
        _write_through(self.folder / META, (json.dumps(meta.model_dump(), indent=2) + "\n").encode())
        return meta


def _write_through(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def found(path: str) -> bool:
    """Whether the path is a folder of shards, whole or not."""
    folder = Path(path)
    return (folder / META).is_file() or any(re.fullmatch(r"train_\d{5}\.bin", f.name) for f in folder.glob("*.bin"))


def read_meta(folder: Path) -> Meta:
    """meta.json, checked. Raises DataError naming it and what to do."""
    path = folder / META
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing, so the shards there cannot be read; {_AGAIN}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({str(error).splitlines()[0]}); {_AGAIN}") from error
    known = (FORMAT, VERSION)
    if not isinstance(raw, dict) or (raw.get("format"), raw.get("version")) != known:
        what = f"{raw.get('format')!r} version {raw.get('version')!r}" if isinstance(raw, dict) else "no record"
        raise DataError(f"{path}: is {what}, this trainer reads {FORMAT!r} version {VERSION}; {_AGAIN}")
    try:
        return Meta.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise DataError(f"{path}: {key}: {first['msg'].lower()}; {_AGAIN}") from error


def load(path: str, vocab_size: int) -> Corpus:
    """The shards of a folder, each checked against meta.json, mapped into memory; `vocab_size` is the model's.

    Raises DataError naming the file and what to do.
    """
    folder = Path(path)
    meta = read_meta(folder)
    if meta.vocab_size > vocab_size:
        raise DataError(
            f"model.vocab_size = {vocab_size} is below the {meta.vocab_size} ids of {folder / META}; "
            f"set model.vocab_size={meta.vocab_size}"
        )
    # Hashing lets go of the interpreter, so that four files are read at once.
    with ThreadPoolExecutor(4) as pool:
        mapped = list(pool.map(lambda shard: _map(folder, shard, meta), meta.shards))
    train, val = (
        Tokens([ids for ids, shard in zip(mapped, meta.shards, strict=True) if shard.split == split])
        for split in ("train", "val")
    )
    summary: dict[str, Any] = {
        "source": LOCAL,
        "documents": meta.documents,
        "tokens": meta.tokens,
        "tokenizer": meta.tokenizer.sha256,
        "vocab_size": meta.vocab_size,
        "sha256": meta.digest,
    }
    return Corpus(train, val, meta.digest, summary)


def _map(folder: Path, shard: ShardMeta, meta: Meta) -> Ids:
    path = folder / shard.name
    dtype = np.dtype("<u2" if meta.dtype == "uint16" else "<u4")
    try:
        size = path.stat().st_size
        if size != shard.tokens * dtype.itemsize:
            raise DataError(
                f"{path}: holds {size} bytes, meta.json says {shard.tokens * dtype.itemsize}: it was cut short or "
                f"replaced; {_AGAIN}"
            )
        ids = np.memmap(path, dtype=dtype, mode="r")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}; {_AGAIN}") from error
    if hashlib.sha256(ids.data).hexdigest() != shard.sha256:
        raise DataError(f"{path}: was changed since meta.json was written (its hash differs); {_AGAIN}")
    return ids
