"""What this machine and this tree are: env.json. Names no user, host, absolute path or secret."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement

from ci import container, lock, nvidia

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "flash-attn",
    "transformers",
    "datasets",
    "tokenizers",
    "pytest",
    "pytest-xdist",
    "nox",
)
REQUIREMENTS = ("requirements-cpu.txt", "requirements-gpu-cu121-torch24.txt")
PROBES = Path(__file__).with_name("probes")


def gather(root: Path, *, offline: bool = False) -> dict[str, Any]:
    """Every fact that a need, a check or the report asks for."""
    gpus, problem = nvidia.query()
    inside = container.facts()
    image = inside.get("image", {})
    return {
        **inside,
        "git_sha": git(root, "rev-parse", "HEAD") or image.get("revision") or os.environ.get("NSA_CI_SHA", "unknown"),
        "dirty": dirty(root) or bool(image.get("dirty")),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_mb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
        "disk_free_mb": shutil.disk_usage(root).free >> 20,
        "shm_mb": shutil.disk_usage("/dev/shm").total >> 20 if Path("/dev/shm").is_dir() else 0,
        "versions": {name: version for name in PACKAGES if (version := installed(name))},
        "triton_required": required_by_torch("triton"),
        "requirements": {name: _sha256(root / name) for name in REQUIREMENTS if (root / name).is_file()},
        "drift": drift(root / "requirements-cpu.txt"),
        "lock_drift": lock.drift(root),
        "gpus": [vars(gpu) for gpu in gpus],
        "nvidia_problem": problem,
        "nvidia_traces": nvidia.traces(),
        "cuda_hidden": os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"),
        "torch": probe("machine.py"),
        "network": not offline and reachable("huggingface.co"),
    }


def installed(name: str) -> str | None:
    """A package's version from its metadata, without importing it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def required_by_torch(name: str) -> str | None:
    """The version specifier with which the installed torch requires a package on this machine; None if it does not."""
    try:
        lines = metadata.requires("torch") or []
    except metadata.PackageNotFoundError:
        return None
    return next((str(r.specifier) for r in map(Requirement, lines) if r.name == name and _applies(r)), None)


def drift(requirements: Path) -> list[str]:
    """Pinned packages that are installed in another version, as `numpy 2.0.0, pinned ==1.26.4`."""
    if not requirements.is_file():
        return []
    found = []
    for line in requirements.read_text().splitlines():
        try:
            pin = Requirement(line.split("#")[0].strip())
        except InvalidRequirement:
            continue  # a comment or an empty line
        have = installed(pin.name)
        if have and _applies(pin) and not pin.specifier.contains(have, prereleases=True):
            found.append(f"{pin.name} {have}, pinned {pin.specifier}")
    return found


def probe(script: str, *arguments: str) -> dict[str, Any]:
    """Runs ci/probes/`script` with this interpreter and returns its JSON; `error` if it gave none."""
    try:
        done = subprocess.run(
            [sys.executable, str(PROBES / script), *arguments], capture_output=True, text=True, timeout=300
        )
    except subprocess.TimeoutExpired:
        return {"error": f"{script} did not answer within 300 s"}
    lines = done.stdout.strip().splitlines()
    try:
        return dict(json.loads(lines[-1]))
    except (IndexError, json.JSONDecodeError):
        said = done.stderr.strip().splitlines()[-1:] or ["no output"]
        return {"error": f"{script} exits {done.returncode}: {said[0][:300]}"}


def reachable(host: str) -> bool:
    """Can a TCP connection to the host be opened within five seconds?"""
    try:
        with socket.create_connection((host, 443), timeout=5):
            return True
    except OSError:
        return False


def _applies(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def git(root: Path, *arguments: str) -> str:
    """What git says in the tree; empty if it fails or is absent."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def dirty(root: Path) -> bool:
    """Does the tree hold what the commit does not: an edit, or a new file that Python, pytest or nox would obey?"""
    obeyed = ("*.py", "*.pth", "*.toml", "*.ini", "*.cfg")
    edited = git(root, "status", "--porcelain", "--untracked-files=no")
    return bool(edited or git(root, "ls-files", "--others", "--exclude-standard", "--", *obeyed))


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    models = (line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name"))
    return next(models, platform.machine())


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
