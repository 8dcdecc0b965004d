"""What every kernel needs on every card, compiled here and now, without a GPU: python -m nsa.kernels.report

Compiles each entry of the kernels' launch tables for sm_80, sm_89 and sm_90 with the installed Triton and prints
shared memory against the card's limit, registers, spills and asynchronous copies. Exit code 1 if an entry does not
compile, does not fit or lost its asynchronous copies; 2 where there is no Triton.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nsa.kernels
from nsa.kernels.specimen import Specimen

# Dynamic shared memory that one block may ask for, in bytes.
SHARED_LIMITS = {80: 166_912, 89: 101_376, 90: 232_448}
REGISTER_FILE = 65_536  # 32-bit registers a block may hold, on all three
COLUMNS = ("kernel", "arch", "shared", "limit", "registers", "spills", "cp_async", "warps", "stages", "verdict")


def specimens(sm: int) -> Iterator[Specimen]:
    """The launch tables of every module in nsa.kernels that exports `specimens(sm)`."""
    for info in pkgutil.iter_modules(nsa.kernels.__path__):
        if info.name == "report":
            continue
        module = importlib.import_module(f"nsa.kernels.{info.name}")
        if hasattr(module, "specimens"):
            yield from module.specimens(sm)


def compile_for(specimen: Specimen, sm: int) -> Any:
    """The compiled kernel. Raises what Triton raises."""
    import triton
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": specimen.num_warps, "num_stages": specimen.num_stages}
    return triton.compile(_source(specimen), target=GPUTarget("cuda", sm, 32), options=options)


def _source(specimen: Specimen) -> Any:
    """The kernel specialised as a launch would be; Triton 3.2 changed how that is written down."""
    import triton
    from triton.compiler import ASTSource

    kernel, names = specimen.kernel, list(specimen.kernel.arg_names)
    types = {name: kind.partition(":")[0] for name, kind in specimen.signature.items()}
    ones = [name for name, kind in specimen.signature.items() if kind.endswith(":1")]
    aligned = [name for name, kind in specimen.signature.items() if kind.endswith(":16")]
    constants = {**specimen.constants, **dict.fromkeys(ones, 1)}
    unknown = set(names) ^ (set(types) | set(specimen.constants))
    if unknown:
        raise ValueError(f"{specimen.name}: signature and kernel differ in {', '.join(sorted(unknown))}")
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 2):
        from triton.compiler.compiler import AttrsDescriptor

        attributes = AttrsDescriptor(
            divisible_by_16={names.index(n) for n in aligned}, equal_to_1={names.index(n) for n in ones}
        )
        return ASTSource(kernel, {n: types[n] for n in names if n in types}, constants, attributes)
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    return ASTSource(kernel, signature, constants, {(names.index(n),): [["tt.divisibility", 16]] for n in aligned})


def measure(specimen: Specimen, sm: int) -> dict[str, Any]:
    """One row of the table. An entry that the compiler refuses is a row whose verdict says so."""
    from triton.compiler.errors import CompilationError

    row: dict[str, Any] = {"kernel": specimen.name, "arch": f"sm_{sm}"}
    try:
        compiled = compile_for(specimen, sm)
    except (CompilationError, RuntimeError) as error:
        return {**row, "verdict": f"does not compile: {str(error).strip().splitlines()[-1]}"}
    registers, spills = _resources(compiled.asm["ptx"], compiled.asm["cubin"])
    copies = compiled.asm["ptx"].count("cp.async.cg") + compiled.asm["ptx"].count("cp.async.ca")
    row |= {
        **{"shared": compiled.metadata.shared, "limit": SHARED_LIMITS[sm], "registers": registers, "spills": spills},
        **{"cp_async": copies, "warps": specimen.num_warps, "stages": specimen.num_stages},
    }
    held = -(-registers // 8) * 8 * 32 * specimen.num_warps
    complaints = []
    if row["shared"] > row["limit"]:
        complaints.append("shared memory above the limit")
    if held > REGISTER_FILE:
        complaints.append("registers above the file")
    if specimen.async_copies and not copies:
        complaints.append("loads are not pipelined")
    return {**row, "verdict": ", ".join(complaints) or "fits"}


def _resources(ptx: str, cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes that it spills. The cubin knows registers; only the assembler tells spills."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    target = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
    assert target
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "k.ptx"), Path(folder, "k.cubin")
        source.write_text(ptx)
        binary.write_bytes(cubin)
        assembler = [str(tools / "ptxas"), "-v", f"--gpu-name={target[1]}", str(source), "-o", f"{folder}/out"]
        said = subprocess.run(assembler, capture_output=True, text=True, check=True).stderr
        dump = [str(tools / "cuobjdump"), "--dump-resource-usage", str(binary)]
        usage = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    registers = max(int(found) for found in re.findall(r"REG:(\d+)", usage))
    return registers, sum(int(found) for found in re.findall(r"(\d+) bytes spill stores", said))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows under their column names, aligned."""
    cells = [list(COLUMNS), *([str(row.get(name, "-")) for name in COLUMNS] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m nsa.kernels.report", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the rows there, for the report")
    parser.add_argument("--match", default="", help="only kernels whose name contains this")
    options = parser.parse_args(arguments)
    try:
        import triton
    except ImportError:
        print("no Triton here: pip install --no-deps triton compiles for a GPU without having one", file=sys.stderr)
        return 2
    rows = [measure(s, sm) for sm in SHARED_LIMITS for s in specimens(sm) if options.match in s.name]
    for row in rows:
        row["triton"] = triton.__version__
    print(table(rows))
    bad = sum(row["verdict"] != "fits" for row in rows)
    print(f"Triton {triton.__version__}: {len(rows)} compiled entries, {bad} that do not fit")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"kernels": rows}, indent=1) + "\n")
    return 1 if bad or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
