"""Token shards: made alike from the same text, read whole or refused by name, one global order for all ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nsa.train import config, shards
from nsa.train.data import open_data
from nsa.train.dist import World
from nsa.train.errors import CheckpointError, DataError

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU, False)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Sixty documents in files of three kinds, one of them twice."""
    root = tmp_path_factory.mktemp("text")
    documents = [f"document {i} says " + " ".join(str(i * k) for k in range(40 + i % 9)) for i in range(60)]
    for i, document in enumerate(documents[:20]):
        (root / f"{i}.txt").write_text(document)
    (root / "again.md").write_text(documents[0])
    (root / "rest.jsonl").write_text("\n".join(json.dumps({"text": document}) for document in documents[20:]))
    return root


@pytest.fixture(scope="module")
def make():
    """Shards of a folder's text; 1,000 tokens in a shard, so that there are several."""
    pytest.importorskip("tokenizers", reason="BPE needs tokenizers")
    from nsa.train.corpus import find_files, read_documents
    from nsa.train.prepare import prepare

    def make(out, text, **settings):
        documents = read_documents(find_files(str(text))[1], "text")
        settings = {"vocab_size": 300, "val_fraction": 0.1, "shard_tokens": 1000, **settings}
        return prepare(Path(out), documents, **settings)

    return make


@pytest.fixture(scope="module")
def made(make, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "shards"
    make(out, text)
    return out


@pytest.fixture
def folder(made, tmp_path):
    """A copy to damage."""
    copy = tmp_path / "shards"
    copy.mkdir()
    for file in made.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def a_config(path, *, vocab_size=300, seq_len=32, batch_size=4, **data):
    return config.build(
        {
            "model": {"vocab_size": vocab_size},
            "data": {"dataset": "fineweb_edu_local", "path": str(path), **data},
            "train": {"seq_len": seq_len, "batch_size": batch_size},
        }
    )


def take(source, n):
    return torch.stack([source.batch() for _ in range(n)])


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


# --- made ---


def test_the_same_text_gives_the_same_bytes_wherever_it_lies_and_by_however_many(make, made, text, tmp_path):
    moved = tmp_path / "moved" / "deeper"
    moved.mkdir(parents=True)
    for number, file in enumerate(sorted(text.iterdir(), reverse=True)):
        lines = file.read_text().split("\n")[::-1]
        (moved / f"{number:02d}{file.suffix}").write_text("\n".join(lines))
    make(tmp_path / "again", tmp_path / "moved", processes=2)
    assert contents(tmp_path / "again") == contents(made)


def test_every_document_is_there_once_and_none_is_both_held_out_and_trained_on(made, text):
    from transformers import AutoTokenizer

    meta = shards.read_meta(made)
    corpus = shards.load(str(made), 300)
    tokenizer = AutoTokenizer.from_pretrained(made)
    assert tokenizer.eos_token_id == meta.end
    found = []
    for tokens in (corpus.train, corpus.val):
        decoded = tokenizer.decode(tokens.cut(0, len(tokens)).tolist())
        assert decoded.endswith(tokenizer.eos_token)
        found.append(decoded.split(tokenizer.eos_token)[:-1])
    train, val = found
    records = [json.loads(line)["text"] for line in (text / "rest.jsonl").read_text().splitlines()]
    written = [file.read_text() for file in text.glob("*.txt")] + records
    assert sorted(train + val) == sorted(written)
    assert len(written) == meta.documents == 60
    assert 1 <= len(val) < 20


def test_the_prepared_folder_is_a_tokenizer_of_the_trainer_too(made, text):
    from nsa.train.corpus import open_tokenizer

    tokenizer, meta = open_tokenizer(str(made)), shards.read_meta(made)
    assert (tokenizer.vocab_size, tokenizer.end) == (meta.vocab_size, meta.end)
    assert open_data(a_config(text / "*.jsonl", tokenizer=str(made), workers=0, val_docs=5), ALONE).batch().shape == (
        4,
        33,
    )


def test_a_vocabulary_past_16_bits_is_kept_whole(tmp_path):
    ids = torch.tensor([70_000, 1, 65_536, 0] * 20).numpy()
    writer = shards.Writer(tmp_path, 70_001, shard_tokens=30)
    for split in ("train", "val"):
        writer.add(split, ids)
    assert writer.finish("t", "{}", 0, 40).dtype == "uint32"
    corpus = shards.load(str(tmp_path), 70_001)
    for tokens in (corpus.train, corpus.val):
        assert tokens.cut(0, len(tokens)).tolist() == ids.tolist()


@pytest.mark.parametrize("most", [1, 500, 1700])
def test_no_more_tokens_are_written_than_asked_for(make, text, tmp_path, most):
    meta = make(tmp_path / "out", text, max_tokens=most)
    assert meta.tokens == most
    whole = make(tmp_path / "whole", text)
    assert whole.tokens > most
    assert meta.documents < whole.documents


def test_an_interrupted_preparation_leaves_nothing(make, text, tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(shards.Writer, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "out", text)
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_not_written_over(make, made, text):
    before = contents(made)
    with pytest.raises(DataError, match=r"exists; remove it, or name another --out"):
        make(made, text)
    assert contents(made) == before


def run(*arguments, tmp_path):
    root = Path(__file__).resolve().parents[1]
    return subprocess.run(
        [sys.executable, "-m", "nsa.train.prepare", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        check=False,
    )


def test_the_command_prints_one_line_and_its_tokenizer_can_be_used_again(make, text, tmp_path):
    first = run("--out", "a", "--input", text, "--vocab-size", 300, "--processes", 1, tmp_path=tmp_path)
    assert (first.returncode, first.stdout.count("\n")) == (0, 1)
    assert first.stdout.startswith("a: 60 documents, ")
    assert "learning 300 ids" in first.stderr
    second = run("--out", "b", "--input", text, "--tokenizer", "a", "--processes", 0, tmp_path=tmp_path)
    assert second.returncode == 0
    left, right = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert left["train_00000.bin"] == right["train_00000.bin"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--input", "gone"], 2, "prepare: gone: no such file, folder or glob; pass --input with one that exists"),
        (["--input", "a.jsonl"], 2, "a.jsonl:1: no text under 'text'; set --text-key to one of: body"),
        (["--input", "a.jsonl", "--tokenizer", "bytes"], 2, "read as bytes needs no shards"),
        (["--vocab-size", "50258"], 2, "--vocab-size 50258: 257 (the bytes and an end) to 50257"),
        (["--val-fraction", "1"], 2, "--val-fraction 1.0: 0 to below 1"),
    ],
)
def test_the_command_says_what_cannot_be_done(make, tmp_path, arguments, code, said):
    (tmp_path / "a.jsonl").write_text('{"body": "x", "n": 1}\n')
    result = run("--out", "out", *arguments, tmp_path=tmp_path)
    assert (result.returncode, result.stdout) == (code, "")
    assert said in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_the_python_tree_is_libraries_without_their_tests():
    from nsa.train.corpus import python_tree

    files = python_tree()
    assert any(file.parts[-2:] == ("json", "decoder.py") for file in files)
    assert any("site-packages" in file.parts for file in files)
    assert not any({"test", "tests"}.intersection(file.parts) for file in files)
    assert len(files) == len(set(files))


# --- read ---


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_one_global_order(made, ranks):
    whole = open_data(a_config(made), ALONE)
    parts = [open_data(a_config(made), World(rank, ranks, CPU, False)) for rank in range(ranks)]
    for _ in range(2 * whole.summary["windows_train"] // 4):
        assert torch.equal(whole.batch(), torch.cat([part.batch() for part in parts]))
        assert {part.epoch for part in parts} == {whole.epoch}
    assert whole.epoch in (1, 2)


def test_an_epoch_is_every_window_of_the_shards_once(made):
    corpus, source = shards.load(str(made), 300), open_data(a_config(made, batch_size=1), ALONE)
    count = (len(corpus.train) - 1) // 32
    ids = corpus.train.cut(0, len(corpus.train))
    assert len(shards.read_meta(made).of("train")) > 1, "windows span files"
    assert source.summary["windows_train"] == count
    seen = sorted(tuple(row) for row in take(source, count)[:, 0].tolist())
    assert seen == sorted(tuple(ids[32 * i : 32 * i + 33].tolist()) for i in range(count))
    assert source.epoch == 1


def test_a_position_is_one_number_for_any_number_of_ranks(made):
    source = open_data(a_config(made), ALONE)
    take(source, 70)
    state = json.loads(json.dumps(source.state_dict()))
    assert state["next"] == 280
    expected = take(source, 30)
    parts = [open_data(a_config(made), World(rank, 2, CPU, False)) for rank in range(2)]
    for part in parts:
        part.load_state_dict(state)
    assert torch.equal(torch.cat([take(part, 30) for part in parts], dim=1), expected)


def test_validation_reads_what_is_held_out(made):
    corpus, source = shards.load(str(made), 300), open_data(a_config(made), ALONE)
    ids = corpus.val.cut(0, len(corpus.val)).tolist()
    windows = [row for batch in source.validation(1000) for row in batch.tolist()]
    assert len(windows) == (len(ids) - 1) // 32 >= 1
    assert sorted(windows) == sorted(ids[32 * i : 32 * i + 33] for i in range(len(windows)))


def test_shards_say_that_they_are_local_and_need_neither_tokenizer_nor_datasets(made, monkeypatch):
    for name in ("datasets", "transformers", "tokenizers"):
        monkeypatch.setitem(sys.modules, name, None)
    summary = open_data(a_config(made, tokenizer="gpt2"), ALONE).summary
    assert summary["source"] == "local text"
    assert str(made) not in repr(summary)


def test_a_checkpoint_of_other_shards_is_refused(make, made, text, tmp_path):
    make(tmp_path / "other", text, vocab_size=290)
    state = open_data(a_config(made), ALONE).state_dict()
    with pytest.raises(CheckpointError, match="the text is not the one that the checkpoint was trained on"):
        open_data(a_config(tmp_path / "other"), ALONE).load_state_dict(state)


def cut_short(folder):
    with (folder / "train_00001.bin").open("r+b") as file:
        file.truncate(1998)


def flip_a_bit(folder):
    data = bytearray((folder / "val_00000.bin").read_bytes())
    data[7] ^= 1
    (folder / "val_00000.bin").write_bytes(data)


def edit(**changes):
    def change(folder):
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps({**meta, **changes}))

    return change


@pytest.mark.parametrize(
    ("damage", "named", "said"),
    [
        (cut_short, "train_00001.bin", "holds 1998 bytes, meta.json says 2000: it was cut short"),
        (flip_a_bit, "val_00000.bin", "was changed since meta.json was written"),
        (lambda d: (d / "train_00000.bin").unlink(), "train_00000.bin", "cannot be read: No such file"),
        (lambda d: (d / "meta.json").unlink(), "meta.json", "missing"),
        (lambda d: (d / "meta.json").write_text("{"), "meta.json", "cannot be read"),
        (lambda d: (d / "meta.json").write_text("[]"), "meta.json", "is no record"),
        (edit(version=2), "meta.json", "is 'nsa-tokens' version 2, this trainer reads 'nsa-tokens' version 1"),
        (edit(format="other"), "meta.json", "is 'other' version 1"),
        (edit(dtype="int8"), "meta.json", "dtype: input should be 'uint16' or 'uint32'"),
        (edit(shards=[]), "meta.json", "shards: list should have at least 1 item"),
        (
            edit(shards=[{"name": "../x.bin", "split": "train", "tokens": 1, "sha256": ""}]),
            "meta.json",
            r"shards.0.name: string should match pattern",
        ),
    ],
)
def test_shards_that_are_not_whole_are_refused_by_name(folder, damage, named, said):
    damage(folder)
    with pytest.raises(DataError) as error:
        open_data(a_config(folder), ALONE)
    assert str(error.value).startswith(f"{folder / named}: ")
    assert said in str(error.value)
    assert str(error.value).endswith("make the folder again with python -m nsa.train.prepare")


def test_a_vocabulary_that_the_model_does_not_hold_is_named(made):
    with pytest.raises(DataError, match=r"model\.vocab_size = 299 is below the 300 ids .* set model\.vocab_size=300"):
        open_data(a_config(made, vocab_size=299), ALONE)


def test_shards_shorter_than_a_window_are_named(made):
    with pytest.raises(DataError, match=r"are fewer than one window of train\.seq_len \+ 1 = 100001"):
        open_data(a_config(made, seq_len=100_000), ALONE)
