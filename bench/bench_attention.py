"""Time NSA part by part, forward and backward, beside dense attention, against length, layout and kind of input.

Parts: phi (pooling to compressed keys and values), cmp, choice (score and top n), sel, win, combine (gates and sum);
`sum` adds them up, `attention` is the whole in one autograd graph, projections and rotation left out. Dense attention
is torch's flash (FA-2 on a GPU) and cuDNN operators, and FA-3 where --fa3 names its library; it is timed once a layout
and length, since its time does not depend on the values. Prints tables and, last, a line of JSON; the CSV gets every
row as soon as it is measured. Exits 1 if a part failed other than by want of memory, time or a kernel.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import gc
import importlib.util
import json
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench import attention_inputs as kinds
from bench import attention_parts as parts
from bench.attention_inputs import Layout
from bench.attention_timing import Ceilings, Deadline, Timer, Timing, ceilings
from nsa import cli, measure, routing
from nsa.config import NSAConfig
from nsa.records import AttentionRow, CsvLog, table

PARTS = (*(f"dense-{name}" for name in parts.DENSE), *parts.NSA_PARTS, parts.CORE, parts.WHOLE)
DTYPES = ("bfloat16", "float16", "float32")
# A card's sweep; elsewhere sizes that a test can wait for.
ON_GPU = {"S": [4096, 8192, 16384, 32768, 65536, 131072], "layouts": [(64, 4, 128), (32, 8, 128), (12, 2, 64)]}
ON_CPU = {"S": [256, 512], "layouts": [(4, 2, 32)]}
BUDGET_MS = 120.0
# How torch says that an operator of its attention does not take these inputs on this machine.
NO_OPERATOR = ("No available kernel", "No viable backend")


def length(text: str) -> int:
    """argparse type: positions, enough for one compressed block."""
    S, least = cli.at_least_one(text), NSAConfig().l
    if S < least:
        raise argparse.ArgumentTypeError(f"{S} positions hold no compressed block; give {least} or more")
    return S


def layout(text: str) -> Layout:
    """argparse type: heads,groups,dim."""
    numbers = [cli.at_least_one(part) for part in text.split(",")]
    if len(numbers) != 3 or numbers[0] % numbers[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is not heads,groups,dim with heads a multiple of groups")
    return Layout(*numbers)


def kind(text: str) -> str:
    """argparse type: a kind of input, or a .pt file."""
    if text in kinds.KINDS or text.endswith(".pt"):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is neither {', '.join(kinds.KINDS)} nor a .pt file")


def backend(text: str) -> tuple[str, str]:
    """argparse type: OP=NAME."""
    op, _, name = text.partition("=")
    if name not in routing.PREFERENCES.get(op, ()):
        known = "; ".join(f"{op} {', '.join(names)}" for op, names in routing.PREFERENCES.items())
        raise argparse.ArgumentTypeError(f"{text!r} is not OP=NAME; there are {known}")
    return op, name


def parse(device: torch.device) -> tuple[argparse.Namespace, CsvLog | None]:
    default = ON_GPU if device.type == "cuda" else ON_CPU
    parser = cli.Parser(prog="bench_attention", description="Time NSA's parts beside dense attention.")
    flag = parser.add_argument
    flag("--B", type=cli.at_least_one, default=1, help="batch rows (%(default)s)")
    flag("--S", type=length, nargs="+", default=default["S"], help="positions (%(default)s)")
    layouts = [Layout(*one) for one in default["layouts"]]
    said = f"heads, groups, head dim ({' '.join(','.join(map(str, one)) for one in layouts)})"
    flag("--layouts", type=layout, nargs="+", default=layouts, metavar="H,G,D", help=said)
    said = f"{', '.join(kinds.KINDS)}, or a .pt file with q, k, v, which brings its own layout (all kinds)"
    flag("--inputs", type=kind, nargs="+", default=list(kinds.KINDS), metavar="KIND", help=said)
    flag("--parts", choices=PARTS, nargs="+", metavar="PART", help=f"of {', '.join(PARTS)} (all)")
    said = "run an op by this backend (Triton where it can, else as routing chooses)"
    flag("--backend", type=backend, nargs="+", default=[], metavar="OP=NAME", help=said)
    flag("--dtype", choices=DTYPES, help="bfloat16 on a GPU, else float32")
    said = f"calls timed at most; fewer, but 3, where they would pass {BUDGET_MS:g} ms (%(default)s)"
    flag("--repeats", type=cli.at_least_one, default=10, help=said)
    flag("--minutes", type=float, default=7.0, help="what would begin later is reported as not run (%(default)s)")
    flag("--fa3", type=Path, metavar="LIBRARY", help="a library with torch.ops.flash_attn_3")
    flag("--csv", type=Path, help="also write every row to this CSV file")
    flag("--plot", type=Path, metavar="PNG", help="also draw NSA and dense against S, and the parts")
    args = parser.parse_args()
    args.dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("argument --plot: needs matplotlib; install it or leave the flag out")
    _load_fa3(parser, args.fa3)
    missing = [] if args.fa3 else ["dense-fa3"]
    missing += [] if device.type == "cuda" else ["dense-cudnn"]
    if args.parts and "dense-fa3" in args.parts and not args.fa3:
        parser.error("argument --parts: dense-fa3 needs --fa3 LIBRARY")
    args.parts = args.parts or [name for name in PARTS if name not in missing]
    try:
        routing.flags()
        args.file_layouts = {k: kinds.layout_of(kinds.load(Path(k))) for k in args.inputs if k.endswith(".pt")}
        return args, CsvLog(args.csv, AttentionRow) if args.csv else None
    except OSError as error:
        parser.error(f"argument --csv: cannot write {args.csv} ({error.strerror}); name another file")
    except kinds.InputsError as error:
        parser.error(f"argument --inputs: {error}")
    except ValueError as error:
        parser.error(str(error))


def _load_fa3(parser: cli.Parser, library: Path | None) -> None:
    if library is None:
        return
    try:
        parts.load_fa3(library)
    except (OSError, ValueError) as error:
        parser.error(f"argument --fa3: cannot load {library}: {str(error).splitlines()[0]}")


@dataclass(frozen=True)
class Group:
    """The rows of one layout at one length; the dense ones are taken with the first kind's inputs."""

    S: int
    layout: Layout
    kinds: tuple[str, ...]


def plan(args: argparse.Namespace) -> list[Group]:
    """Short lengths first, so that what a deadline cuts off is the longest."""
    made = tuple(name for name in args.inputs if name not in args.file_layouts)
    by_layout: dict[Layout, tuple[str, ...]] = dict.fromkeys(args.layouts, made) if made else {}
    for file, its_layout in args.file_layouts.items():
        by_layout[its_layout] = (*by_layout.get(its_layout, ()), file)
    return [Group(S, one, names) for S in sorted(set(args.S)) for one, names in by_layout.items()]


class Sweep:
    """Measures group after group; every row goes to `log` at once and stays in `rows`."""

    def __init__(self, args: argparse.Namespace, device: torch.device, log: CsvLog | None) -> None:
        self.args, self.device, self.log = args, device, log
        self.cfg, self.dtype = NSAConfig(), getattr(torch, args.dtype)
        self.deadline = Deadline(args.minutes)
        self.timer = Timer(device, args.repeats, BUDGET_MS)
        self.ceilings = ceilings(device)
        self.rows: list[AttentionRow] = []
        self.dense = [name for name in PARTS if name in args.parts and name.startswith("dense-")]
        self.sparse = [name for name in PARTS if name in args.parts and not name.startswith("dense-")]
        self._said: set[str] = set()

    def run(self) -> None:
        groups = plan(self.args)
        n = sum(len(self.dense) + len(group.kinds) * len(self.sparse) for group in groups)
        with measure.Progress("attention", n, "parts") as self.progress:
            for group in groups:
                self.group(group)
                self.release()

    def group(self, group: Group) -> None:
        dense: dict[str, AttentionRow] = {}
        for i, name in enumerate(group.kinds):
            blank = self.blank(group, name)
            todo = [*(self.dense if i == 0 else []), *self.sparse]
            inputs: list[kinds.QKV] = []

            def make(name: str = name, inputs: list[kinds.QKV] = inputs) -> None:
                torch.manual_seed(0)
                inputs.append(kinds.make(name, group.S, group.layout, self.cfg, self.device, self.dtype, self.args.B))

            if status := self.attempt(make):
                for part in todo:
                    self.record(replace(blank, part=part, status=status))
                continue
            if i == 0:
                for part in self.dense:
                    row = self.part(replace(blank, part=part, backend=part), dense, self.dense_part(part, inputs[0]))
                    dense[part.removeprefix("dense-")] = row
            if self.sparse:
                self.sparse_rows(blank, dense, inputs[0])

    def dense_part(self, name: str, inputs: kinds.QKV) -> Callable[[], parts.Part]:
        return lambda: parts.dense(name.removeprefix("dense-"), inputs)

    def sparse_rows(self, blank: AttentionRow, dense: dict[str, AttentionRow], inputs: kinds.QKV) -> None:
        """The rows of NSA's parts on these inputs, and their sum."""
        backends, reasons = parts.triton_backends(inputs)
        self.say(reasons)
        made: list[parts.Sparse] = []

        def make() -> None:
            made.append(parts.Sparse(inputs, self.cfg, {**backends, **dict(self.args.backend)}))

        if status := "" if self.deadline.over else self.attempt(make):
            for name in self.sparse:
                self.record(replace(blank, part=name, status=status))
            return
        if made:
            found = kinds.choices(made[0].blocks, self.cfg)
            blank = replace(blank, agreement=found.agreement, heaviest=found.heaviest)
        rows = [self.part(replace(blank, part=n), dense, lambda n=n: made[0].part(n)) for n in self.sparse]
        summed = [row for row in rows if row.part in parts.NSA_PARTS and row.status == "ok"]
        if len(summed) == len(parts.NSA_PARTS):
            fwd, bwd = (sum(getattr(row, name) or 0.0 for row in summed) for name in ("fwd_ms", "bwd_ms"))
            self.record(
                with_ratios(replace(blank, part="sum", fwd_ms=fwd, bwd_ms=bwd, status="ok"), dense), count=False
            )

    def part(self, row: AttentionRow, dense: dict[str, AttentionRow], build: Callable[[], parts.Part]) -> AttentionRow:
        """Time one part and record its row."""
        before, timings = dict(routing.launches), list[Timing]()
        whole = row.part in (parts.CORE, parts.WHOLE) or row.part.startswith("dense-")
        if self.deadline.over:
            status = f"not run: {self.deadline.minutes:g} minutes were over"
        else:
            status = self.attempt(lambda: timings.append(self.timer.part(build(), whole_step=whole)))
        ran = list(parts.ran(before))
        row = replace(row, status=status or "ok", launches=" ".join(f"{op}/{name}:{n}" for op, name, n in ran))
        row = replace(row, backend=row.backend or backend_of(ran))
        if timings:
            row = with_ratios(with_timing(row, timings[0]), dense)
        self.record(row)
        return row

    def attempt(self, step: Callable[[], None]) -> str:
        """Do it; "" if it was done, else why not, as a row's status."""
        try:
            step()
            return ""
        except (routing.Unsupported, kinds.InputsError) as error:
            return f"cannot run: {error}"
        except (RuntimeError, MemoryError) as error:
            said = str(error).partition("\n")[0]
            if amount := measure.refused_allocation(error):
                status = f"out of memory: {amount} refused"
            elif said.startswith(NO_OPERATOR):
                status = f"cannot run: {said}"
            else:
                traceback.print_exc()
                status = f"failed: {type(error).__name__}: {said}"
        self.release()
        return status

    def release(self) -> None:
        """Give back what a failed part or a finished group held."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def record(self, row: AttentionRow, *, count: bool = True) -> None:
        self.rows.append(row)
        if self.log:
            self.log.write(row)
        if count:
            self.progress.advance(1)

    def say(self, reasons: list[str]) -> None:
        """Reasons against a kernel, each once."""
        for reason in reasons:
            if reason not in self._said:
                self._said.add(reason)
                print(f"bench_attention: {reason}", file=sys.stderr)

    def blank(self, group: Group, inputs: str) -> AttentionRow:
        """A row with what is known before anything is timed."""
        known: dict[str, Any] = dict.fromkeys(AttentionRow.__dataclass_fields__)
        known |= {
            "part": "",
            "backend": "",
            "launches": "",
            "status": "",
            "B": self.args.B,
            "S": group.S,
            "inputs": inputs,
        }
        known |= group.layout._asdict() | self.ceilings._asdict() | setting(self.args, self.device)
        return AttentionRow(**known)


def setting(args: argparse.Namespace, device: torch.device) -> dict[str, str]:
    return {
        "dtype": args.dtype,
        "device": measure.device_name(device),
        "torch": torch.__version__,
        "triton": routing.triton_version(),
    }


def with_timing(row: AttentionRow, timing: Timing) -> AttentionRow:
    bwd, step, clocks = timing.bwd, timing.step, timing.clocks
    return replace(
        row,
        fwd_ms=timing.fwd.ms,
        bwd_ms=bwd.ms if bwd else None,
        step_ms=step.ms if step else None,
        fwd_ops=timing.operations[0] if timing.operations else None,
        bwd_ops=timing.operations[1] if timing.operations else None,
        peak_mib=timing.peak_mib,
        fwd_repeats=timing.fwd.repeats,
        bwd_repeats=bwd.repeats if bwd else None,
        sm_mhz=clocks.sm if clocks else None,
        mem_mhz=clocks.memory if clocks else None,
    )


def with_ratios(row: AttentionRow, dense: dict[str, AttentionRow]) -> AttentionRow:
    """How many times the row's time each dense form takes."""
    ratios = {}
    for name, other in dense.items():
        for way in ("fwd", "bwd"):
            ours, theirs = getattr(row, f"{way}_ms"), getattr(other, f"{way}_ms")
            if ours and theirs:
                ratios[f"{way}_vs_{name}"] = theirs / ours
    return replace(row, **ratios)


def backend_of(ran: list[tuple[str, str, int]]) -> str:
    """The one backend that ran, or op:backend for each op (backward passes with their op); plain torch if none did."""
    by_op: dict[str, list[str]] = {}
    for op, name, _ in ran:
        names = by_op.setdefault(op.removesuffix("_backward"), [])
        if name not in names:
            names.append(name)
    if len(by_op) == 1:
        return "+".join(next(iter(by_op.values())))
    return " ".join(f"{op}:{'+'.join(names)}" for op, names in by_op.items()) or "torch"


def render(rows: list[AttentionRow]) -> Iterator[str]:
    """A table for every layout and kind of input: a line a part, a column a length, `forward / backward` in ms."""
    lengths = sorted({row.S for row in rows})
    for heads, groups, dim, inputs in dict.fromkeys((r.heads, r.groups, r.dim, r.inputs) for r in rows):
        mine = {(r.part, r.S): r for r in rows if (r.heads, r.groups, r.dim, r.inputs) == (heads, groups, dim, inputs)}
        lines = [[part, *(_cell(mine.get((part, S))) for S in lengths)] for part in dict.fromkeys(p for p, _ in mine)]
        for name in parts.DENSE:
            ratios = [_ratio(mine.get((parts.WHOLE, S)), name) for S in lengths]
            if any(ratios):
                lines.append([f"{parts.WHOLE} vs {name}", *ratios])
        title = f"{heads} heads, {groups} groups, D {dim}, {rows[0].dtype}, {inputs} (ms forward / backward)"
        yield f"{title}\n{table(['S', *map(str, lengths)], lines)}\n"


def _cell(row: AttentionRow | None) -> str:
    if row is None:
        return ""
    if row.fwd_ms is None:
        return row.status.partition(":")[0]
    return f"{row.fwd_ms:.3f} / {'-' if row.bwd_ms is None else f'{row.bwd_ms:.3f}'}"


def _ratio(row: AttentionRow | None, name: str) -> str:
    fwd, bwd = getattr(row, f"fwd_vs_{name}", None), getattr(row, f"bwd_vs_{name}", None)
    return f"{fwd:.2f}x / {bwd:.2f}x" if fwd and bwd else ""


def figures(sweep: Sweep, after: Ceilings) -> dict[str, Any]:
    """The line of JSON: where and how, and the rows of the core and the whole; the CSV has the parts."""
    kept = (
        "heads",
        "groups",
        "dim",
        "B",
        "S",
        "part",
        "inputs",
        "backend",
        "fwd_ms",
        "bwd_ms",
        "step_ms",
        "fwd_ops",
        "bwd_ops",
        "peak_mib",
        "status",
    )
    ratios = tuple(name for name in AttentionRow.__dataclass_fields__ if "_vs_" in name)
    whole = [row for row in sweep.rows if row.part in (parts.CORE, parts.WHOLE)]
    return {
        "bench": "attention",
        **setting(sweep.args, sweep.device),
        "seconds": round(sweep.deadline.seconds, 1),
        "ceilings": [{name: round(value, 1) for name, value in c._asdict().items()} for c in (sweep.ceilings, after)],
        "status": Counter(row.status.partition(":")[0] for row in sweep.rows),
        "rows": [
            {name: _short(value) for name in kept + ratios if (value := getattr(r, name)) is not None} for r in whole
        ],
    }


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args, log = parse(device)
    if not args.fa3:
        print("bench_attention: no FA-3: --fa3 would name its library", file=sys.stderr)
    sweep = Sweep(args, device, log)
    sweep.run()
    if args.plot:
        from bench.attention_plot import draw

        draw(sweep.rows, args.plot)
    print("\n".join(render(sweep.rows)))
    print(json.dumps(figures(sweep, ceilings(device))))
    return 1 if any(row.status.startswith("failed") for row in sweep.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
