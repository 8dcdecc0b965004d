"""What every kernel needs on every card, compiled here and now, without a GPU: python -m nsa.kernels.report

Compiles each launch that the kernels' host code makes on sm_80, sm_89 and sm_90, over the head layouts, head dims and
dtypes of `CASES`, with the installed Triton and nothing from its cache; prints shared memory against the card's limit,
registers, spills and asynchronous copies. Exit code 1 if an entry does not compile, does not fit, spills more than its
type may or lost its asynchronous copies, or if nothing was compiled; 2 where there is no Triton.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nsa.blocks import Pattern, n_compressed
from nsa.kernels.recorder import Launch, recorded

# Dynamic shared memory that one block may ask for, in bytes.
SHARED_LIMITS = {80: 166_912, 89: 101_376, 90: 232_448}
REGISTER_FILE = 65_536  # 32-bit registers that one block may hold, on all three
# Bytes that a thread may spill, by bytes of an element. Most seen: 1,224 (Triton 3.0, 32 heads a group) and 1,848. A
# tile too large for the registers, or an assembler that has lost its way, is far above.
SPILL_LIMITS = {2: 2048, 4: 4096}
# Kernels whose loop must overlap its loads with arithmetic where the launch has a second stage.
PIPELINED = (
    "selection.score",
    "selected_device.block_forward",
    "selected_device.near_forward",
    "selected_device.union_forward",
    "selected_device.block_backward",
    "selected_device.query_forward",
    "window_device.forward",
    "window_device.backward_dq",
    "window_device.backward_dkv",
    "compressed_device.forward",
    "compressed_device.backward_dq",
    "compressed_device.backward_dkv",
)
MOST_PROCESSES = 8  # a compiler takes half a GB
COLUMNS = ("kernel", "arch", "case", "shared", "limit", "registers", "spills", "cp_async", "warps", "stages", "verdict")


PATTERN = Pattern(l=32, d=16, l_sel=64, n_sel=16, w=512, init_blocks=1, local_blocks=2)
OPS = ("compressed", "selection", "selected", "combine", "window")


class Case(NamedTuple):
    """One call of each of `ops`: queries, positions, heads a group, head dim, dtype."""

    T: int
    S: int
    R: int
    D: int
    dtype: torch.dtype = torch.bfloat16
    ops: tuple[str, ...] = OPS

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} R{self.R} D{self.D} T{self.T} S{self.S}"


# Every entry of the launch tables. The group size picks one for the choice of blocks alone, and fp16 has bf16's.
CASES = (
    *(Case(65_536, 65_536, R, D) for R, D in ((16, 128), (6, 64))),
    *(Case(4_096, 4_096, R, D) for R, D in ((1, 32), (8, 192))),
    *(Case(4_096, 4_096, R, D, ops=("selection",)) for R, D in ((4, 128), (32, 128), (3, 64))),
    *(Case(4_096, 4_096, R, D, torch.float32) for R, D in ((6, 64), (16, 128))),
    # The selected branch's other form on either side of its bound.
    *(Case(4_096, 4_096, R, D, ops=("selected",)) for R, D in ((6, 64), (16, 128))),
    Case(65_536, 65_536, 1, 32, ops=("selected",)),
    *(Case(65_536, 65_536, R, D, torch.float32, ("selected",)) for R, D in ((6, 64), (16, 128))),
    *(Case(1, 65_536, R, D) for R, D in ((16, 128), (6, 64))),
    Case(4_096, 1_048_576, 6, 64),
    Case(64, 64, 6, 64, ops=("compressed",)),  # so short that dk and dv are one piece
)


def launches(case: Case, sm: int) -> list[Launch]:
    """What the ops of this build launch for a case on a card, forward and backward, at 32/16/64/16."""

    def tensor(*shape: int, dtype: torch.dtype = case.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    G, H = 2, 2 * case.R
    q, k, lse = tensor(1, case.T, H, case.D), tensor(1, case.S, G, case.D), tensor(1, case.T, H, dtype=torch.float32)
    blocks, logits = tensor(1, case.T, G, 16, dtype=torch.int32), tensor(1, case.T, H, 3)
    modules = {op: importlib.import_module(f"nsa.kernels.{op}") for op in case.ops}
    with recorded(sm) as recording:
        if "compressed" in modules and not modules["compressed"].unsupported("triton", q, k, k):
            k_cmp, rest = k[:, : n_compressed(case.S, PATTERN)], (PATTERN, case.S)
            modules["compressed"].forward(q, k_cmp, k_cmp, None, *rest, False, "triton")
            if case.T == case.S:
                for delta in (None, lse):
                    modules["compressed"].backward(q, q, k_cmp, k_cmp, None, q, lse, *rest, "triton", None, delta)
        if "selection" in modules:
            modules["selection"].select(q, k[:, : n_compressed(case.S, PATTERN)], lse, PATTERN, case.S)
        if "selected" in modules:
            past = (q, k, k, blocks, PATTERN, case.S, False, "triton")
            modules["selected"].forward(*past)
            modules["selected"].forward_summed(*past, q, q, logits, False)
            if case.T == case.S:
                for delta in (None, lse):
                    modules["selected"].backward(
                        q, q, k, k, blocks, q, lse, PATTERN, case.S, "triton", None, delta, plus=(q, q) * (delta is lse)
                    )
        if "combine" in modules:
            modules["combine"].forward(q, q, q, logits, False)
            modules["combine"].backward(q, q, q, q, logits, False)
            modules["combine"].fold(q, (q, q, q), (lse, lse, lse), logits, False)
        if "window" in modules and not modules["window"].unsupported("triton", q, k, k):
            modules["window"].forward(q, k, k, None, PATTERN, case.S, False, "triton")
            if case.T == case.S:
                for delta in (None, lse):
                    modules["window"].backward(q, q, k, k, None, q, lse, PATTERN, case.S, "triton", None, delta)
    return recording.launches


def compile_for(launch: Launch, sm: int) -> Any:
    """The compiled kernel. Raises what Triton raises."""
    import triton
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    if launch.registers:
        options["maxnreg"] = launch.registers
    return triton.compile(_source(launch), target=GPUTarget("cuda", sm, 32), options=options)


def _source(launch: Launch) -> Any:
    """The kernel specialised as a launch would be; Triton 3.2 changed how that is written down."""
    import triton
    from triton.compiler import ASTSource

    kernel, names = launch.kernel, list(launch.kernel.arg_names)
    constants = {**launch.constants, **dict.fromkeys(launch.ones, 1)}
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 2):
        from triton.compiler.compiler import AttrsDescriptor

        attributes = AttrsDescriptor(
            divisible_by_16={names.index(n) for n in launch.aligned}, equal_to_1={names.index(n) for n in launch.ones}
        )
        return ASTSource(kernel, {n: launch.types[n] for n in names if n in launch.types}, constants, attributes)
    signature = {n: "constexpr" if n in constants else launch.types[n] for n in names}
    return ASTSource(
        kernel, signature, constants, {(names.index(n),): [["tt.divisibility", 16]] for n in launch.aligned}
    )


def measure(launch: Launch, sm: int) -> dict[str, Any]:
    """One row of the table. A launch that the compiler refuses is a row whose verdict says so."""
    from triton.compiler.errors import CompilationError

    row: dict[str, Any] = {"kernel": launch.name, "arch": f"sm_{sm}"}
    try:
        compiled = compile_for(launch, sm)
    except (CompilationError, RuntimeError) as error:
        return {**row, "verdict": f"does not compile: {str(error).strip().splitlines()[-1]}"}
    registers, spills = _resources(compiled.asm["ptx"], compiled.asm["cubin"])
    copies = len(re.findall(r"cp\.async\.c[ag]", compiled.asm["ptx"]))
    shared = compiled.metadata.shared
    complaints = []
    if shared > SHARED_LIMITS[sm]:
        complaints.append("shared memory above the limit")
    if -(-registers // 8) * 8 * 32 * launch.warps > REGISTER_FILE:
        complaints.append("registers above the file")
    if spills > _spill_limit(launch):
        complaints.append(f"spills more than {_spill_limit(launch)} bytes")
    if launch.name in PIPELINED and launch.stages > 1 and not copies:
        complaints.append("loads are not pipelined")
    return row | {
        **{"shared": shared, "limit": SHARED_LIMITS[sm], "registers": registers, "spills": spills},
        **{"cp_async": copies, "warps": launch.warps, "stages": launch.stages},
        "verdict": ", ".join(complaints) or "fits",
    }


def _spill_limit(launch: Launch) -> int:
    return SPILL_LIMITS[2 if {"*bf16", "*fp16"} & set(launch.types.values()) else 4]


def _resources(ptx: str, cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes that it spills. The cubin knows registers and stack; only the assembler tells what
    of the stack is spills, and is asked where there is any."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    target = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
    assert target
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "k.ptx"), Path(folder, "k.cubin")
        binary.write_bytes(cubin)
        dump = [str(tools / "cuobjdump"), "--dump-resource-usage", str(binary)]
        usage = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
        registers, stack = (max(int(n) for n in re.findall(rf"{what}:(\d+)", usage)) for what in ("REG", "STACK"))
        if not stack:
            return registers, 0
        source.write_text(ptx)
        assembler = [str(tools / "ptxas"), "-v", f"--gpu-name={target[1]}", str(source), "-o", f"{folder}/out"]
        said = subprocess.run(assembler, capture_output=True, text=True, check=True).stderr
    return registers, sum(int(found) for found in re.findall(r"(\d+) bytes spill stores", said))


def wanted(cases: tuple[Case, ...], match: str) -> list[tuple[int, Case, Launch]]:
    """(card, case, launch): each distinct launch of a card under the first case that makes it."""
    found: list[tuple[int, Case, Launch]] = []
    for sm in SHARED_LIMITS:
        seen: list[Launch] = []
        for case in cases:
            for launch in launches(case, sm):
                if match in f"{launch.name} {case}" and launch not in seen:
                    seen.append(launch)
                    found.append((sm, case, launch))
    return found


def rows(entries: list[tuple[int, Case, Launch]]) -> Iterator[dict[str, Any]]:
    """The rows of the table, in the order of `entries`, compiled in processes of their own from an empty cache."""
    processes = max(1, min(MOST_PROCESSES, len(os.sched_getaffinity(0)), len(entries)))
    with tempfile.TemporaryDirectory() as cache:
        pool = ProcessPoolExecutor(processes, get_context("spawn"), initializer=_prepare, initargs=(cache,))
        with pool:
            futures = [pool.submit(measure, launch, sm) for sm, _, launch in entries]
            for (sm, case, launch), future in zip(entries, futures, strict=True):
                try:
                    row = future.result()
                except BrokenProcessPool:
                    died = "not compiled: the compiler died, in this launch or in another"
                    row = {"kernel": launch.name, "arch": f"sm_{sm}", "verdict": died}
                yield {**row, "case": str(case)}


def _prepare(cache: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = cache


def table(rows: list[dict[str, Any]]) -> str:
    """The rows under their column names, aligned."""
    cells = [list(COLUMNS), *([str(row.get(name, "-")) for name in COLUMNS] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join(lines)


def compiled(match: str) -> list[dict[str, Any]]:
    """All rows, with a line on stderr for every tenth of them."""
    entries, done = wanted(CASES, match), []
    for row in rows(entries):
        done.append(row)
        if len(done) * 10 // len(entries) > (len(done) - 1) * 10 // len(entries):
            wrong = sum(row["verdict"] != "fits" for row in done)
            print(f"{len(done)} of {len(entries)} launches compiled, {wrong} wrong", file=sys.stderr, flush=True)
    return done


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m nsa.kernels.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the rows there, for the report")
    parser.add_argument("--match", default="", help="only launches whose kernel and case contain this")
    options = parser.parse_args(arguments)
    os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled
    try:
        import triton
    except ImportError:
        print("no Triton here: `pip install --no-deps triton` compiles for a GPU without having one", file=sys.stderr)
        return 2
    done = compiled(options.match)
    wrong = sum(row["verdict"] != "fits" for row in done)
    print(table(done))
    print(f"Triton {triton.__version__}: {len(done)} launches compiled, {wrong} not as they should be")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        facts = {"triton": triton.__version__, "launches": len(done), "wrong": wrong}
        shown = [{**{name: row.get(name) for name in COLUMNS}, "triton": triton.__version__} for row in done]
        options.json.write_text(json.dumps({**facts, "kernels": shown}, indent=1) + "\n")
    return 1 if wrong or not done else 0


if __name__ == "__main__":
    sys.exit(main())
