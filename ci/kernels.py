"""The Triton kernels under another Triton than the installed one, without a GPU: `python -m ci.kernels [VERSION ...]`.

Their numbers in Triton's interpreter against the reference, then every launch compiled for three cards, each in
processes that have that Triton first on their path. Without a version: the one that the GPU lane pins. The installed
Triton is proven by the tests and by stage 2. Exit codes: 0 proven; 1 a test failed or a launch does not fit; 2 usage;
3 a test was skipped or another Triton answered; 78 the version cannot be had.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from ci import facts, junit, outcome

ROOT = Path(__file__).resolve().parent.parent
LANE = "requirements-gpu-cu121-torch24.txt"
# Every test of a kernel's numbers; of compiling the report does more.
COMPILING = "test_kernels_compile.py"
NUMPY_1 = (3, 2)  # below it the interpreter reads NumPy 1's arrays
LAST_LINES = 15


def main(versions: list[str]) -> int:
    """The first code that is not 0, or 0."""
    versions = versions or [pinned("triton")]
    if bad := [version for version in versions if not re.fullmatch(r"\d+\.\d+\.\d+", version)]:
        print(f"kernels: {bad[0]!r} is no version of Triton; give one as 3.0.0", file=sys.stderr)
        return outcome.USAGE
    codes = [code for version in versions if (code := prove(version, ROOT / "dist"))]
    return codes[0] if codes else outcome.READY


def pinned(name: str) -> str:
    """The version of a package that the GPU lane pins."""
    found = re.search(rf"(?m)^{name}==([\w.]+)", (ROOT / LANE).read_text())
    assert found, f"{LANE} pins no {name}"
    return found[1]


def prove(version: str, out: Path) -> int:
    """Numbers, then resources, of one version; the records lie in `out` as kernels-triton-VERSION.{xml,txt,json}."""
    if not (folder := provide(version)):
        return outcome.CONFIGURATION
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    for name in ("TRITON_INTERPRET", "PYTEST_ADDOPTS"):
        environment.pop(name, None)
    out.mkdir(exist_ok=True)
    stem = out / f"kernels-triton-{version}"
    for suffix in (".xml", ".txt", ".json"):
        stem.with_name(stem.name + suffix).unlink(missing_ok=True)
    return numbers(version, environment, stem) or resources(version, environment, stem)


def provide(version: str) -> Path | None:
    """The folder that holds this Triton, fetched on first use; None, with the reason on stderr, if it cannot be had."""
    numpy = facts.installed("numpy") or "0"
    below = tuple(int(part) for part in version.split(".")[:2]) < NUMPY_1
    if below and int(numpy.split(".")[0]) > 1:
        print(f"kernels: Triton {version} needs numpy<2, here is {numpy}: use Python 3.11", file=sys.stderr)
        return None
    folder = ROOT / ".nox" / f"triton-{version}-py{sys.version_info[0]}.{sys.version_info[1]}"
    if folder.is_dir():
        return folder
    print(f"kernels: fetching Triton {version} (once, about 200 MB)", file=sys.stderr, flush=True)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    more = ["setuptools<82"] if below else []  # imported undeclared
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-input", "-q", "--no-deps"]
    done = subprocess.run(
        [*pip, "--target", str(partial), f"triton=={version}", *more], stderr=subprocess.PIPE, text=True
    )
    if done.returncode:
        said = "\n    ".join(done.stderr.strip().splitlines()[-LAST_LINES:])
        print(f"kernels: no Triton {version} for Python {sys.version.split()[0]}:\n    {said}", file=sys.stderr)
        return None
    partial.rename(folder)
    return folder


def numbers(version: str, environment: dict[str, str], stem: Path) -> int:
    """The interpreter's tests; every one of them must run."""
    xml = stem.with_name(f"{stem.name}.xml")
    tests = [path for path in (ROOT / "nsa/tests").glob("test_kernels_*.py") if path.name != COMPILING]
    files = sorted(map(str, [*tests, ROOT / "nsa/tests/test_interpreter.py"]))
    options = ["-q", "-n", "2", "-p", "no:cacheprovider", f"--junitxml={xml}"]
    code = _run(f"Triton {version}, numbers", [sys.executable, "-m", "pytest", *options, *files], environment)
    if code:
        return outcome.TEST_FAILED
    try:
        cases = junit.read(xml)
    except junit.JUnitError as error:
        print(f"kernels: {error}", file=sys.stderr)
        return outcome.CONTRACT
    if skipped := [case for case in cases if case.state == "skipped"]:
        print(f"kernels: a skip proves nothing: {skipped[0].name}: {skipped[0].reason}", file=sys.stderr)
        return outcome.CONTRACT
    return outcome.READY if cases else outcome.CONTRACT


def resources(version: str, environment: dict[str, str], stem: Path) -> int:
    """The report of every launch, by this Triton and no other."""
    table, rows = stem.with_name(f"{stem.name}.txt"), stem.with_name(f"{stem.name}.json")
    command = [sys.executable, "-m", "nsa.kernels.report", "--json", str(rows)]
    code = _run(f"Triton {version}, resources", command, environment, table)
    lines = table.read_text().splitlines() if table.is_file() else []
    wrong = [line for line in lines[1:-1] if not line.endswith("  fits")]
    print("\n".join([*lines[:1], *wrong, *lines[-1:]] if wrong else lines[-1:]), flush=True)
    if code:
        return outcome.TEST_FAILED
    answered = json.loads(rows.read_text())["triton"]
    if answered != version:
        print(f"kernels: Triton {answered} answered, not {version}", file=sys.stderr)
        return outcome.CONTRACT
    return outcome.READY


def _run(title: str, command: list[str], environment: dict[str, str], out: Path | None = None) -> int:
    print(f"== {title}", flush=True)
    started = time.monotonic()
    if out:
        with out.open("wb") as file:
            code = subprocess.run(command, cwd=ROOT, env=environment, stdout=file).returncode
    else:
        code = subprocess.run(command, cwd=ROOT, env=environment).returncode
    print(f"== {title}: exit code {code}, {time.monotonic() - started:.0f} s", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
