"""Two commits' decode times side by side on this machine: `nox -s perf_compare -- BASE HEAD`.

Each commit is checked out into a worktree of its own, and its own bench/bench_decode.py runs there, a fresh process a
round, base head head base. Left behind, in artifacts/perf/:

    perf.json    every round as it was timed; `nox -s perf_compare -- --judge artifacts/perf/perf.json` judges it again
    perf.md      the verdict and a row a length

Exit codes: 0 no regression (or one on a machine that only reports); 1 head's bench fails; 2 usage; 4 regression;
75 inconclusive, or base's bench fails; 78 the two cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ci import nvidia, perf
from ci.execute import Stopped, stoppable
from ci.outcome import CONFIGURATION, INFRASTRUCTURE, TEST_FAILED, USAGE, leave_exit

ROOT = Path(__file__).resolve().parent.parent
BENCH = "bench/bench_decode.py"
GATING = ("a100", "a100x2")  # data-centre cards with fixed clocks; a desktop card's boost makes no verdict
ROUND_TIMEOUT_S = 900
METRIC = "ms_total"


class PerfError(Exception):
    """The comparison cannot be made; the text is one line, `code` the exit code."""

    def __init__(self, reason: str, code: int) -> None:
        super().__init__(reason)
        self.code = code


def parser() -> argparse.ArgumentParser:
    """NSA_CI_PROFILE names the profile where no option does."""
    options = argparse.ArgumentParser(prog="nox -s perf_compare --", description=(__doc__ or "").split("\n\n")[0])
    options.add_argument("commits", nargs="*", metavar="COMMIT", help="BASE and HEAD")
    options.add_argument("--blocks", type=int, default=10, help="blocks of four rounds (%(default)s)")
    options.add_argument("--bench", default="--iters 64 --warmup 16", help="the bench's options (%(default)s)")
    options.add_argument("--profile", default=os.environ.get("NSA_CI_PROFILE", ""), help="default: by the GPU's name")
    options.add_argument("--out", type=Path, default=ROOT / "artifacts/perf", help="folder (artifacts/perf)")
    options.add_argument("--judge", type=Path, metavar="FILE", help="judge a perf.json again; nothing is run")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code; what a user can mend is one line on stderr."""
    args = parser().parse_args(arguments)
    try:
        with stoppable():
            record = read(args.judge) if args.judge else measure(args)
            code = report(record, args.out)
    except PerfError as error:
        print(f"perf: {error}", file=sys.stderr)
        code = error.code
    except Stopped as stop:
        print(f"perf: {stop}: ended, and its worktrees removed", file=sys.stderr)
        code = stop.code
    return leave_exit(ROOT, "perf_compare", code)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs all rounds; the record that perf.json holds."""
    if len(args.commits) != 2:
        raise PerfError("two commits are needed: BASE HEAD", USAGE)
    if args.blocks < perf.MIN_BLOCKS:
        raise PerfError(f"--blocks {args.blocks}: at least {perf.MIN_BLOCKS} are needed for a verdict", USAGE)
    shas = dict(zip(("base", "head"), map(_sha, args.commits), strict=True))
    profile = args.profile or _profile()
    cards = nvidia.traces()
    with tempfile.TemporaryDirectory(prefix="nsa-perf-") as scratch, _worktrees(shas, Path(scratch)) as trees:
        order = ("base", "head", *perf.ORDER * args.blocks)
        said, rounds = None, []
        for number, tree in enumerate(order):
            timed, setting = _round(trees[tree], tree, args.bench.split())
            if said not in (None, setting):
                raise PerfError(f"the commits' benches time different things: {said} and {setting}", CONFIGURATION)
            said = setting
            if cards and not str(setting.get("device", "")).startswith("cuda"):
                raise PerfError(
                    f"a GPU is here ({cards[0]}) and the bench ran on {setting.get('device')}", INFRASTRUCTURE
                )
            if number >= 2:  # each tree's first round compiles its kernels
                rounds.append({"tree": tree, **timed})
            print(f"perf: {tree} {number + 1}/{len(order)}", file=sys.stderr, flush=True)
    changed = _git("diff", "--quiet", *shas.values(), "--", "bench", "nsa/measure.py").returncode != 0
    return {"schema": 1, **shas, "profile": profile, "setting": said, "bench_changed": changed, "rounds": rounds}


def report(record: dict[str, Any], out: Path) -> int:
    """Judges a record, writes perf.json and perf.md, prints the latter; the exit code."""
    try:
        found = perf.compare(record["rounds"], gating=record["profile"] in GATING)
        about = {"base": record["base"][:12], "head": record["head"][:12], "profile": record["profile"] or "none"}
        about["bench"] = ", ".join(f"{key} {value}" for key, value in record["setting"].items())
        if record["bench_changed"]:
            about["note"] = "the bench itself differs between the two; a difference may be its own"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PerfError(f"not a record of rounds ({type(error).__name__}: {error})", CONFIGURATION) from error
    text = perf.render(found, about)
    out.mkdir(parents=True, exist_ok=True)
    (out / "perf.json").write_text(json.dumps({**record, "judged": asdict(found)}, indent=1) + "\n")
    (out / "perf.md").write_text(text)
    print(text, end="")
    return found.exit_code


def read(path: Path) -> dict[str, Any]:
    """A record that an earlier run left."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise PerfError(f"{path.name}: unreadable ({error})", USAGE) from error
    if not isinstance(record, dict) or record.get("schema") != 1:
        raise PerfError(f"{path.name}: not a record of schema 1", USAGE)
    return record


def _round(tree: Path, name: str, options: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """One process of a tree's bench: {"ms": {S: ms}, "throttled": bool}, and the setting it reports."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("NSA_")}
    environment |= {"PYTHONPATH": str(tree), "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
    environment |= {"TRITON_CACHE_DIR": str(tree.parent / f"{name}-triton"), "PYTHONHASHSEED": "0"}
    throttled = _throttled()
    command = [sys.executable, BENCH, *options]
    code = {"head": TEST_FAILED, "base": INFRASTRUCTURE}[name]
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=ROUND_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise PerfError(f"{name}: {BENCH} did not end within {ROUND_TIMEOUT_S} s", code) from error
    if done.returncode:
        last = (done.stderr.strip() or "nothing said").splitlines()[-1]
        raise PerfError(f"{name}: {BENCH} exits {done.returncode}: {last[:300]}", code)
    try:
        answer = json.loads(done.stdout.strip().splitlines()[-1])
        ms = {str(row["S"]): float(row[METRIC]) for row in answer.pop("rows")}
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise PerfError(f"{name}: {BENCH} prints no rows with {METRIC}", code) from error
    return {"ms": ms, "throttled": throttled or _throttled()}, answer


def _throttled() -> bool:
    gpus, problem = nvidia.query()
    if problem:
        raise PerfError(problem, INFRASTRUCTURE)
    return any(gpu.throttled for gpu in gpus)


def _profile() -> str:
    gpus, _ = nvidia.query()
    return "a100" if gpus and all("A100" in gpu.name for gpu in gpus) else ""


@contextmanager
def _worktrees(shas: dict[str, str], scratch: Path) -> Iterator[dict[str, Path]]:
    trees = {name: scratch / name for name in shas}
    try:
        for name, sha in shas.items():
            done = _git("worktree", "add", "--detach", "--quiet", str(trees[name]), sha)
            if done.returncode:
                raise PerfError(f"{name}: no worktree ({done.stderr.strip().splitlines()[-1]})", CONFIGURATION)
        yield trees
    finally:
        for tree in trees.values():
            if tree.is_dir():
                _git("worktree", "remove", "--force", str(tree))


def _sha(name: str) -> str:
    done = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    if not re.fullmatch(r"[0-9a-f]{40,64}", done.stdout.strip()):
        raise PerfError(f"{name}: no such commit here; fetch it first", USAGE)
    return done.stdout.strip()


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)


if __name__ == "__main__":
    sys.exit(main())
