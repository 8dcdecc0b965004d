"""What ci/nox does once it has a Python: a .venv that holds the requirements, nox in it, and this run's exit code.

Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parent.parent
SCRATCH = ROOT / ".nox"
CONFIGURATION = 78
HEARTBEAT_S = 30.0
TAIL_LINES = 15
# Sessions that end in an exit.json: without one the session broke off, and that is a failure whatever nox returns.
JUDGED = (
    "readiness",
    "preflight",
    "cpu_correctness",
    "gpu_parity",
    "long_context",
    "train_readiness",
    "bench",
    "report",
    "image",
    "repro",
)


class LaunchError(Exception):
    """The environment cannot be made; the text names what is missing and the remedy."""


def main(arguments: list[str]) -> int:
    """Prepares the environment, runs nox, and returns the code of this run's exit.json, or nox's own."""
    requirements = ROOT / os.environ.get("NSA_CI_REQUIREMENTS", "requirements-cpu.txt")
    try:
        python = prepare(ROOT / ".venv", requirements)
    except LaunchError as error:
        print(f"ci/nox: {error}", file=sys.stderr)
        return CONFIGURATION
    exit_json = Path(os.environ.get("NSA_CI_ROOT", ROOT)) / "artifacts/exit.json"
    exit_json.unlink(missing_ok=True)
    code = run_nox(python, arguments)
    if exit_json.is_file():
        return int(json.loads(exit_json.read_text())["code"]) or code
    return code or int(judged(arguments))


def judged(arguments: list[str]) -> bool:
    """Does this call of nox run a session that must leave an exit.json?"""
    if {"-l", "--list", "-h", "--help", "--version"} & set(arguments):
        return False
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    named = any(argument in ("-s", "--session", "--sessions", "-e") for argument in own)
    return any(argument in JUDGED for argument in own) if named else True


def prepare(venv: Path, requirements: Path) -> Path:
    """A virtual environment holding `requirements`; made, repaired or brought up to date only where needed.

    The stamp is written last, so an interrupted installation is taken up again. Raises LaunchError.
    """
    if not requirements.is_file():
        raise LaunchError(f"no {requirements.name} here; NSA_CI_REQUIREMENTS names a file that is missing")
    python, stamp = venv / "bin/python", venv / ".requirements"
    want = f"{hashlib.sha256(requirements.read_bytes()).hexdigest()} {sys.version_info[0]}.{sys.version_info[1]}"
    SCRATCH.mkdir(exist_ok=True)
    with (SCRATCH / "launch.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two sessions started together must not install into one folder
        if stamp.is_file() and stamp.read_text() == want and _works(python):
            return python
        if not _works(python):
            _step(f"making .venv with Python {sys.version_info[0]}.{sys.version_info[1]}", _venv_command(venv))
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--no-input", "--no-compile", "-q"]
        _step(f"installing {requirements.name} (once, a few minutes)", [*pip, "-r", str(requirements)])
        stamp.write_text(want)
    return python


def run_nox(python: Path, arguments: list[str]) -> int:
    """nox in a process group of its own; SIGTERM and SIGINT are handed to all of it, and its end is waited for."""
    environment = {**os.environ, "PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}
    environment.pop("PYTHONHOME", None)
    command = [str(python), "-m", "nox", "-f", str(ROOT / "noxfile.py"), *arguments]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)

    def forward(signum: int, _frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signum)

    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, forward)
    code = process.wait()
    _wait_for_group(process.pid)
    return 128 - code if code < 0 else code


def _wait_for_group(group: int) -> None:
    # nox dies of SIGTERM at once; the harness under it first ends its step and writes exit.json.
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)


def _works(python: Path) -> bool:
    if not python.is_file():
        return False
    command = [str(python), "-c", "import sys, pip; print(*sys.version_info[:2], sep='.')"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() == f"{sys.version_info[0]}.{sys.version_info[1]}"


def _venv_command(venv: Path) -> list[str]:
    if importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip"):
        return [sys.executable, "-m", "venv", "--clear", str(venv)]
    if importlib.util.find_spec("virtualenv"):
        return [sys.executable, "-m", "virtualenv", "-q", "--clear", str(venv)]
    name = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    raise LaunchError(
        f"{name} has no venv module; install it (Debian, Ubuntu: apt install {name}-venv), "
        "or set NSA_CI_PYTHON to another Python"
    )


def _step(title: str, command: list[str]) -> None:
    """Runs one step quietly: a line at its start, one every half minute, its last lines only if it fails."""
    print(f"ci/nox: {title}", file=sys.stderr, flush=True)
    log = SCRATCH / "install.log"
    started, beat = time.monotonic(), HEARTBEAT_S
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                time.sleep(0.1)
                if time.monotonic() - started > beat:
                    print(f"ci/nox:   {beat:.0f} s", file=sys.stderr, flush=True)
                    beat += HEARTBEAT_S
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode:
        for line in log.read_text(errors="replace").splitlines()[-TAIL_LINES:]:
            print(f"    {line}", file=sys.stderr)
        raise LaunchError(f"failed with exit code {process.returncode}: {title}; start it again to go on")
    log.unlink()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
