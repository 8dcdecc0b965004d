"""Runs an image of this project through the Docker SDK: logs as they come, artifacts, and one exit code that is true.

create, start, follow the logs, wait, inspect, get_archive, remove: never auto_remove, which loses exit codes. Whatever
happens, the container is gone afterwards; what a killed caller left is removed by the next one (`reap`).
"""

from __future__ import annotations

import json
import os
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

import requests
from docker.client import DockerClient
from docker.errors import APIError, DockerException, ImageNotFound, NotFound
from docker.models.containers import Container
from docker.models.images import Image
from docker.types import DeviceRequest, LogConfig, Mount, Ulimit

from ci import container as inside
from ci import outcome
from ci.execute import Stopped

LANE, RUN, OWNER, DEADLINE = (f"nsa-readiness.{name}" for name in ("lane", "run", "owner", "deadline"))
ARTIFACTS = "/artifacts"
GRACE_S = 45  # the harness ends its step within 20 s of a SIGTERM, and writes exit.json
KILLED = 137
START_FAILED = (125, 126, 127)


class EngineError(Exception):
    """The image cannot be run; the text is a line with the reason and the remedy, `code` the exit code."""

    def __init__(self, text: str, code: int = outcome.INFRASTRUCTURE) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True)
class Request:
    """One container. `gpus`: "all", or ids, indices or UUIDs with commas; `network`: none | host | bridge | a name;
    `judged`: the command ends in an exit.json, which is believed only if it and the exit code agree."""

    image: str
    command: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    gpus: str = ""
    network: str = "none"
    memory: str = ""
    timeout: float = 4 * 3600
    user: str = ""
    mounts: dict[Path, str] = field(default_factory=dict)  # read-only, host path to path inside
    judged: bool = True


@dataclass(frozen=True)
class Finished:
    """`code` is the documented exit code, `said` why it is not the container's own (empty where it is)."""

    code: int
    said: str
    container_code: int | None
    oom_killed: bool
    timed_out: bool
    wall_s: float
    files: int


def connect() -> DockerClient:
    """A client of the engine that DOCKER_HOST or the current context names; EngineError if none answers."""
    try:
        return DockerClient.from_env(version="auto", timeout=120)
    except (DockerException, requests.RequestException, ValueError) as error:
        where = os.environ.get("DOCKER_HOST", "the default socket")
        remedy = "start one, or, as root on Debian: ci/engine.sh with COMMAND"
        raise EngineError(f"no Docker engine answers at {where} ({_short(error)}); {remedy}") from error


def ours(client: DockerClient, name: str) -> Image:
    """The image; EngineError if it is absent or not one of this project's."""
    try:
        image = client.images.get(name)
    except ImageNotFound as error:
        raise EngineError(f"no image {name} in this engine; nox -s image -- cpu builds one", outcome.USAGE) from error
    except (APIError, requests.RequestException) as error:
        raise EngineError(f"image {name}: {_short(error)}") from error
    if not image.labels.get(LANE):
        raise EngineError(f"image {name} is not one of this project's: it has no label {LANE}", outcome.CONFIGURATION)
    return image


def run(client: DockerClient, request: Request, artifacts: Path, say: Callable[[str], None] = print) -> Finished:
    """Runs the container to its end and copies /artifacts to the folder `artifacts`.

    Past its timeout the container gets SIGTERM, then SIGKILL (code 124). EngineError if it could not be run at all.
    """
    image = ours(client, request.image)
    for name in reap(client):
        say(f"engine: removed {name}, left by a run that was killed")
    started = time.monotonic()
    try:
        box = client.containers.create(**arguments(request, image))
    except (APIError, requests.RequestException, ValueError) as error:
        raise EngineError(f"the container cannot be created: {_short(error)}") from error
    try:
        _start(box, request)
        (artifacts / "exit.json").unlink(missing_ok=True)
        try:
            timed_out = _follow(box, request, say)
        except Stopped:
            _stop(box)
            fetch(box, ARTIFACTS, artifacts)
            raise
        state = _state(box)
        files = fetch(box, ARTIFACTS, artifacts)
        code, said = judge(state, request, timed_out, _recorded(artifacts) if request.judged else None)
        return Finished(
            code,
            said,
            state["ExitCode"],
            bool(state.get("OOMKilled")),
            timed_out,
            round(time.monotonic() - started, 1),
            files,
        )
    except (APIError, requests.RequestException) as error:
        raise EngineError(f"the engine failed under the run: {_short(error)}") from error
    finally:
        _remove(box)


def arguments(request: Request, image: Image) -> dict[str, Any]:
    """What `containers.create` is given."""
    environment = {inside.IMAGE_ID: str(image.id), **request.environment}
    if request.network == "none":
        environment["NSA_CI_OFFLINE"] = "1"
    given: dict[str, Any] = {
        "image": image.id,
        "command": request.command,
        "labels": {
            RUN: environment.get("NSA_CI_RUN_ID", "unnamed"),
            OWNER: _owner(os.getpid()),
            DEADLINE: str(int(time.time() + request.timeout + GRACE_S + 300)),
        },
        "network_mode": request.network,
        "read_only": True,
        "tmpfs": {"/tmp": "exec,mode=1777"},
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "pids_limit": 8192,
        "shm_size": "8g" if request.gpus else "1g",
        "log_config": LogConfig(type=LogConfig.types.JSON),
        "mounts": [Mount(target, str(source.resolve()), "bind", True) for source, target in request.mounts.items()],
        "detach": True,
    }
    if request.gpus:
        environment[inside.GPUS] = request.gpus
        given["device_requests"] = [_devices(request.gpus)]
        given["ulimits"] = [Ulimit(name="memlock", soft=-1, hard=-1)]  # NCCL registers its buffers
    if request.memory:
        given |= {"mem_limit": request.memory, "memswap_limit": request.memory}
    if request.user:
        given["user"] = request.user
    return {**given, "environment": environment}


def judge(state: dict[str, Any], request: Request, timed_out: bool, recorded: int | None) -> tuple[int, str]:
    """(exit code, why it is not the container's): from the engine's record, and the exit.json that the run left."""
    code = int(state["ExitCode"])
    if timed_out:
        return outcome.TIMED_OUT, f"did not end within {request.timeout:.0f} s and was stopped"
    if state.get("Error"):
        return outcome.INFRASTRUCTURE, f"engine error: {state['Error']}"
    if code and state.get("OOMKilled"):
        limit = f"its limit of {request.memory}" if request.memory else "the machine's memory"
        return outcome.INFRASTRUCTURE, f"out of memory: killed at {limit}, exit code {code}"
    if not request.judged:
        return code, ""
    if recorded is None and code in (outcome.READY, KILLED):
        how = "killed from outside" if code == KILLED else "ended with 0"
        return outcome.TEST_FAILED, f"{how} and left no exit.json: nothing was judged"
    if recorded is not None and recorded != code:
        return outcome.INFRASTRUCTURE, f"exit code {code} and an exit.json that says {recorded}: neither is believed"
    return code, ""


def reap(client: DockerClient) -> list[str]:
    """Removes containers whose caller is dead (on this machine) or whose deadline has passed; their names."""
    gone = []
    try:
        found = client.containers.list(all=True, filters={"label": RUN}, ignore_removed=True)
    except (APIError, requests.RequestException) as error:
        raise EngineError(f"the engine does not list its containers: {_short(error)}") from error
    for box in found:
        if _leaked(box.labels):
            gone.append(str(box.name))
            _remove(box)
    return gone


def fetch(box: Container, path: str, target: Path) -> int:
    """Copies a folder or file out of a container, dead or alive, into the folder `target`; the number of files.

    Plain files only, as this user's; EngineError for a path that leads out of the folder.
    """
    try:
        stream, _ = box.get_archive(path)
    except NotFound:
        return 0
    count = 0
    packed: Any = _Stream(stream)
    with tarfile.open(fileobj=packed, mode="r|") as tar:
        for info in tar:
            parts = PurePosixPath(info.name).parts
            if PurePosixPath(info.name).is_absolute() or ".." in parts:
                raise EngineError(f"the container's {path} holds a path that leads out of it: {info.name!a}")
            place = target.joinpath(*(parts[1:] or parts))
            source = tar.extractfile(info) if info.isreg() else None
            if source is None:
                continue  # folders are made where a file needs one; links and devices are nobody's evidence
            _write(source, place, target, info.mtime)
            count += 1
    return count


def _write(source: IO[bytes], place: Path, target: Path, mtime: float) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    if not place.parent.resolve().is_relative_to(target.resolve()) or place.is_symlink():
        raise EngineError(f"{place}: a link in the way; remove it")
    with place.open("wb") as file:
        while chunk := source.read(2**20):
            file.write(chunk)
    os.utime(place, (mtime, mtime))


class _Stream:
    """A file to read from, over the SDK's chunks."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, b""

    def read(self, size: int) -> bytes:
        while len(self._rest) < size and (chunk := next(self._chunks, b"")):
            self._rest += chunk
        data, self._rest = self._rest[:size], self._rest[size:]
        return data


def _start(box: Container, request: Request) -> None:
    try:
        box.start()
    except APIError as error:
        said = _short(error)
        if request.gpus and ("device driver" in said or "nvidia" in said.lower()):
            said += "; install the NVIDIA container toolkit on the engine's machine"
        raise EngineError(f"the container cannot be started: {said}") from error


def _follow(box: Container, request: Request, say: Callable[[str], None]) -> bool:
    """Prints the logs until the container ends; True if it had to be stopped at its timeout."""
    printer = threading.Thread(target=_print_logs, args=(box, say), daemon=True)
    printer.start()
    timed_out = not _ended(box, request.timeout)
    if timed_out:
        _stop(box)
    printer.join(timeout=10)
    return timed_out


def _ended(box: Container, seconds: float) -> bool:
    try:
        box.wait(timeout=max(seconds, 0.1))
    except (requests.ReadTimeout, requests.ConnectionError) as error:
        # The SDK reports a read that timed out as either of the two; an engine that is gone does not answer below.
        if "timed out" not in str(error).lower():
            raise
        return False
    return True


def _stop(box: Container) -> None:
    for signal, patience in (("SIGTERM", GRACE_S), ("SIGKILL", 30)):
        with suppress(APIError):  # it ended by itself in the meantime
            box.kill(signal)
        if _ended(box, patience):
            return


def _print_logs(box: Container, say: Callable[[str], None]) -> None:
    rest = b""
    try:
        for chunk in box.logs(stream=True, follow=True):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                say(line.decode(errors="replace").rstrip("\r"))
    except (APIError, requests.RequestException) as error:
        say(f"engine: the log broke off ({_short(error)})")
    if rest:
        say(rest.decode(errors="replace"))


def _state(box: Container) -> dict[str, Any]:
    box.reload()
    return dict(box.attrs["State"])


def _recorded(artifacts: Path) -> int | None:
    path = artifacts / "exit.json"
    try:
        return int(json.loads(path.read_text())["code"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # absent or damaged: the run broke off, which judge reports


def _remove(box: Container) -> None:
    try:
        box.remove(v=True, force=True)
    except NotFound:
        return
    except (APIError, requests.RequestException) as error:
        print(f"engine: container {box.name} is left behind ({_short(error)})", file=sys.stderr)


def _devices(gpus: str) -> DeviceRequest:
    if gpus == "all":
        return DeviceRequest(count=-1, capabilities=[["gpu"]])
    return DeviceRequest(device_ids=gpus.split(","), capabilities=[["gpu"]])


def _owner(pid: int) -> str:
    """boot and namespace/pid/start time: names one process of one boot of one machine; empty if it is gone."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
        started = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except OSError:
        return ""
    return f"{boot}/{pid}/{started}"


def _leaked(labels: dict[str, str]) -> bool:
    if float(labels.get(DEADLINE) or 0) < time.time():
        return True
    owner = labels.get(OWNER, "")
    boot, pid, _ = owner.split("/") if owner.count("/") == 2 else ("", "", "")
    here = _owner(os.getpid()).split("/")[0]
    return bool(here) and boot == here and _owner(int(pid)) != owner


def _short(error: BaseException) -> str:
    said = error.explanation if isinstance(error, APIError) and error.explanation else str(error)
    return " ".join(str(said).split())[:300]
