"""Token shards for `--dataset fineweb_edu_local`: python -m nsa.train.prepare --out FOLDER [flags].

Documents come from .txt, .md, .py, .jsonl and .parquet files, without --input from the .py files of this machine's own
Python and its packages. Duplicates are left out, and the order is that of the documents' hashes, so the same input
gives the same bytes wherever its files lie. stdout gets one line, stderr the progress.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import struct
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, closing
from pathlib import Path

from nsa.train import shards
from nsa.train.corpus import Ids, Tokenizer, chunks, find_files, open_tokenizer, python_tree, read_documents
from nsa.train.errors import DataError, SaveError, TrainError
from nsa.train.workers import Workers

GPT2_VOCAB = 50_257
END = "<|endoftext|>"
# A vocabulary is learned from this much text: more changes few of its merges and takes minutes.
_LEARN_BYTES = 1 << 26
_BUCKETS = 64
_HEAD = struct.Struct("<32sQ")
_TELL_TOKENS = 10**7
# What errors of the reading call by the trainer's names.
_FLAGS = {"data.text_key to": "--text-key to", "data.tokenizer": "--tokenizer", "--local-path": "--input"}


class HashOrder:
    """Documents on disk, without duplicates, in the order of their sha256; one bucket of them in memory at a time."""

    def __init__(self, documents: Iterator[bytes], folder: Path) -> None:
        self._files = [folder / f"bucket_{number:02d}" for number in range(_BUCKETS)]
        self.count = self.bytes = 0
        with ExitStack() as stack:
            buckets = [stack.enter_context(file.open("wb")) for file in self._files]
            for text in documents:
                if text.strip():
                    digest = hashlib.sha256(text).digest()
                    buckets[digest[0] * _BUCKETS >> 8].write(_HEAD.pack(digest, len(text)) + text)
                    self.count, self.bytes = self.count + 1, self.bytes + len(text)
                    if self.count % 10_000 == 0:
                        _progress(f"read {self.count:,} documents, {self.bytes / 1e6:,.0f} MB")

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        """Digests and texts."""
        for file in self._files:
            data, found, at = file.read_bytes(), {}, 0
            while at < len(data):
                digest, size = _HEAD.unpack_from(data, at)
                at += _HEAD.size
                found[digest] = (at, at + size)
                at += size
            for digest in sorted(found):
                begin, end = found[digest]
                yield digest, data[begin:end]


def prepare(
    out: Path,
    documents: Iterator[bytes],
    *,
    tokenizer: Tokenizer | None = None,
    vocab_size: int = GPT2_VOCAB,
    val_fraction: float = 0.005,
    max_tokens: int | None = None,
    processes: int = 0,
    shard_tokens: int = shards.SHARD_TOKENS,
) -> shards.Meta:
    """Write the shards of the documents into `out`, which appears whole or not at all.

    tokenizer: None trains a byte-level BPE of at most `vocab_size` ids on the documents. val_fraction: the share of
    the documents held out, those of the lowest hashes; of more than none at least one. max_tokens: stop there.
    Raises DataError, LostDataError, SaveError.
    """
    if out.exists():
        raise DataError(f"{out}: exists; remove it, or name another --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.partial-", dir=out.parent) as partial:
            folder = Path(partial) / "shards"
            folder.mkdir()
            ordered = HashOrder(documents, Path(partial))
            if not ordered.count:
                raise DataError("no text in the input; name files with some text")
            tokenizer = tokenizer or learn(ordered, vocab_size)
            writer = shards.Writer(folder, tokenizer.vocab_size, shard_tokens)
            with closing(Workers(tokenizer, processes)) as workers:
                done = _tokenise(ordered, _Filling(workers, writer, val_fraction, max_tokens), val_fraction)
            save_tokenizer(tokenizer, folder)
            meta = writer.finish(tokenizer.name, str(tokenizer.json), tokenizer.end, done)
            os.rename(folder, out)
            return meta
    except OSError as error:
        raise SaveError(f"{out}: not written: {error.strerror or error}; make room or name another --out") from error


def learn(ordered: HashOrder, vocab_size: int) -> Tokenizer:
    """A byte-level BPE, of the kind of GPT-2's, from the first documents in the order of their hashes."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers

    def texts() -> Iterator[str]:
        size = 0
        for _, text in ordered:
            size += len(text)
            if size > _LEARN_BYTES:
                return
            yield text.decode(errors="replace")

    _progress(f"learning {vocab_size:,} ids from {min(ordered.bytes, _LEARN_BYTES) / 1e6:,.0f} MB of text")
    bpe = Fast(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts(),
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[END], initial_alphabet=sorted(alphabet), show_progress=False
        ),
    )
    size = bpe.get_vocab_size()
    return Tokenizer(f"bpe-{size}", int(bpe.token_to_id(END) or 0), size, json=bpe.to_str())


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """As transformers' AutoTokenizer reads it."""
    (folder / "tokenizer.json").write_text(str(tokenizer.json), encoding="utf-8")
    end = tokenizer.token(tokenizer.end)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


class _Filling:
    """Ids on their way from the workers to the writer; of either split no more than its share of `max_tokens`."""

    def __init__(self, workers: Workers, writer: shards.Writer, val_fraction: float, max_tokens: int | None) -> None:
        self.workers, self.writer, self.documents = workers, writer, 0
        val = None if max_tokens is None else int(max_tokens * val_fraction)
        self.room: dict[shards.Split, int] = {
            "val": sys.maxsize if val is None else val,
            "train": sys.maxsize if max_tokens is None or val is None else max_tokens - val,
        }
        self.written = 0
        self._flying: deque[tuple[shards.Split, Future[tuple[Ids, Ids]]]] = deque()

    def add(self, split: shards.Split, texts: Iterator[bytes]) -> None:
        for chunk in chunks(texts):
            self._flying.append((split, self.workers.submit(chunk)))
            self._settle(self.workers.ahead)
            if not self.room[split]:
                break
        self._settle(0)

    def _settle(self, ahead: int) -> None:
        while len(self._flying) > ahead:
            split, future = self._flying.popleft()
            ids, lengths = future.result()
            begins = lengths.cumsum() - lengths
            self.documents += int((begins < self.room[split]).sum())
            ids = ids[: self.room[split]]
            self.room[split] -= len(ids)
            self.writer.add(split, ids)
            before, self.written = self.written, self.written + len(ids)
            if before // _TELL_TOKENS != self.written // _TELL_TOKENS:
                _progress(f"{self.written / 1e6:,.0f} million tokens")


def _tokenise(ordered: HashOrder, filling: _Filling, val_fraction: float) -> int:
    """Write the ids of the documents, held-out ones first; how many documents these were."""
    below = int(val_fraction * 2**64)

    def held(number: int, digest: bytes) -> bool:
        return bool(below) and (number == 0 or int.from_bytes(digest[:8], "big") < below)

    numbered = itertools.takewhile(lambda item: held(item[0], item[1][0]), enumerate(ordered))
    filling.add("val", (text for _, (_, text) in numbered))
    filling.add("train", (text for number, (digest, text) in enumerate(ordered) if not held(number, digest)))
    return filling.documents


def _progress(text: str) -> None:
    print(f"prepare: {text}", file=sys.stderr, flush=True)


def _documents(inputs: list[str], text_key: str) -> Iterator[bytes]:
    if not inputs:
        files = python_tree()
        _progress(f"{len(files):,} files of this machine's Python")
        yield from read_documents(files, text_key)
    for path in inputs:
        yield from read_documents(find_files(path)[1], text_key)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m nsa.train.prepare", description=__doc__)
    parser.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="must not exist yet")
    parser.add_argument("--input", metavar="PATH", nargs="*", default=[], help="files, folders or globs")
    parser.add_argument("--text-key", default="text", help="the field of a record that holds its text")
    parser.add_argument("--tokenizer", metavar="NAME_OR_FOLDER", help="use this one; default: learn one from the text")
    parser.add_argument("--vocab-size", type=int, default=GPT2_VOCAB, help=f"ids to learn, at most {GPT2_VOCAB:,}")
    parser.add_argument("--val-fraction", type=float, default=0.005, help="share of the documents held out")
    parser.add_argument("--max-tokens", type=int, help="stop after so many")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="0: tokenise in this one")
    arguments = parser.parse_args(argv)
    if not 257 <= arguments.vocab_size <= GPT2_VOCAB:
        parser.error(f"--vocab-size {arguments.vocab_size}: 257 (the bytes and an end) to {GPT2_VOCAB}")
    if not 0 <= arguments.val_fraction < 1:
        parser.error(f"--val-fraction {arguments.val_fraction}: 0 to below 1")
    if arguments.max_tokens is not None and arguments.max_tokens < 1:
        parser.error(f"--max-tokens {arguments.max_tokens}: at least 1")
    if arguments.processes < 0:
        parser.error(f"--processes {arguments.processes}: 0 or more")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        tokenizer = open_tokenizer(arguments.tokenizer) if arguments.tokenizer else None
        if tokenizer is not None and tokenizer.json is None:
            raise DataError("--tokenizer bytes: text read as bytes needs no shards; pass --dataset text to the trainer")
        meta = prepare(
            arguments.out,
            _documents(arguments.input, arguments.text_key),
            tokenizer=tokenizer,
            vocab_size=arguments.vocab_size,
            val_fraction=arguments.val_fraction,
            max_tokens=arguments.max_tokens,
            processes=arguments.processes,
        )
    except TrainError as error:
        said = str(error)
        for name, flag in _FLAGS.items():
            said = said.replace(name, flag)
        print(f"prepare: {said}", file=sys.stderr)
        return error.exit_code
    train, val = (sum(shard.tokens for shard in meta.of(split)) for split in ("train", "val"))
    print(
        f"{arguments.out}: {meta.documents:,} documents, {train:,} tokens to train on, {val:,} held out, "
        f"{meta.vocab_size:,} ids, {len(meta.shards)} shards, sha256 {meta.digest[:12]}"
    )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
