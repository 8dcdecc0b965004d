"""The CPU-safe tests on the GPU lane's torch and Triton, really installed: `nox -s tests_pinned`, and what it leaves.

    artifacts/pinned/tests.xml     pytest's record
    artifacts/pinned/result.json   versions, counts, why tests were skipped, exit code

A run that passed nothing, or skipped for a reason other than a GPU that is absent by intent, is a failure: 3.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from junitparser import Error, Failure, JUnitXml, JUnitXmlError

from ci import lock
from ci.facts import installed
from ci.outcome import CONFIGURATION, CONTRACT, READY, TEST_FAILED, leave_exit

ROOT = lock.ROOT
GPU_LOCK = lock.LOCKS[1]
NAMED = ("torch", "triton", "numpy", "transformers", "datasets")
# What a machine without a GPU, or torch 2.4 itself, cannot run; any other reason means that a test was lost.
ALLOWED = (
    r"\bneeds CUDA\b",
    r"\bneeds (two|2) GPUs\b",
    r"\bflash-attn\b",
    r"torch 2\.4\.\d\S* has no shape function for aten::",
)


def unmet(root: Path) -> list[str]:
    """The GPU lane's named packages that are not installed as pinned, as `torch 2.13.0, pinned 2.4.1`."""
    wanted = lock.pinned(root / GPU_LOCK.inputs)
    have = {name: (installed(name) or "absent").split("+")[0] for name in NAMED}
    return [f"{name} {have[name]}, pinned {wanted[name]}" for name in NAMED if have[name] != wanted[name]]


def judge(junit: Path, code: int) -> tuple[dict[str, Any], int]:
    """Counts and exit code of a run from its JUnit file and pytest's own code."""
    try:
        cases = [case for suite in JUnitXml.fromfile(str(junit)) for case in suite]
    except (OSError, JUnitXmlError, SyntaxError) as error:
        return {"problem": f"no readable JUnit file ({error})"}, code or CONTRACT
    broken = [case for case in cases if any(isinstance(r, (Error, Failure)) for r in case.result)]
    reasons = Counter(r.message or "" for case in cases if case not in broken for r in case.result)
    failed = [f"{case.classname}::{case.name}" for case in broken]
    counts = {"passed": len(cases) - len(failed) - sum(reasons.values()), "failed": len(failed)}
    strange = [reason for reason in reasons if not any(re.search(allowed, reason) for allowed in ALLOWED)]
    found = {**counts, "skipped": sum(reasons.values()), "reasons": dict(reasons.most_common()), "failures": failed}
    if failed or code:
        return found, code or TEST_FAILED
    if strange or not counts["passed"]:
        return found | {"problem": f"skipped: {strange[0]}" if strange else "nothing passed"}, CONTRACT
    return found, READY


def run(root: Path, out: Path, options: list[str]) -> int:
    """Runs pytest with this interpreter and records the result; prints the closing line."""
    out.mkdir(parents=True, exist_ok=True)
    junit = out / "tests.xml"
    junit.unlink(missing_ok=True)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={junit}", *options]
    code = subprocess.run(command, cwd=root, env=environment).returncode
    found, verdict = judge(junit, code)
    versions = {name: installed(name) for name in NAMED} | {"python": sys.version.split()[0]}
    record = {"versions": versions, "wall_s": round(time.monotonic() - started, 1), "exit_code": verdict, **found}
    record["arguments"] = options
    (out / "result.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    counts = ", ".join(f"{found[name]} {name}" for name in ("passed", "failed", "skipped") if name in found)
    print(f"pinned: torch {versions['torch']}, Triton {versions['triton']}: {counts or 'nothing counted'}")
    if "problem" in found:
        print(f"pinned: {found['problem']}", file=sys.stderr)
    return verdict


def main(arguments: list[str] | None = None) -> int:
    """`nox -s tests_pinned`: 78 unless the GPU lane's versions are installed, else what `judge` says."""
    options = argparse.ArgumentParser(prog="nox -s tests_pinned --", description=(__doc__ or "").split("\n\n")[0])
    options.add_argument("pytest", nargs="*", default=["nsa/tests"], help="pytest's arguments (nsa/tests)")
    args, more = options.parse_known_args(arguments)
    if problems := unmet(ROOT):
        print(f"pinned: {'; '.join(problems)}: run nox -s tests_pinned, which installs them", file=sys.stderr)
        return leave_exit(ROOT, "tests_pinned", CONFIGURATION)
    return leave_exit(ROOT, "tests_pinned", run(ROOT, ROOT / "artifacts/pinned", [*args.pytest, *more]))


if __name__ == "__main__":
    sys.exit(main())
