"""Time whole training steps of NSA and of its dense twin: forward, backward, clipping and AdamW, as the trainer's.

Both twins are built at each length and take their steps in turn, so that they share clocks and heat. A step's time is
the wall clock's, over rounds of steps that end with the device idle; its first step, with what it compiles, stands
apart. Token ids are random and lie on the device: no step waits for data, and wait_ms is 0. The share in which the
device works, and its time by part, come from a profile of a few more steps (bench.train_profile): kernels' intervals
over the wall clock of the steps that were not profiled, and by the operator that launched them; what is outside of
attention's and the head's operators (projections, rotation, pooling of keys, norms, SwiGLU, optimizer) is the rest.
MFU counts as nsa.train.flops says. On a GPU: the model of configs/m7c_125m.yaml under autocast to bf16; elsewhere a
small one in fp32. Prints a table and, last, a line of JSON; the CSV gets every row as soon as it is measured. Exits 1
if a twin failed other than by want of memory or time.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import gc
import importlib.util
import json
import statistics
import time
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch

from bench.train_profile import Work, profiled
from nsa import cli, measure, routing
from nsa.config import ModelConfig, NSAConfig
from nsa.model import Transformer, compile_blocks
from nsa.records import CsvLog, StepRow, table
from nsa.train import config as configs
from nsa.train.errors import TrainError
from nsa.train.flops import flops_per_token, peak_flops
from nsa.train.optim import build_optimizer

ROOT = Path(__file__).resolve().parents[1]
TWINS = ("nsa", "dense")
ON_GPU = {"S": [4096, 8192, 32768, 65536], "batch_tokens": 65536, "steps": 20}
ON_CPU = {"S": [128, 256], "batch_tokens": 512, "steps": 4}
SMALL = ModelConfig(
    dim=32, n_layers=2, n_heads=4, n_kv_groups=2, d_k=8, d_v=8, nsa=NSAConfig(l=16, d=8, l_sel=32, n_sel=4, w=64)
)
ROUND = 5  # steps of a twin before it is the other's turn
WARM = 2  # steps after the first that are not timed
PROFILED = 3


def parse(device: torch.device) -> tuple[argparse.Namespace, CsvLog | None]:
    gpu = device.type == "cuda"
    default = ON_GPU if gpu else ON_CPU
    parser = cli.Parser(prog="bench_train", description="Time training steps of NSA and of its dense twin.")
    flag = parser.add_argument
    flag("--S", type=cli.at_least_one, nargs="+", default=default["S"], help="sequence lengths (%(default)s)")
    said = "tokens a step, a multiple of every S (%(default)s)"
    flag("--batch-tokens", type=cli.at_least_one, default=default["batch_tokens"], help=said)
    flag("--steps", type=cli.at_least_one, default=default["steps"], help="timed steps a twin and length (%(default)s)")
    flag("--twins", choices=TWINS, nargs="+", default=list(TWINS), help="(%(default)s)")
    flag("--eager", action="store_true", help="time the twins without compilation too; alone on a CPU")
    flag("--config", type=Path, help="a training configuration (configs/m7c_125m.yaml; on a CPU a small model)")
    flag("--checkpointing", action="store_true", help="recompute activations in the backward")
    flag("--minutes", type=float, default=9.0, help="what would begin later is reported as not run (%(default)s)")
    flag("--csv", type=Path, help="also write every row to this CSV file")
    flag("--json", type=Path, help="also write the line of JSON to this file")
    flag("--plot", type=Path, metavar="PNG", help="also draw tokens/s against S, and the parts of a step")
    args = parser.parse_args()
    if odd := [S for S in args.S if args.batch_tokens % S]:
        parser.error(f"argument --batch-tokens: {args.batch_tokens} is no multiple of S = {odd[0]}")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("argument --plot: needs matplotlib; install it or leave the flag out")
    args.modes = ["compiled", *(["eager"] if args.eager else [])] if gpu else ["eager"]
    try:
        routing.flags()
        args.model, args.train = _configured(args.config, gpu)
        return args, CsvLog(args.csv, StepRow) if args.csv else None
    except OSError as error:
        parser.error(f"argument --csv: cannot write {args.csv} ({error.strerror}); name another file")
    except TrainError as error:
        parser.error(f"argument --config: {error}")
    except ValueError as error:
        parser.error(str(error))


def _configured(path: Path | None, gpu: bool) -> tuple[ModelConfig, configs.LoopConfig]:
    if path is None and not gpu:
        return SMALL, configs.LoopConfig()
    cfg = configs.load(path or ROOT / "configs/m7c_125m.yaml")
    return cfg.model, cfg.train


class Twin:
    """One model in training, and what its steps took."""

    def __init__(self, args: argparse.Namespace, attention: str, mode: str, S: int, device: torch.device) -> None:
        self.args, self.attention, self.mode, self.device = args, attention, mode, device
        self.held = _allocated(device)
        pattern = args.model.nsa if attention == "nsa" else NSAConfig()
        self.cfg = replace(args.model, attention=attention, nsa=pattern)
        torch.manual_seed(args.train.seed)
        self.model = Transformer(self.cfg).to(device)
        self.model.gradient_checkpointing = args.checkpointing
        if mode == "compiled" and (reason := compile_blocks(self.model, "on")):
            print(f"bench_train: not compiled: {reason}", file=sys.stderr)
            self.mode = "eager"
        self.optimizer = build_optimizer(self.model, args.train, device)
        windows = torch.randint(self.cfg.vocab_size, (args.batch_tokens // S, S + 1), device=device)
        self.ids, self.targets = windows[:, :-1], windows[:, 1:]
        self.loss, self.seconds = torch.zeros((), device=device), list[float]()
        self.first_s = self.timed(1)
        self.timed(WARM)
        self.peak_mib = (measure.peak_memory(device) - self.held) / 2**20 if device.type == "cuda" else None

    def step(self) -> None:
        """A step of nsa.train.loop, without its reports: nothing here waits for the device."""
        with self._autocast():
            loss = self.model.loss(self.ids, self.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.train.grad_clip or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = loss.detach()

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast("cuda", dtype=torch.bfloat16) if self.device.type == "cuda" else nullcontext()

    def timed(self, n: int) -> float:
        """Seconds a step, of n."""
        measure.synchronize(self.device)
        began = time.perf_counter()
        for _ in range(n):
            self.step()
        measure.synchronize(self.device)
        return (time.perf_counter() - began) / n

    def round(self, n: int) -> None:
        self.seconds.append(self.timed(n))


def _allocated(device: torch.device) -> int:
    """Bytes held by what is there already; from here on the peak is counted anew."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


class Sweep:
    """Measures length after length; every row goes to `log` at once and stays in `rows`."""

    def __init__(self, args: argparse.Namespace, device: torch.device, log: CsvLog | None) -> None:
        self.args, self.device, self.log = args, device, log
        self.rows: list[StepRow] = []
        self.began = time.monotonic()
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak = peak_flops(name)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def run(self) -> None:
        lengths = sorted(set(self.args.S))
        wanted = [(attention, mode) for mode in self.args.modes for attention in dict.fromkeys(self.args.twins)]
        with measure.Progress("train", len(lengths) * len(wanted), "rows", every=0.0) as self.progress:
            for S in lengths:
                self.length(S, wanted)
                self.release()

    def length(self, S: int, wanted: list[tuple[str, str]]) -> None:
        twins: list[Twin] = []
        for attention, mode in wanted:
            blank = self.blank(S, attention, mode)
            if self.seconds > 60 * self.args.minutes:
                self.record(replace(blank, status=f"not run: {self.args.minutes:g} minutes were over"))
                continue
            try:
                twins.append(Twin(self.args, attention, mode, S, self.device))
                print(f"train: S={S} {attention} {mode}: first step {twins[-1].first_s:.1f} s", file=sys.stderr)
            except (RuntimeError, MemoryError) as error:
                self.record(replace(blank, status=_why(error)))
                self.release()
        left = self.args.steps
        clocks = None
        while left > 0:
            for twin in twins:
                twin.round(min(ROUND, left))
            clocks = measure.clocks(self.device)
            left -= ROUND
        dense = {twin.mode: self.speed(twin) for twin in twins if twin.attention == "dense"}
        for twin in twins:
            found = profiled(twin.step, PROFILED, self.device)
            self.record(replace(self.row(twin, S, found, dense), sm_mhz=clocks.sm if clocks else None))

    def speed(self, twin: Twin) -> float:
        return self.args.batch_tokens / statistics.median(twin.seconds)

    def row(self, twin: Twin, S: int, found: Work, dense: dict[str, float]) -> StepRow:
        speed, ms = self.speed(twin), 1e3 * statistics.median(twin.seconds)
        # On a CPU the operators' own time is all that a profile knows: the rest of the step is everything else.
        busy = found.busy if self.device.type == "cuda" else ms
        return replace(
            self.blank(S, twin.attention, twin.mode),
            tokens_per_s=speed,
            mfu=speed * flops_per_token(twin.cfg, S) / self.peak if self.peak else None,
            vs_dense=speed / dense[twin.mode] if twin.mode in dense else None,
            ms_step=ms,
            wait_ms=0.0,
            busy=min(1.0, busy / ms) if self.device.type == "cuda" else None,
            ms_attention=found.attention,
            ms_head=found.head,
            ms_rest=max(0.0, busy - found.attention - found.head),
            peak_mib=twin.peak_mib,
            first_s=twin.first_s,
            loss=float(twin.loss),
            status="ok",
        )

    def blank(self, S: int, attention: str, mode: str) -> StepRow:
        """A row with what is known before anything is timed."""
        known: dict[str, Any] = dict.fromkeys(StepRow.__dataclass_fields__)
        known |= {"S": S, "batch": self.args.batch_tokens // S, "attention": attention, "mode": mode}
        return StepRow(**known | {"steps": self.args.steps, "status": ""} | setting(self.device))

    def record(self, row: StepRow) -> None:
        self.rows.append(row)
        if self.log:
            self.log.write(row)
        self.progress.advance(1)

    def release(self) -> None:
        """Give back what a length held. Compiled blocks go too: torch stops compiling a function at its eighth form."""
        torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _why(error: BaseException) -> str:
    if amount := measure.refused_allocation(error):
        return f"out of memory: {amount} refused"
    traceback.print_exc()
    return f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"


def setting(device: torch.device) -> dict[str, str]:
    return {
        "dtype": "bfloat16" if device.type == "cuda" else "float32",
        "device": measure.device_name(device),
        "torch": torch.__version__,
        "triton": routing.triton_version(),
    }


COLUMNS = {
    "S": "S",
    "batch": "batch",
    "attention": "twin",
    "mode": "mode",
    "tokens_per_s": "tokens/s",
    "mfu": "MFU",
    "vs_dense": "x dense",
    "ms_step": "ms/step",
    "ms_attention": "attention",
    "ms_head": "head",
    "ms_rest": "rest",
    "busy": "busy",
    "wait_ms": "wait ms",
    "peak_mib": "peak MiB",
    "first_s": "first s",
    "status": "status",
}
FORMATS = {"tokens_per_s": ",.0f", "mfu": ".1%", "vs_dense": ".2f", "busy": ".1%", "peak_mib": ",.0f", "first_s": ".1f"}


def render(rows: list[StepRow]) -> str:
    """A line a row, times in ms."""
    return table(list(COLUMNS.values()), [list(_cells(row)) for row in rows])


def _cells(row: StepRow) -> Iterator[str]:
    for name in COLUMNS:
        value = getattr(row, name)
        if value is None:
            yield "-"
        else:
            yield format(value, FORMATS.get(name, ".1f")) if isinstance(value, float) else str(value)


def figures(sweep: Sweep) -> dict[str, Any]:
    """The line of JSON: where and how, and every row."""
    known = setting(sweep.device)
    rows = [{k: _short(v) for k, v in asdict(row).items() if v is not None and k not in known} for row in sweep.rows]
    model = {k: v for k, v in asdict(sweep.args.model).items() if k not in ("nsa", "attention")}
    return {
        "bench": "train",
        **known,
        "model": model,
        "batch_tokens": sweep.args.batch_tokens,
        "checkpointing": sweep.args.checkpointing,
        "data": "random ids on the device: no waiting",
        "seconds": round(sweep.seconds, 1),
        "rows": rows,
    }


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main() -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args, log = parse(device)
    sweep = Sweep(args, device, log)
    sweep.run()
    if args.plot:
        from bench.train_plot import draw

        draw(sweep.rows, args.plot)
    print(render(sweep.rows))
    line = json.dumps(figures(sweep))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(line + "\n")
    print(line)
    return 1 if any(row.status.startswith("failed") for row in sweep.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
