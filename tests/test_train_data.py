"""Datasets: what is read, that a position resumes exactly, that ranks share a global batch, and honest refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nsa.train import config
from nsa.train.corpus import find_files, load_corpus, open_tokenizer
from nsa.train.data import open_data
from nsa.train.dist import World
from nsa.train.errors import CheckpointError, ConfigError, DataError, TrainError

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU, False)


def a_config(*, batch_size=4, seq_len=16, seed=1, vocab_size=256, **data):
    return config.build(
        {
            "model": {"vocab_size": vocab_size},
            "data": data,
            "train": {"batch_size": batch_size, "seq_len": seq_len, "seed": seed},
        }
    )


@pytest.fixture
def folder(tmp_path):
    """Twenty files of words that occur nowhere else."""
    root = tmp_path / "corpus"
    for n in range(20):
        file = root / f"part{n % 3}" / f"{n}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(" ".join(f"word{n}x{i}" for i in range(60)))
    return root


def take(source, n):
    return torch.stack([source.batch() for _ in range(n)])


def test_targets_are_the_next_ids_of_the_text(folder):
    source = open_data(a_config(path=str(folder)), ALONE)
    text = {file.read_bytes() for file in folder.rglob("*.txt")}
    for window in source.batch():
        # a document's end is byte 0: every stretch between two of them is text of some file
        for stretch in bytes(window.tolist()).split(b"\0"):
            assert any(stretch in document for document in text)


def test_the_standard_library_is_the_default_text():
    source = open_data(a_config(), ALONE)
    assert source.summary["tokens"] > 1_000_000
    assert source.summary["windows_val"] > 100


@pytest.mark.parametrize("dataset", ["text", "synthetic"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_one_global_batch(folder, dataset, ranks):
    cfg = a_config(dataset=dataset, path=str(folder))
    whole = open_data(cfg, ALONE)
    parts = [open_data(cfg, World(r, ranks, CPU, False)) for r in range(ranks)]
    for _ in range(5):
        slices = [part.batch() for part in parts]
        assert torch.equal(whole.batch(), torch.cat(slices))
        assert not torch.equal(slices[0], slices[1])
    validation = [torch.cat(list(part.validation(2))) for part in (whole, *parts)]
    assert sorted(map(tuple, validation[0].tolist())) == sorted(
        tuple(row) for part in validation[1:] for row in part.tolist()
    )


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match=r"train\.batch_size = 3 is not a multiple of WORLD_SIZE = 2"):
        open_data(a_config(batch_size=3, dataset="synthetic"), World(0, 2, CPU, False))


@pytest.mark.parametrize("dataset", ["text", "synthetic"])
def test_a_position_resumes_exactly_across_epochs(folder, dataset):
    cfg = a_config(dataset=dataset, path=str(folder))
    source = open_data(cfg, ALONE)
    n = 3 * source.summary.get("windows_train", 12) // 4 // 2
    take(source, n)
    state = json.loads(json.dumps(source.state_dict()))
    expected = take(source, n)
    resumed = open_data(cfg, ALONE)
    resumed.load_state_dict(state)
    assert torch.equal(take(resumed, n), expected)


def test_an_epoch_has_every_window_once_and_the_next_another_order(folder):
    source = open_data(a_config(batch_size=1, path=str(folder)), ALONE)
    n = source.summary["windows_train"]
    first, second = ([tuple(source.batch()[0].tolist()) for _ in range(n)] for _ in range(2))
    assert len(set(first)) == n
    assert first != second
    assert sorted(first) == sorted(second)


def test_held_out_synthetic_windows_are_others_than_those_trained_on():
    source = open_data(a_config(dataset="synthetic"), ALONE)
    trained = {tuple(row.tolist()) for row in take(source, 10).flatten(0, 1)}
    held = {tuple(row.tolist()) for batch in source.validation(10) for row in batch}
    assert len(held) == 40
    assert not trained & held


def test_held_out_windows_are_never_trained_on(folder):
    source = open_data(a_config(batch_size=1, path=str(folder), val_fraction=0.2), ALONE)
    trained = {tuple(source.batch()[0].tolist()) for _ in range(source.summary["windows_train"])}
    held = [tuple(window.tolist()) for batch in source.validation(10**6) for window in batch]
    assert len(held) == source.summary["windows_val"] > 5
    assert not trained.intersection(held)
    names = {word for window in held for word in bytes(window).split(b"\0")[-1].split()[1:-1]}
    assert names, "validation holds whole words"


def test_a_corpus_changed_since_the_checkpoint_is_refused(folder):
    cfg = a_config(path=str(folder))
    state = open_data(cfg, ALONE).state_dict()
    (folder / "part0" / "0.txt").write_text("something else")
    with pytest.raises(CheckpointError, match=r"data\.path: the text is not the one"):
        open_data(cfg, ALONE).load_state_dict(state)


def test_the_text_does_not_depend_on_where_the_folder_lies(folder, tmp_path):
    before = open_data(a_config(path=str(folder)), ALONE).batch()
    moved = folder.rename(tmp_path / "elsewhere")
    assert torch.equal(open_data(a_config(path=str(moved)), ALONE).batch(), before)


def test_synthetic_text_repeats_itself_and_seeds_differ():
    batch = open_data(a_config(dataset="synthetic", seq_len=128), ALONE).batch()
    for window in batch:
        assert any(torch.equal(window[:-p], window[p:]) for p in range(8, 33))
    assert not torch.equal(batch, open_data(a_config(dataset="synthetic", seq_len=128, seed=2), ALONE).batch())


def test_records_and_globs_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "alpha"}\n\n{"text": "beta"}\n')
    (tmp_path / "b.md").write_text("gamma")
    _parquet(tmp_path / "c.parquet", ["delta", "epsilon"])
    tokenizer = open_tokenizer("bytes")
    corpus = load_corpus(str(tmp_path), tokenizer, text_key="text", val_fraction=0, name="x")
    documents = bytes(corpus.train.cut(0, len(corpus.train)).tolist()).split(b"\0")
    assert sorted(documents) == [b"", b"alpha", b"beta", b"delta", b"epsilon", b"gamma"]
    assert [f.name for f in find_files(str(tmp_path / "*.md"))[1]] == ["b.md"]


def _parquet(path: Path, texts: list[str], column: str = "text") -> None:
    pa = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({column: texts}), path)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda d: d / "gone", "no such file, folder or glob"),
        (lambda d: d, "no file there ends in"),
        (lambda d: _write(d / "a.csv", "x"), "unknown kind of file '.csv'"),
        (lambda d: _write(d / "a.txt", "  \n"), "no text in them"),
        (lambda d: _write(d / "a.txt", "short"), r"fewer than one window of train\.seq_len \+ 1 = 17"),
        (lambda d: _write(d / "a.jsonl", '{"text": "x"}\n{"body": "y"}\n'), r"a\.jsonl:2: no text under 'text'"),
        (lambda d: _write(d / "a.jsonl", '{"text": "x"\n'), r"a\.jsonl:1: not a JSON record"),
        (lambda d: _write(d / "a.parquet", "not parquet"), r"a\.parquet: not a readable parquet"),
        (lambda d: d / "*.txt", "no file there ends in"),
    ],
)
def test_data_that_cannot_be_used_is_named(tmp_path, make, said):
    with pytest.raises(DataError, match=said) as error:
        open_data(a_config(path=str(make(tmp_path))), ALONE)
    assert str(tmp_path) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_parquet_without_the_column_names_those_it_has(tmp_path):
    _parquet(tmp_path / "a.parquet", ["x"], column="body")
    with pytest.raises(DataError, match=r"no column 'text'; set data\.text_key to one of body"):
        open_data(a_config(path=str(tmp_path)), ALONE)


# --- the streams behind fineweb_edu and fineweb_edu_local ---


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """datasets and transformers, told to stay off the network, and a tiny BPE tokenizer saved to a folder."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
            patch.setenv(name, "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        pytest.importorskip("datasets", reason="streams need datasets")
        transformers = pytest.importorskip("transformers", reason="BPE needs transformers")
        # Read from the variables at the first import, which another module may have made.
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
        bpe.train_from_iterator([f"document number {i} of many" for i in range(200)], trainer)
        folder = tmp_path_factory.mktemp("tokenizer")
        transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>").save_pretrained(folder)
        yield folder


@pytest.fixture
def shards(tmp_path):
    """Four parquet shards of 60 distinct documents each."""
    root = tmp_path / "shards"
    root.mkdir()
    for s in range(4):
        _parquet(root / f"{s}.parquet", [f"document number {s * 60 + i} of many" for i in range(60)])
    return root


def a_stream(path, hub, world=ALONE, **data):
    data = {"tokenizer": str(hub), "val_docs": 20, **data}
    return open_data(a_config(dataset="fineweb_edu_local", path=str(path), vocab_size=300, **data), world)


def test_a_local_stream_is_tokenized_end_to_end(shards, hub):
    from transformers import AutoTokenizer

    source = a_stream(shards, hub)
    ids = list(source.batch()[0][:1]) + [i for _ in range(6) for row in source.batch() for i in row[1:]]
    text = AutoTokenizer.from_pretrained(hub).decode(torch.tensor([int(i) for i in ids[1:]]))
    documents = text.split("<|endoftext|>")[1:-1]
    assert len(documents) > 10
    numbers = [int(document.split()[2]) for document in documents]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert numbers[0] >= 20, "the first val_docs documents are held out"


def test_a_stream_resumes_exactly(shards, hub):
    source = a_stream(shards, hub)
    n = 7
    take(source, n)
    state = json.loads(json.dumps(source.state_dict()))
    expected = take(source, n)
    resumed = a_stream(shards, hub)
    resumed.load_state_dict(state)
    assert torch.equal(take(resumed, n), expected)


def test_a_stream_that_ends_starts_again(tmp_path, hub):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"document number {i}"}) + "\n" for i in range(30)))
    source = a_stream(tmp_path, hub, val_docs=5)
    assert take(source, 20).shape == (20, 4, 17)
    state = source.state_dict()
    resumed = a_stream(tmp_path, hub, val_docs=5)
    resumed.load_state_dict(state)
    assert torch.equal(take(resumed, 5), take(source, 5))


def test_ranks_of_a_stream_read_disjoint_documents_and_never_the_held_out(shards, hub):
    from transformers import AutoTokenizer

    seen = []
    held = None
    for r in range(2):
        source = a_stream(shards, hub, World(r, 2, CPU, True))
        held = {row.tolist()[1:9].__repr__() for batch in source.validation(100) for row in batch}
        tokens = [int(i) for _ in range(20) for row in source.batch() for i in row[:-1]]
        documents = set(AutoTokenizer.from_pretrained(hub).decode(tokens).split("<|endoftext|>")[:-1])
        assert len(documents) > 50
        seen.append(documents)
        first = {f"document number {i} of many" for i in range(20)}
        assert not documents & first
    assert held
    assert not seen[0] & seen[1]


def test_a_stream_split_over_other_ranks_is_refused(shards, hub):
    state = a_stream(shards, hub, World(0, 2, CPU, True)).state_dict()
    with pytest.raises(CheckpointError, match="was split over 2 ranks and this run has 1"):
        a_stream(shards, hub).load_state_dict(state)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.parquet", "this is not parquet", "not a readable parquet file"),
        ("a.jsonl", "", "1 files and nothing in them"),
        ("a.jsonl", '{"body": "x", "id": 3}\n', r"no text under 'text'; set data\.text_key to one of: body$"),
        ("a.jsonl", '{"text": "x"}\n{"text": \n', r"a\.jsonl:2: not a JSON record"),
    ],
)
def test_a_stream_that_cannot_be_read_is_named(tmp_path, hub, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(TrainError, match=said) as error:
        a_stream(tmp_path, hub).batch()
    assert str(error.value).startswith(str(tmp_path))


def test_a_stream_with_everything_held_out_says_so(shards, hub):
    with pytest.raises(DataError, match=r"no document is left to train on; .* smaller data\.val_docs"):
        a_stream(shards, hub, val_docs=1000).batch()


def test_a_vocabulary_too_small_for_the_tokenizer_is_named(shards, hub):
    cfg = a_config(dataset="fineweb_edu_local", path=str(shards), tokenizer=str(hub), vocab_size=256)
    with pytest.raises(DataError, match=r"model\.vocab_size = 256 is below the \d+ ids .* set model\.vocab_size="):
        open_data(cfg, ALONE)


def test_without_a_network_the_hub_datasets_say_what_to_pass(hub):
    with pytest.raises(DataError, match=r"nsa\.train\.prepare --out FOLDER, .*fineweb_edu_local --local-path FOLDER"):
        open_data(a_config(dataset="fineweb_edu"), ALONE)
    with pytest.raises(DataError, match=r"data\.tokenizer = gpt2: .* nsa\.train\.prepare makes one\), or to bytes"):
        open_tokenizer("gpt2")
    with pytest.raises(DataError, match="pass --local-path"):
        open_data(a_config(dataset="fineweb_edu_local"), ALONE)
