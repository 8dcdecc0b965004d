"""Batches made ahead: the same ones whatever the workers, resumed from what was consumed, and never a hang."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import closing, contextmanager

import pytest
import torch

from nsa.train import config
from nsa.train.data import open_data
from nsa.train.dist import World
from nsa.train.errors import CheckpointError, DataError, LostDataError
from nsa.train.loader import Loader
from nsa.train.stream import FileDocuments, StreamWindows
from nsa.train.workers import Workers, per_rank

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU, False)
# Far above what anything here takes, on a machine that is busy with something else.
LONG_S = 60


class Counting:
    """A source whose n-th batch is full of n. `gate` holds batches up, `fail_at` breaks off."""

    def __init__(self, fail_at=None, error=None):
        self.summary = {"source": "test"}
        self.made, self.fail_at, self.error = 0, fail_at, error
        self.gate = threading.Event()
        self.gate.set()
        self.dead, self.closed, self.enough = None, False, threading.Event()

    def batch(self):
        assert self.gate.wait(LONG_S)
        if self.made == self.fail_at:
            raise self.error
        self.made += 1
        if self.made >= 5:
            self.enough.set()
        return torch.full((2, 3), self.made)

    @property
    def epoch(self):
        return self.made // 3

    def validation(self, batches):
        return iter(())

    def state_dict(self):
        return {"made": self.made}

    def load_state_dict(self, state):
        self.made = state["made"]

    def check(self):
        if self.dead:
            raise self.dead

    def close(self):
        self.closed = True


def numbers(loader, count):
    return [int(loader.next()[0, 0]) for _ in range(count)]


def test_the_position_is_of_what_was_consumed_not_of_what_was_made_ahead():
    source = Counting()
    with closing(Loader(source, CPU, depth=4)) as loader:
        assert (loader.state_dict(), loader.epoch) == ({"made": 0}, 0)
        assert numbers(loader, 1) == [1]
        assert source.enough.wait(LONG_S), "batches are made ahead of the step"
        assert (loader.state_dict(), loader.epoch) == ({"made": 1}, 0)
        assert numbers(loader, 2) == [2, 3]
        assert (loader.state_dict(), loader.epoch) == ({"made": 3}, 1)


def test_no_more_is_made_ahead_than_asked_for():
    source = Counting()
    with closing(Loader(source, CPU, depth=2)) as loader:
        for consumed in range(1, 20):
            numbers(loader, 1)
            assert source.made <= consumed + 2 + 1, "depth in the queue and one in hand"


def test_a_position_loaded_in_mid_run_discards_what_was_made_ahead():
    with closing(Loader(Counting(), CPU, depth=4)) as loader:
        numbers(loader, 5)
        loader.load_state_dict({"made": 2})
        assert loader.state_dict() == {"made": 2}
        assert numbers(loader, 3) == [3, 4, 5]


def test_a_slow_source_is_waited_for_and_the_wait_is_counted():
    source = Counting()
    source.gate.clear()
    with closing(Loader(source, CPU)) as loader:
        threading.Timer(0.7, source.gate.set).start()
        assert numbers(loader, 1) == [1]
        assert 0.5 < loader.waited < LONG_S


@pytest.mark.parametrize("error", [LostDataError("broke off"), DataError("bad"), ZeroDivisionError("a bug")])
def test_an_error_of_the_source_comes_after_the_batches_before_it_and_is_the_same(error):
    with closing(Loader(Counting(fail_at=3, error=error), CPU, depth=8)) as loader:
        assert numbers(loader, 3) == [1, 2, 3]
        for _ in range(2):
            with pytest.raises(type(error)) as raised:
                loader.next()
            assert raised.value is error
        assert loader.state_dict() == {"made": 3}


def test_a_death_behind_the_source_is_raised_before_what_was_made_ahead_is_used_up():
    source = Counting()
    with closing(Loader(source, CPU)) as loader:
        numbers(loader, 1)
        source.dead = LostDataError("a process died")
        with pytest.raises(LostDataError, match="a process died"):
            loader.next()
        assert loader.state_dict() == {"made": 1}


def test_closing_ends_the_thread_and_the_source():
    source, before = Counting(), set(threading.enumerate())
    loader = Loader(source, CPU)
    numbers(loader, 1)
    assert set(threading.enumerate()) - before
    loader.close()
    assert source.closed
    assert not {thread for thread in set(threading.enumerate()) - before if thread.name == "batches"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: copies from pinned memory")
def test_on_a_card_batches_come_whole_without_holding_up_the_host():
    """The card is kept busy, so that copies are made long after `next` returned and buffers come round again."""
    device = torch.device("cuda", 0)
    with closing(Loader(Counting(), device, depth=2)) as loader:
        numbers(loader, 1)
        torch.cuda.set_sync_debug_mode("error")
        try:
            batches = []
            for _ in range(50):
                torch.cuda._sleep(2_000_000)
                batches.append(loader.next())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert {batch.device for batch in batches} == {device}
        assert [batch.unique().tolist() for batch in batches] == [[number] for number in range(2, 52)]


@pytest.mark.parametrize("dataset", ["text", "synthetic"])
def test_a_loader_gives_the_batches_of_its_source(tmp_path, dataset):
    (tmp_path / "a.txt").write_text(" ".join(map(str, range(2000))))
    settings = {"data": {"dataset": dataset, "path": str(tmp_path)}, "train": {"seq_len": 16, "batch_size": 4}}
    cfg = config.build(settings)
    plain = open_data(cfg, ALONE)
    with closing(Loader(open_data(cfg, ALONE), CPU)) as loader:
        for _ in range(200):
            assert torch.equal(loader.next(), plain.batch())
            assert (loader.state_dict(), loader.epoch) == (plain.state_dict(), plain.epoch)


# --- streams, tokenised by processes ---


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    pytest.importorskip("tokenizers", reason="BPE needs tokenizers")
    from nsa.train.prepare import HashOrder, learn

    return learn(HashOrder(texts(300), tmp_path_factory.mktemp("order")), 300)


def texts(count):
    """Documents that tell their number, of lengths that differ."""
    return iter([f"document {i}: {' '.join(str(i * k) for k in range(1, 20 + i % 7))}".encode() for i in range(count)])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three .jsonl files; chunks are a few documents, so that there are many."""
    monkeypatch.setattr("nsa.train.stream.CHUNK_BYTES", 2000)
    documents = [text.decode() for text in texts(300)]
    for part in range(3):
        lines = [json.dumps({"text": text}) for text in documents[part * 100 : part * 100 + 100]]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(lines))
    return tmp_path


@contextmanager
def a_stream(folder, tokenizer, workers, world=ALONE, **data):
    settings = {
        "data": {"dataset": "fineweb_edu_local", "val_docs": 10, "workers": workers, **data},
        "train": {"seq_len": 32, "batch_size": 4},
        "model": {"vocab_size": 300},
    }
    rows = range(world.rank * 4 // world.size, (world.rank + 1) * 4 // world.size)
    documents = FileDocuments(str(folder), "text", world)
    with closing(StreamWindows(documents, tokenizer, config.build(settings), world, 4, rows)) as source:
        yield source


@contextmanager
def a_loader(*args, **data):
    with a_stream(*args, **data) as source, closing(Loader(source, CPU, depth=6)) as loader:
        yield loader


def take(loader, count):
    return torch.stack([loader.next() for _ in range(count)])


# Three times through the documents: 300 of about 70 ids, 128 ids a batch.
BATCHES = 500


@pytest.fixture(scope="module")
def expected(tokenizer):
    """All ids of the stream, by the tokenizer alone: the documents that are not held out, again and again."""
    documents = list(texts(300))
    ids = torch.from_numpy(tokenizer.encode(documents[10:])[0].astype("int64")).repeat(8)[: BATCHES * 128 + 1]
    assert len(ids) == BATCHES * 128 + 1
    return ids.unfold(0, 33, 32).reshape(BATCHES, 4, 33)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_are_the_documents_in_order_whatever_the_workers(folder, tokenizer, expected, workers):
    with a_loader(folder, tokenizer, workers) as loader:
        assert torch.equal(take(loader, BATCHES), expected)
        assert loader.epoch >= 2


@pytest.mark.parametrize(("before", "after"), [(0, 0), (3, 0), (0, 2)])
@pytest.mark.parametrize("consumed", [1, 7, 140, 311])
def test_a_stream_resumes_by_what_was_consumed(folder, tokenizer, expected, before, after, consumed):
    with a_loader(folder, tokenizer, before) as loader:
        take(loader, consumed)
        state = json.loads(json.dumps(loader.state_dict()))
        epoch = loader.epoch
    with a_loader(folder, tokenizer, after) as loader:
        loader.load_state_dict(state)
        assert (loader.state_dict(), loader.epoch) == (state, epoch)
        assert torch.equal(take(loader, 60), expected[consumed : consumed + 60])


def test_a_position_loaded_before_anything_was_consumed_is_the_start(folder, tokenizer, expected):
    with a_loader(folder, tokenizer, 0) as loader:
        state = loader.state_dict()
        take(loader, 5)
        loader.load_state_dict(state)
        assert torch.equal(take(loader, 5), expected[:5])


def test_the_parts_of_two_ranks_are_the_whole(folder, tokenizer):
    seen = []
    for rank in range(2):
        with a_loader(folder, tokenizer, 0, World(rank, 2, CPU, True)) as loader:
            ids = [i for _ in range(200) for row in loader.next() for i in row[:-1].tolist()]
        text = tokenizer._fast.decode(ids, skip_special_tokens=False)
        seen.append({int(part.split()[1][:-1]) for part in text.split("<|endoftext|>")[:-1]})
    assert seen[0] | seen[1] == set(range(10, 300))
    assert not seen[0] & seen[1]


def test_a_worker_that_is_killed_is_named_and_the_position_stays(folder, tokenizer, expected):
    with a_loader(folder, tokenizer, 2) as loader:
        take(loader, 3)
        state = loader.state_dict()
        process = loader.source._workers.processes[1]
        os.kill(process.pid, signal.SIGKILL)
        process.wait(LONG_S)
        with pytest.raises(
            LostDataError, match=rf"process {process.pid} died \(exit code -9, SIGKILL\).*data\.workers"
        ):
            loader.next()
        assert loader.state_dict() == state
    with a_loader(folder, tokenizer, 0) as loader:
        loader.load_state_dict(state)
        assert torch.equal(take(loader, 2), expected[3:5])


def test_a_worker_that_dies_at_work_fails_what_it_was_given(tokenizer):
    with closing(Workers(tokenizer, 1)) as workers:
        process = workers.processes[0]
        os.kill(process.pid, signal.SIGSTOP)
        future = workers.submit([b"some text"])
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(LostDataError, match=rf"process {process.pid} died \(exit code -9"):
            future.result(LONG_S)
        with pytest.raises(LostDataError, match=rf"process {process.pid} died"):
            workers.submit([b"more text"]).result(LONG_S)


def test_a_waiting_step_learns_of_a_death(folder, tokenizer):
    with a_loader(folder, tokenizer, 1) as loader:
        take(loader, 1)
        process = loader.source._workers.processes[0]
        os.kill(process.pid, signal.SIGSTOP)
        threading.Timer(1.0, os.kill, (process.pid, signal.SIGKILL)).start()
        with pytest.raises(LostDataError, match=rf"process {process.pid} died"):
            take(loader, 2000)


def test_workers_end_with_a_parent_that_is_killed(tokenizer, tmp_path):
    saved = tmp_path / "tokenizer.json"
    saved.write_text(tokenizer.json)
    program = """
        import sys, time
        from nsa.train.corpus import Tokenizer
        from nsa.train.workers import Workers
        workers = Workers(Tokenizer("t", 0, 300, open(sys.argv[1]).read()), 2)
        workers.submit([b"text"]).result()
        print(*(process.pid for process in workers.processes), flush=True)
        time.sleep(600)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(saved)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        parent.kill()
    until = time.monotonic() + LONG_S
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < until, "a worker outlived its parent"
        time.sleep(0.05)


def is_alive(pid):
    """Not gone, nor dead and merely not yet waited for by whoever inherited it."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_workers_leave_signals_to_the_trainer(tokenizer):
    with closing(Workers(tokenizer, 1)) as workers:
        expected = workers.submit([b"one"]).result(LONG_S)[0].tolist()
        for signum in (signal.SIGINT, signal.SIGTERM):
            os.kill(workers.processes[0].pid, signum)
        assert workers.submit([b"one"]).result(LONG_S)[0].tolist() == expected
        workers.check()


def test_a_worker_loads_no_torch():
    program = "import sys, nsa.train.workers; print(sorted({'torch', 'transformers', 'triton'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "[]\n"


@pytest.mark.parametrize(
    ("setting", "cores", "ranks", "count"),
    [("auto", 16, 1, 8), ("auto", 32, 8, 3), ("auto", 2, 1, 1), ("auto", 2, 4, 1), (3, 2, 1, 3), (0, 64, 1, 0)],
)
def test_workers_are_as_many_as_the_cores_of_a_rank_allow(monkeypatch, setting, cores, ranks, count):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    assert per_rank(setting, ranks) == count


# --- what a stream refuses ---


def test_a_line_broken_in_mid_run_ends_it_by_name_after_what_was_read(folder, tokenizer, expected):
    with (folder / "1.jsonl").open("a") as file:
        file.write('\n{"text": \n')
    with a_loader(folder, tokenizer, 1) as loader:
        batches = iter(loader.next, None)
        with pytest.raises(LostDataError) as error:
            assert all(map(torch.equal, batches, expected))
    assert "1.jsonl:101: not a JSON record" in str(error.value)
    assert str(error.value).endswith("mend or remove the line; then --resume the run")
    assert loader.state_dict()["stream"]["file"] == 1


def test_positions_of_other_files_ranks_and_readers_are_refused(folder, tokenizer):
    with a_loader(folder, tokenizer, 0) as loader:
        take(loader, 30)
        state = loader.state_dict()
        older = {"stream": {}, "left": [1, 2], "epoch": 0, "world": [0, 1]}
        with pytest.raises(CheckpointError, match=r"of another reader \(an older one\) than this run's \(files\)"):
            loader.load_state_dict(older)
        with pytest.raises(CheckpointError, match="over 4 ranks and this run has 1"):
            loader.load_state_dict({**state, "world": [0, 4]})
    (folder / "0.jsonl").rename(folder / "9.jsonl")
    with a_loader(folder, tokenizer, 0) as loader, pytest.raises(CheckpointError, match="its files are not those"):
        loader.load_state_dict(state)


@pytest.fixture
def hub(folder, monkeypatch):
    """The three files as a dataset of the hub."""
    datasets = pytest.importorskip("datasets", reason="the hub's streams need datasets")
    monkeypatch.setenv("HF_HOME", str(folder / "home"))
    files = [str(folder / f"{part}.jsonl") for part in range(3)]
    load = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: load("json", data_files=files, split="train", streaming=True)
    )


@contextmanager
def a_hub_loader(tokenizer, monkeypatch, workers, world=ALONE):
    monkeypatch.setattr("nsa.train.data.open_tokenizer", lambda name: tokenizer)
    settings = {
        "data": {"dataset": "fineweb_edu", "val_docs": 10, "workers": workers, "tokenizer": "a"},
        "train": {"seq_len": 32, "batch_size": 4},
        "model": {"vocab_size": 300},
    }
    with closing(Loader(open_data(config.build(settings), world), CPU, depth=6)) as loader:
        yield loader


@pytest.mark.parametrize("consumed", [1, 50, 200])
def test_a_stream_of_the_hub_resumes_by_what_was_consumed(hub, tokenizer, monkeypatch, expected, consumed):
    with a_hub_loader(tokenizer, monkeypatch, 2) as loader:
        assert loader.source.summary["source"] == "hub HuggingFaceFW/fineweb-edu/sample-10BT"
        assert torch.equal(take(loader, consumed), expected[:consumed])
        state = json.loads(json.dumps(loader.state_dict()))
        # Later epochs may take the files in another order: datasets' own affair.
        following = take(loader, 400)
    with a_hub_loader(tokenizer, monkeypatch, 0) as loader:
        loader.load_state_dict(state)
        assert torch.equal(take(loader, 400), following)
        assert loader.epoch >= 2


def test_a_position_of_the_hub_from_before_chunks_goes_on(hub, tokenizer, monkeypatch, expected):
    """Such a position is the stream's behind a document, and the ids of it that were not used up."""
    import datasets

    stream = datasets.load_dataset()
    records = iter(stream)
    for _ in range(40):
        next(records)
    ids = tokenizer.encode(list(texts(300))[10:40])[0]
    batches = len(ids) // 128 - 1
    left = ids[batches * 128 :].tolist()
    older = {"stream": stream.state_dict(), "left": left, "epoch": 0, "world": [0, 1]}
    with a_hub_loader(tokenizer, monkeypatch, 0) as loader:
        loader.load_state_dict(json.loads(json.dumps(older)))
        take(loader, 1)
        state = loader.state_dict()
        assert torch.equal(take(loader, 30), expected[batches + 1 : batches + 31])
    with a_hub_loader(tokenizer, monkeypatch, 0) as loader:
        loader.load_state_dict(state)
        assert torch.equal(take(loader, 30), expected[batches + 1 : batches + 31])
