"""Runs one step's command in a process group of its own and records what happened, without judging it."""

from __future__ import annotations

import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from ci import outcome
from ci.contract import digest, local
from ci.outcome import FileRecord, StepRecord
from ci.redact import Redactor, secrets_in
from ci.runbook import Step

HEARTBEAT_S = 60.0
GRACE_S = 20.0  # a training run told to stop writes its checkpoint first
TAIL_LINES = 20
CGROUP_EVENTS = Path("/sys/fs/cgroup/memory.events")


@dataclass(frozen=True)
class Context:
    """Where and as what a step runs. `root` is the repository, `artifacts` its artifacts folder."""

    root: Path
    profile: str
    git_sha: str
    run_id: str
    posargs: list[str] = field(default_factory=list)
    say: Callable[[str], None] = print
    offline: bool = False

    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"


class Stopped(BaseException):
    """The harness was told to end: SIGTERM (143) or SIGINT (130). Not an Exception, so nothing swallows it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.code = 128 + signum


@contextmanager
def stoppable() -> Iterator[None]:
    """Turns SIGTERM and SIGINT into Stopped for the block, so that a running step is ended before the harness is."""

    def stop(signum: int, _frame: object) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(signum)

    before = {each: signal.signal(each, stop) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def skip(step: Step, context: Context, note: str) -> StepRecord:
    """Records that the command was not started, and why. Its text outputs of an earlier run are removed."""
    _clear(step, context)
    record = _record(step, context, _clock(context.artifacts), note=note)
    outcome.save(record, context.artifacts / "results" / f"{step.key}.json")
    return record


def run(step: Step, context: Context) -> StepRecord:
    """Runs the command to its end or its timeout, and writes artifacts/results/<stage>.<step>.json.

    A step past its timeout gets SIGTERM, then SIGKILL, and the code 124. Stopped passes through once the group is gone.
    """
    _clear(step, context)
    logs = context.artifacts / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    out = local(context.artifacts, step.output) if step.output else logs / f"{step.key}.out"
    err = logs / f"{step.key}.err"
    out.parent.mkdir(parents=True, exist_ok=True)
    added = environment(step, context)
    kills = _oom_kills()
    started, clock = _clock(context.artifacts), time.monotonic()
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(
            ["bash", "-o", "pipefail", "-c", step.command],
            cwd=context.root,
            env={**_inherited(), **added},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.STDOUT if step.kind == "pytest" else stderr,
            start_new_session=True,
        )
        try:
            code, used, timed_out = _wait(process, step, context, clock, err if step.kind == "script" else out)
        finally:
            _end_group(process)
    wall = time.monotonic() - clock
    Redactor(secrets_in(os.environ)).mask_written(context.artifacts, started)
    record = _record(
        step,
        context,
        started,
        wall_s=round(wall, 3),
        exit_code=outcome.TIMED_OUT if timed_out else code,
        timed_out=timed_out,
        oom_killed=_oom_kills() > kills,
        peak_mb=round(used.ru_maxrss / 1024, 1),
        cpu_s=round(used.ru_utime + used.ru_stime, 1),
        tail=_tail(context.root, _redirected(step, context), out, err),
        files=_files(step, context),
        env={name: value for name, value in added.items() if name != "PATH"},  # a bundle holds no machine's paths
        arguments=list(context.posargs) if step.kind == "pytest" else [],
    )
    for log in (err, logs / f"{step.key}.out"):
        if log.is_file() and not log.stat().st_size:
            log.unlink()
    outcome.save(record, context.artifacts / "results" / f"{step.key}.json")
    return record


def environment(step: Step, context: Context) -> dict[str, str]:
    """What a step's command gets on top of the caller's environment."""
    added = {"PYTHONHASHSEED": "0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "PYTHONUNBUFFERED": "1", "COLUMNS": "120"}
    added["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    # Threads that spin while they wait starve each other where cores are shared (virtual machines, busy runners): on
    # two cores under a load of 7 the showcase trained ten times slower so.
    added["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")
    if context.offline:
        added |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    if step.kind == "pytest":
        junit = Path("artifacts/junit") / f"{step.key}.xml"
        options = [f"--junitxml={junit}", "-o", f"junit_suite_name={step.key}", "-o", "junit_family=xunit2"]
        options += ["-p", "no:cacheprovider"]
        workers = min(os.cpu_count() or 1, 8)
        if step.xdist and workers > 1:
            options += ["-n", str(workers)]
            added.setdefault("OMP_NUM_THREADS", "1")  # one thread a worker, or the workers fight over the cores
        added["PYTEST_ADDOPTS"] = shlex.join([*options, *context.posargs])
    return {**added, **step.env}


def foreign_flags() -> list[str]:
    """NSA_* variables of the caller, which are not handed on: a verdict must not depend on the caller's shell."""
    return sorted(name for name in os.environ if name.startswith("NSA_") and not name.startswith("NSA_CI_"))


def _inherited() -> dict[str, str]:
    # PYTHONOPTIMIZE would take the assertions out of every helper that a test calls.
    dropped = {*foreign_flags(), "PYTEST_ADDOPTS", "PYTEST_PLUGINS", "PYTHONOPTIMIZE", "CONFIG"}
    return {name: value for name, value in os.environ.items() if name not in dropped}


def _wait(
    process: subprocess.Popen[bytes], step: Step, context: Context, clock: float, log: Path
) -> tuple[int, resource.struct_rusage, bool]:
    """(exit code as a shell gives it, resources used by it and its children, timed out)."""
    beat = clock + HEARTBEAT_S
    timed_out = False
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            process.returncode = code  # reaped here for its resource usage; Popen must not wait for it again
            _erase_progress()
            return (128 - code if code < 0 else code), usage, timed_out
        now = time.monotonic()
        if not timed_out and now - clock > step.timeout:
            timed_out = True
            _end_group(process, reap=False)
        if now > beat:
            beat += HEARTBEAT_S
            context.say(f"    {step.id}: {now - clock:.0f} s of at most {step.timeout:.0f} s")
        _show_progress(step, now - clock, log)
        time.sleep(0.1)


def _end_group(process: subprocess.Popen[bytes], *, reap: bool = True) -> None:
    """Ends whatever is left of the step's process group: SIGTERM, a grace period, SIGKILL."""
    if process.returncode is None:
        _signal(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        while (
            time.monotonic() < deadline
            and os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        ):
            time.sleep(0.1)
    _signal(process.pid, signal.SIGKILL)
    if reap and process.returncode is None:
        process.wait()


def _signal(group: int, signum: int) -> None:
    try:
        os.killpg(group, signum)
    except (ProcessLookupError, PermissionError):
        return  # nobody is left in the group


def _clear(step: Step, context: Context) -> None:
    """Removes what the step is about to write; a file under `keep` is moved aside by the command itself."""
    for path in [
        *(local(context.artifacts, item.path) for item in step.deliverables if not item.keep),
        context.artifacts / "results" / f"{step.key}.json",
        context.artifacts / "junit" / f"{step.key}.xml",
        context.artifacts / "logs" / f"{step.key}.out",
        context.artifacts / "logs" / f"{step.key}.err",
    ]:
        path.unlink(missing_ok=True)


def _clock(artifacts: Path) -> float:
    """Now, on the clock that stamps the deliverables: a network file system's may differ from this machine's."""
    marker = artifacts / "results" / ".clock"
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.write_bytes(b"")
    os.utime(marker)
    now = marker.stat().st_mtime
    marker.unlink()
    return now


def _record(step: Step, context: Context, started: float, **facts: object) -> StepRecord:
    shared = {"profile": context.profile, "git_sha": context.git_sha, "run_id": context.run_id}
    return StepRecord(step.id, step.stage, step.command, step.kind, started=started, **shared, **facts)  # type: ignore[arg-type]


def _files(step: Step, context: Context) -> list[FileRecord]:
    found = []
    for item in step.deliverables:
        path = local(context.artifacts, item.path)
        if path.is_file():
            stat = path.stat()
            found.append(FileRecord(item.path, stat.st_size, stat.st_mtime, digest(path)))
    return found


def _redirected(step: Step, context: Context) -> Path | None:
    """The text file that a script's command redirects its stdout to."""
    names = [item.path for item in step.deliverables if item.path.endswith(".txt") and item.path != step.output]
    return local(context.artifacts, names[0]) if names else None


def _tail(root: Path, *paths: Path | None) -> list[str]:
    lines: list[str] = []
    for path in paths:
        if path and path.is_file():
            lines += path.read_text(errors="replace").replace("\r", "\n").rstrip().splitlines()[-TAIL_LINES:]
    return [line.replace(f"{root}/", "") for line in lines]


def _oom_kills() -> int:
    try:
        text = CGROUP_EVENTS.read_text()
    except OSError:
        return 0  # cgroup v1 or none: no record of an out-of-memory kill can be had, and none is claimed
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill ")), 0)


def _show_progress(step: Step, elapsed: float, log: Path) -> None:
    if not sys.stderr.isatty():
        return
    last = _last_line(log)
    text = f"    {step.id} {int(elapsed) // 60}:{int(elapsed) % 60:02d}  {last}"
    sys.stderr.write(f"\r\x1b[K{text[: os.get_terminal_size(sys.stderr.fileno()).columns - 1]}")
    sys.stderr.flush()


def _erase_progress() -> None:
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


def _last_line(path: Path) -> str:
    if not path.is_file():
        return ""
    file: IO[bytes]
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 400))
        lines = file.read().decode(errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
