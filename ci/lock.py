"""Hashed locks of the images, made from the pinned inputs: `nox -s lock`; and whether they have drifted, offline.

A lock is for Python 3.11 on Linux x86-64, holds wheels only, and names no index. The CPU lock leaves torch and its CUDA
packages out: a hashed torch would make pip pass over a CPU build of the same version, so images install
`torch==VERSION` first, without dependencies, and the lock brings what torch needs on a CPU.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from ci.outcome import CONFIGURATION, INFRASTRUCTURE, READY
from ci.pins import PinError, resolve

ROOT = Path(__file__).resolve().parent.parent
PYTHON = "3.11"
PLATFORM = "x86_64-manylinux_2_28"
ENVIRONMENT = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.0", "extra": ""}
PIN = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)", re.MULTILINE)
HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")
REMEDY = "run: nox -s lock"


@dataclass(frozen=True)
class Lock:
    """A lock and its inputs, by path from the root; `without`: packages left out of it."""

    path: str
    inputs: str
    without: str = ""

    def leaves_out(self, name: str) -> bool:
        """Is the package (canonical name) installed by other means?"""
        return bool(self.without) and re.fullmatch(self.without, name) is not None


LOCKS = (
    Lock("docker/lock-cpu.txt", "requirements-cpu.txt", without="torch|nvidia-.*|cuda-.*"),
    Lock("docker/lock-gpu.txt", "requirements-gpu-cu121-torch24.txt"),
)


class LockError(Exception):
    """A lock cannot be made; the text is one line with the reason. `code` is the exit code."""

    def __init__(self, reason: str, code: int) -> None:
        super().__init__(reason)
        self.code = code


def pins(text: str) -> dict[str, str]:
    """Canonical name to version of every pin in a lock."""
    return {canonicalize_name(name): version for name, version in PIN.findall(text)}


def blocks(body: str) -> Iterator[tuple[str, str]]:
    """Canonical name and text of each pin, with its hashes and its `# via` line."""
    starts = [match.start() for match in PIN.finditer(body)]
    for start, end in zip(starts, [*starts[1:], len(body)], strict=True):
        block = body[start:end]
        yield canonicalize_name(block.split("==")[0]), block


def pinned(path: Path) -> dict[str, str]:
    """Canonical name to version of the input's exact pins that apply where the lock does."""
    found: dict[str, str] = {}
    for wanted in _requirements(path):
        exact = [each.version for each in wanted.specifier if each.operator == "=="]
        found |= {canonicalize_name(wanted.name): version for version in exact}
    return found


def drift(root: Path) -> list[str]:
    """Why the locks are not those of the inputs, a line each; needs no network. Nothing without a docker/ folder."""
    if not (root / "docker").is_dir():
        return []
    try:
        return [f"{lock.path}: {reason}; {REMEDY}" for lock in LOCKS for reason in _drift(root, lock)]
    except LockError as error:
        return [str(error)]


def write(root: Path, *, upgrade: bool = False) -> list[str]:
    """Makes both locks; a line each on what changed. Pins that still fit stay unless `upgrade`. Raises LockError."""
    made = {lock: _compile(root, lock, upgrade) for lock in LOCKS}
    said = []
    for lock, body in made.items():
        path = root / lock.path
        before = path.read_text() if path.is_file() else ""
        path.parent.mkdir(exist_ok=True)
        path.write_text(_header(lock, root, body) + body)
        said.append(f"{lock.path}: {len(pins(body))} packages, {_difference(pins(before), pins(body))}")
    return said


def _drift(root: Path, lock: Lock) -> Iterator[str]:
    for name in (lock.path, lock.inputs):
        if not (root / name).is_file():
            yield f"{name} is missing"
            return
    text = (root / lock.path).read_text()
    body = _body(text)
    if f"# inputs sha256:{_inputs_digest(root / lock.inputs)}\n" not in text:
        yield f"not made from this {lock.inputs}"
    if f"# pins sha256:{_digest(body)}\n" not in text:
        yield "edited by hand"
    have = pins(body)
    for wanted in _requirements(root / lock.inputs):
        name = canonicalize_name(wanted.name)
        if lock.leaves_out(name):
            continue
        if name not in have or not wanted.specifier.contains(have[name], prereleases=True):
            yield f"has {name} {have.get(name, 'not at all')}, {lock.inputs} wants {wanted.specifier}"
    yield from (f"{name} has no hash" for name, block in blocks(body) if not HASH.search(block))


def _requirements(path: Path) -> Iterator[Requirement]:
    """The input's requirements that apply where the lock does."""
    environment = {**default_environment(), **ENVIRONMENT, "sys_platform": "linux", "platform_system": "Linux"}
    for line in _significant(path):
        try:
            wanted = Requirement(line)
        except InvalidRequirement as error:
            raise LockError(f"{path.name}: not a requirement: {line}", CONFIGURATION) from error
        if wanted.marker is None or wanted.marker.evaluate({key: str(value) for key, value in environment.items()}):
            yield wanted


def _significant(path: Path) -> list[str]:
    """The lines without comments: what an edit of a comment leaves as it was."""
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]


def _inputs_digest(path: Path) -> str:
    return _digest("\n".join(_significant(path)))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _header(lock: Lock, root: Path, body: str) -> str:
    torch = "torch" in pins(body)
    scope = f"Python {PYTHON}, Linux x86-64, wheels only; " + ("torch included" if torch else "install torch first")
    return (
        f"# Made by `nox -s lock` from {lock.inputs}; do not edit. {scope}.\n"
        f"# inputs sha256:{_inputs_digest(root / lock.inputs)}\n"
        f"# pins sha256:{_digest(body)}\n"
    )


def _body(text: str) -> str:
    lines = text.splitlines(keepends=True)
    first = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return "".join(lines[first:])


def _compile(root: Path, lock: Lock, upgrade: bool) -> str:
    uv = shutil.which("uv")
    if not uv:
        remedy = "nox -s lock brings it, or: pip install -r requirements-lock.txt"
        raise LockError(f"uv is not installed; {remedy}", CONFIGURATION)
    with tempfile.TemporaryDirectory(prefix="nsa-lock-") as scratch:
        output = Path(scratch) / "lock.txt"
        if (root / lock.path).is_file() and not upgrade:
            output.write_text((root / lock.path).read_text())
        options = ["--python-version", PYTHON, "--python-platform", PLATFORM, "--generate-hashes"]
        options += ["--only-binary", ":all:", "--no-header", "--annotation-style", "line", "--no-progress"]
        command = [uv, "pip", "compile", lock.inputs, *options, "-o", str(output)]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
        if done.returncode:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            unreachable = any("error sending request" in line or "Failed to fetch" in line for line in lines)
            reason = " ".join(lines)[:400] or f"exit code {done.returncode}"
            raise LockError(f"{lock.inputs}: {reason}", INFRASTRUCTURE if unreachable else CONFIGURATION)
        return "".join(block for name, block in blocks(output.read_text()) if not lock.leaves_out(name))


def _difference(before: dict[str, str], after: dict[str, str]) -> str:
    new = [f"+{name} {after[name]}" for name in sorted(after.keys() - before.keys())]
    gone = [f"-{name}" for name in sorted(before.keys() - after.keys())]
    common = sorted(before.keys() & after.keys())
    moved = [f"{name} {before[name]} -> {after[name]}" for name in common if before[name] != after[name]]
    changes = [*moved, *new, *gone] if before else []
    return ", ".join(changes) if changes else ("unchanged" if before else "new")


def main(arguments: list[str] | None = None) -> int:
    """`nox -s lock`: writes the locks and records the images' pins; with --check it only says whether the locks fit."""
    options = argparse.ArgumentParser(prog="nox -s lock --", description=(__doc__ or "").split("\n\n")[0])
    options.add_argument("--check", action="store_true", help="only say whether the locks fit their inputs; 78 if not")
    options.add_argument("--upgrade", action="store_true", help="also renew what the inputs leave free, and the bases")
    options.add_argument("--no-pins", action="store_true", help="leave docker/pins.toml alone: no registry is asked")
    args = options.parse_args(arguments)
    unresolved: list[str] = []
    try:
        lines = [] if args.check else write(ROOT, upgrade=args.upgrade)
        problems = drift(ROOT)
        if not (args.check or args.no_pins):
            found, unresolved = resolve(ROOT, upgrade=args.upgrade)
            lines += found
    except (LockError, PinError) as error:
        print(f"lock: {error}", file=sys.stderr)
        return getattr(error, "code", CONFIGURATION)
    for line in lines or ["both locks fit their inputs"] * (not problems):
        print(line)
    for line in [*problems, *unresolved]:
        print(f"lock: {line}", file=sys.stderr)
    if problems:
        return CONFIGURATION
    return INFRASTRUCTURE if unresolved else READY


if __name__ == "__main__":
    sys.exit(main())
