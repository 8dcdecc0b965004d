"""The runbook's scripts as a user runs them: their exact output, measured reads, and one line for a user's mistake."""

import csv
import json
import os
import re
import resource
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nsa import routing
from nsa.blocks import n_compressed, reads, reads_range
from nsa.config import NSAConfig
from nsa.ops.compress import MeanPhi, compress
from nsa.ops.compressed import compressed_attention
from nsa.ops.selection import select_blocks
from nsa.records import AttentionRow, DecodeRow, header

ROOT = Path(__file__).resolve().parents[1]
SMALL_LAYER = shlex.split("--dim 32 --heads 4 --groups 2 --dk 8 --dv 8 --l 8 --d 4 --l_sel 16 --n_sel 4 --w 24")
SMALL_NSA = NSAConfig(l=8, d=4, l_sel=16, n_sel=4, w=24)
LENGTHS = [7, 8, 65, 130]


def run(script, *args, pythonpath=True, cwd=ROOT, limit_bytes=None, **env):
    def limit():
        if limit_bytes:
            resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))

    inherited = {k: v for k, v in os.environ.items() if not k.startswith("NSA_") and k != "PYTHONPATH"}
    here = {"PYTHONPATH": "."} if pythonpath else {}
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**inherited, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **here, **env},
        preexec_fn=limit,
        check=False,
    )


def succeeded(result):
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def refuses(monkeypatch, capsys):
    """Check that a script ends with code 2, one line that names the thing, and an empty stdout."""

    def check(script, args, named, shape=SMALL_LAYER):
        monkeypatch.setattr(sys, "argv", [script, *shape, *args])
        monkeypatch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        out, err = capsys.readouterr()
        assert (exit.value.code, out) == (2, "")
        assert len(err.splitlines()) == 1, err
        assert named in err

    return check


# print_routing


def test_print_routing_names_what_the_runbook_reads():
    snapshot = json.loads(succeeded(run("scripts/print_routing.py")))
    named = {"cuda", "sm89", "torch", "triton", "NSA_USE_TRITON_SEL", "NSA_TRITON_SEL_FORCE", "NSA_USE_FA2"}
    assert named | {"triton_required", "triton_aligned"} <= snapshot.keys()
    assert snapshot["cuda"] is False


def test_print_routing_names_a_flag_that_is_neither_1_nor_0():
    result = run("scripts/print_routing.py", NSA_USE_FA2="maybe")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "print_routing: NSA_USE_FA2='maybe': use 1 or 0, or leave it unset\n"


@pytest.mark.parametrize("script", ["scripts/demo_64k.py", "bench/bench_decode.py"])
def test_a_layer_script_names_a_flag_that_is_neither_1_nor_0(script, refuses, monkeypatch):
    monkeypatch.setenv("NSA_USE_TRITON_SEL", "maybe")
    routing.flags.cache_clear()
    refuses(script, [], "NSA_USE_TRITON_SEL='maybe': use 1 or 0")


def test_print_routing_is_indented_json_and_nothing_else_from_any_folder(tmp_path):
    printed = succeeded(run("scripts/print_routing.py", pythonpath=False, cwd=tmp_path, NSA_USE_FA2="0"))
    assert printed == json.dumps(json.loads(printed), indent=2) + "\n"


# demo_64k


def demo(*args, **kwargs):
    return run("scripts/demo_64k.py", *SMALL_LAYER, *args, **kwargs)


DEMO = re.compile(
    r"-- demo_64k summary --\n"
    r"device: cpu.*\n"
    r"B=(?P<B>\d+) S=(?P<S>\d+) dim=32 heads=4 G=2 dk=8 dv=8\n"
    r"rope_scale=8\.0 prefill_tile=(?P<tile>\d+) w=24 n_sel=4\n"
    r"prefill_time_ms=\d+\.\d\d reads_total=(?P<total>\d+)\n"
    r"reads_cmp=(?P<cmp>\d+) reads_sel=(?P<sel>\d+) reads_win=(?P<win>\d+) reads_expected=(?P<expected>\d+)\n"
    r"peak_memory_bytes=\d+ \(\d+\.\d\d GiB\)\n"
)


@pytest.mark.parametrize(("S", "tile", "B", "pythonpath"), [(1, 1, 1, True), (131, 77, 2, False), (300, 64, 1, True)])
def test_demo_prints_its_summary_and_reads_what_the_formula_says(S, tile, B, pythonpath):
    printed = succeeded(demo("--S", S, "--prefill_tile", tile, "--B", B, "--use_fa2", "0", pythonpath=pythonpath))
    summary = DEMO.fullmatch(printed)
    assert summary, printed
    found = {name: int(value) for name, value in summary.groupdict().items()}
    expected = reads_range(0, S, SMALL_NSA)
    assert (found["B"], found["S"], found["tile"]) == (B, S, tile)
    assert (found["cmp"], found["sel"], found["win"]) == tuple(expected)
    assert found["total"] == found["expected"] == expected.total


def test_demo_says_in_a_log_how_far_it_is():
    assert re.search(r"^prefill: 100/100 tokens", demo("--S", 100, "--prefill_tile", 50).stderr, re.MULTILINE)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--S", "0"], "--S"),
        (["--S", "many"], "--S"),
        (["--prefill_tile", "0"], "--prefill_tile"),
        (["--groups", "3"], "--groups"),
        (["--dk", "7"], "--dk"),
        (["--l", "6"], "--l"),
        (["--n_sel", "2"], "--n_sel"),
        (["--rope_scale", "0"], "--rope_scale"),
        (["--use_fa2", "2"], "--use_fa2"),
        (["--speed", "9"], "--speed"),
    ],
)
def test_demo_refuses_a_bad_flag_in_one_line(args, named, refuses):
    refuses("scripts/demo_64k.py", args, named)


def refused_memory(result, lower):
    assert (result.returncode, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert re.search(r"\d+\.\d\d GiB were asked for", result.stderr)
    assert f"lower {lower}" in result.stderr


def test_demo_says_how_much_memory_was_refused_and_what_to_lower():
    refused_memory(demo("--S", 10**9, "--use_fa2", "0", limit_bytes=8 * 2**30), "--S")


# bench_decode


@pytest.fixture(scope="module")
def decode_bench(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "new" / "decode.csv"
    lengths = ",".join(map(str, LENGTHS))
    args = [*SMALL_LAYER, "--S_list", lengths, "--iters", 3, "--warmup", 1, "--csv", path]
    result = run("bench/bench_decode.py", *args)
    with path.open(newline="") as file:
        return succeeded(result), list(csv.DictReader(file)), path.read_text().splitlines()[0]


def test_decode_csv_has_the_header_of_the_records(decode_bench):
    _, rows, first_line = decode_bench
    assert first_line == ",".join(header(DecodeRow))
    assert [int(row["S"]) for row in rows] == LENGTHS


def test_decode_reads_are_the_formula_over_prefill_and_over_the_step(decode_bench):
    for row in decode_bench[1]:
        S = int(row["S"])
        assert int(row["reads_actual"]) == int(row["reads_expected"]) == reads_range(0, S, SMALL_NSA).total
        assert int(row["reads_actual_decode"]) == int(row["reads_expected_decode"]) == reads(S, SMALL_NSA).total


def test_decode_bytes_per_token_are_the_keys_and_values_of_the_step(decode_bench):
    for row in decode_bench[1]:
        assert int(row["bytes_per_token"]) == int(row["reads_actual_decode"]) * 2 * (8 + 8) * 4


def test_decode_times_are_positive_and_speedup_is_their_ratio(decode_bench):
    for row in decode_bench[1]:
        branches = ["ms_sel", "ms_win"] + (["ms_cmp"] if n_compressed(int(row["S"]), SMALL_NSA) else [])
        assert all(float(row[name]) > 0 for name in ["ms_total", "ms_dense", *branches])
        assert float(row["speedup"]) == pytest.approx(float(row["ms_dense"]) / float(row["ms_total"]), rel=1e-4)


def test_decode_ends_with_a_line_of_json_that_repeats_the_csv(decode_bench):
    printed, rows, _ = decode_bench
    last = json.loads(printed.splitlines()[-1])
    assert last["bench"] == "decode"
    assert [row["S"] for row in last["rows"]] == LENGTHS
    assert [row["reads_actual"] for row in last["rows"]] == [int(row["reads_actual"]) for row in rows]


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--S_list", "128,x"], "--S_list"),
        (["--S_list", "0"], "--S_list"),
        (["--S_list", ""], "--S_list"),
        (["--iters", "0"], "--iters"),
        (["--warmup", "-1"], "--warmup"),
        (["--heads", "5"], "--heads"),
        (["--csv", "."], "--csv"),
    ],
)
def test_decode_refuses_a_bad_flag_in_one_line(args, named, refuses):
    refuses("bench/bench_decode.py", args, named)


def test_decode_says_how_much_memory_was_refused_and_what_to_lower():
    refused_memory(run("bench/bench_decode.py", "--S_list", 10**9, limit_bytes=8 * 2**30), "--S_list")


# bench_prefill


def test_prefill_bench_records_time_memory_and_measured_reads():
    printed = succeeded(run("bench/bench_prefill.py", "--config", "configs/train_showcase.yaml", "--S", 150))
    figures = json.loads(printed.splitlines()[-1])
    assert (figures["bench"], figures["S"]) == ("prefill", 150)
    assert figures["reads_actual"] == figures["reads_expected"]
    assert figures["seconds"] > 0
    assert figures["peak_memory_bytes"] > 0


def test_prefill_bench_names_a_config_that_is_not_there(refuses):
    refuses("bench/bench_prefill.py", ["--config", "configs/none.yaml"], "configs/none.yaml", shape=[])


# bench_attention

NSA_PARTS = ["phi", "cmp", "choice", "sel", "win", "combine"]


@pytest.fixture(scope="module")
def attention_bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attention")
    trained = folder / "trained.pt"
    torch.save({"q": torch.randn(100, 3, 16), "k": torch.randn(100, 1, 16), "v": torch.randn(100, 1, 16)}, trained)
    args = ["--S", 160, 70, "--layouts", "2,1,16", "--inputs", "popular", trained, "--repeats", 3]
    printed = succeeded(run("bench/bench_attention.py", *args, "--csv", folder / "a.csv", "--plot", folder / "a.png"))
    with (folder / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return printed, rows, folder, str(trained)


def test_attention_bench_has_a_row_for_every_part_length_and_input(attention_bench):
    _, rows, folder, trained = attention_bench
    assert (folder / "a.csv").read_text().splitlines()[0] == ",".join(header(AttentionRow))
    parts = ["dense-flash", *NSA_PARTS, "core", "attention", "sum"]
    ok = [("2", "70", "popular", p) for p in parts] + [("3", "70", trained, p) for p in parts]
    ok += [("2", "160", "popular", p) for p in parts]
    assert [(r["heads"], r["S"], r["inputs"], r["part"]) for r in rows if r["status"] == "ok"] == ok
    assert all(float(row["fwd_ms"]) > 0 for row in rows if row["status"] == "ok")
    assert all(row["device"].startswith("cpu") and float(row["copy_gbs"]) > 0 for row in rows)
    # The file holds fewer positions than were asked for: said, not left out.
    short = [row for row in rows if row["status"] != "ok"]
    assert [row["part"] for row in short] == parts[:-1]
    assert {(row["S"], row["inputs"]) for row in short} == {("160", trained)}
    assert all(row["status"] == f"cannot run: {trained} holds 100 positions" for row in short)


def test_attention_bench_adds_parts_up_and_compares_with_dense_of_the_same_group(attention_bench):
    rows = [row for row in attention_bench[1] if (row["S"], row["heads"]) == ("160", "2")]
    by_part = {row["part"]: row for row in rows}
    for way in ("fwd_ms", "bwd_ms"):
        summed = sum(float(by_part[name][way] or 0) for name in NSA_PARTS)
        assert float(by_part["sum"][way]) == pytest.approx(summed, rel=1e-4)
    for name in ("sel", "attention", "sum"):
        ratio = float(by_part["dense-flash"]["bwd_ms"]) / float(by_part[name]["bwd_ms"])
        assert float(by_part[name]["bwd_vs_flash"]) == pytest.approx(ratio, rel=1e-4)
    assert by_part["choice"]["bwd_ms"] == ""  # no gradient flows through the choice
    assert [row["part"] for row in rows if row["step_ms"]] == ["dense-flash", "core", "attention"]


def test_attention_bench_says_what_ran_from_the_launch_counters(attention_bench):
    by_part = {row["part"]: row for row in attention_bench[1] if row["status"] == "ok"}
    assert by_part["sel"]["backend"] == by_part["choice"]["backend"] == "torch"
    counted = re.fullmatch(r"selected/torch:(\d+) selected_backward/torch:(\d+)", by_part["sel"]["launches"])
    # 4 forward calls and one for the graph; 4 backward: a warm-up and three repeats each
    assert [int(n) for n in counted.groups()] == [5, 4]
    assert by_part["dense-flash"]["launches"] == ""
    assert "window:sdpa" in by_part["attention"]["backend"].split()


def test_attention_bench_prints_tables_draws_and_ends_with_a_line_of_json(attention_bench):
    printed, _, folder, trained = attention_bench
    assert "2 heads, 1 groups, D 16, float32, popular (ms forward / backward)" in printed
    assert re.search(r"^attention vs flash +[\d.]+x / [\d.]+x +[\d.]+x / [\d.]+x$", printed, re.MULTILINE)
    assert (folder / "a.png").read_bytes().startswith(b"\x89PNG")
    last = json.loads(printed.splitlines()[-1])
    assert (last["bench"], last["dtype"]) == ("attention", "float32")
    assert last["status"] == {"ok": 30, "cannot run": 9}
    assert [(row["S"], row["inputs"], row["part"]) for row in last["rows"]] == [
        (S, kind, part) for S in (70, 160) for kind in ("popular", trained) for part in ("core", "attention")
    ]


def test_attention_bench_reports_what_was_refused_and_goes_on(tmp_path):
    args = ["--S", 10**9, 64, "--layouts", "2,1,16", "--inputs", "random", "--parts", "dense-cudnn", "win"]
    result = run("bench/bench_attention.py", *args, "--csv", tmp_path / "a.csv", limit_bytes=8 * 2**30)
    succeeded(result)
    rows = list(csv.DictReader((tmp_path / "a.csv").open(newline="")))
    status = {(int(row["S"]), row["part"]): row["status"] for row in rows}
    assert list(status) == [(64, "dense-cudnn"), (64, "win"), (10**9, "dense-cudnn"), (10**9, "win")]
    assert status[64, "dense-cudnn"].startswith("cannot run: No ")
    assert status[64, "win"] == "ok"
    assert all(re.fullmatch(r"out of memory: [\d.]+ GiB refused", status[10**9, p]) for p in ("dense-cudnn", "win"))


def test_attention_bench_says_not_run_after_its_minutes(tmp_path):
    args = ["--S", 64, "--layouts", "2,1,16", "--inputs", "random", "--minutes", "0"]
    printed = succeeded(run("bench/bench_attention.py", *args))
    assert json.loads(printed.splitlines()[-1])["status"] == {"not run": 9}


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--S", "0"], "--S"),
        (["--S", "31"], "32 or more"),
        (["--layouts", "4,3,16"], "--layouts"),
        (["--inputs", "easy"], "--inputs"),
        (["--inputs", "none.pt"], "none.pt"),
        (["--parts", "mlp"], "--parts"),
        (["--parts", "dense-fa3"], "--fa3"),
        (["--backend", "selected=cudnn"], "--backend"),
        (["--fa3", "none.so"], "none.so"),
        (["--csv", "."], "--csv"),
    ],
)
def test_attention_bench_refuses_a_bad_flag_in_one_line(args, named, refuses):
    refuses("bench/bench_attention.py", args, named, shape=[])


def test_attention_inputs_are_what_their_names_say():
    """Measured by what their scores choose: neighbours agree, or everyone chooses one block."""
    inputs = runpy.run_path(str(ROOT / "bench/attention_inputs.py"))
    S, layout, cfg, found = 4096, inputs["Layout"](2, 1, 32), NSAConfig(), {}
    for kind in inputs["KINDS"]:
        q, k, v = inputs["make"](kind, S, layout, cfg, torch.device("cpu"), torch.float32)
        assert all(x.is_contiguous() for x in (q, k, v))  # or a kernel's time would be that of a copy
        k_cmp, v_cmp = (compress(x, MeanPhi(), cfg) for x in (k, v))
        _, lse = compressed_attention(q, k_cmp, v_cmp, cfg, seq_len=S)
        found[kind] = inputs["choices"](select_blocks(q, k_cmp, lse, cfg, seq_len=S), cfg)
    assert found["local"].agreement > found["random"].agreement + 0.2
    assert found["popular"].heaviest > 0.9 > found["random"].heaviest + 0.2


def test_agreement_and_heaviest_count_free_blocks_only():
    count = runpy.run_path(str(ROOT / "bench/attention_inputs.py"))["choices"]
    cfg = NSAConfig(l=8, d=4, l_sel=8, n_sel=4, local_blocks=1)
    blocks = torch.full((1, 32, 1, 4), -1, dtype=torch.int32)
    blocks[..., 0], blocks[0, :, 0, 1] = 0, torch.arange(32) // 8
    blocks[0, 30, 0, 2], blocks[0, 31, 0, 2] = 1, 1  # chosen freely by the last two queries, of which one has a model
    found = count(blocks, cfg)
    assert (found.agreement, found.heaviest) == (1 / 2, 2 / 32)
