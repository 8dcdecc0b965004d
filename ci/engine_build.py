"""Builds the project's images with the docker CLI (BuildKit), only where the tree differs from the image that is there.

The machine's pip configuration and CA bundle go in as build secrets, so no layer keeps them; folders of wheels on this
machine are handed over by a loopback server for the time of the build.
"""

from __future__ import annotations

import functools
import hashlib
import http.server
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from docker.client import DockerClient
from docker.errors import ImageNotFound

from ci import facts, outcome, pins
from ci.engine import LANE, EngineError
from ci.engine_options import Lane

KEY = "nsa-readiness.key"
NAME = "nsa-readiness"
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
FORWARDED = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")
PIP_KEYS = (
    "index-url",
    "extra-index-url",
    "find-links",
    "trusted-host",
    "timeout",
    "default-timeout",
    "retries",
    "proxy",
)
FALLBACK = Path("/usr/bin")  # the distribution's client, where another one comes first on PATH
TAIL_LINES = 25


@dataclass(frozen=True)
class Plan:
    """A build: `arguments` are the --build-arg values, `key` names everything the image is made of."""

    lane: Lane
    arguments: dict[str, str]
    key: str
    notes: list[str] = field(default_factory=list)

    @property
    def tag(self) -> str:
        return f"{NAME}:{self.lane.name}-{self.key[:12]}"


def plan(root: Path, lane: Lane, *, base: str = "", flash_attn: bool = True) -> Plan:
    """What a build of this tree would be; EngineError (78) while a pin that it needs is unresolved."""
    try:
        recorded = pins.load(root)
    except pins.PinError as error:
        raise EngineError(str(error), outcome.CONFIGURATION) from error
    arguments: dict[str, str] = {}
    notes = []
    if base:
        arguments |= {"BASE": base, "STAND_IN": "yes"}
        notes.append(f"stand-in base {base}: not the pinned {recorded['base']['image']}")
    else:
        digest = recorded["base"]["digest"]
        if not DIGEST.fullmatch(digest):
            remedy = "run `nox -s lock` where its registry can be reached, or give a stand-in: --base IMAGE"
            raise EngineError(f"{pins.PINS}: the base's digest is {digest}; {remedy}", outcome.CONFIGURATION)
        arguments |= {"BASE": f"{recorded['base']['image']}@{digest}"}
    if lane.flash_attn and flash_attn:
        wheel = recorded["flash-attn"]
        if not DIGEST.fullmatch(f"sha256:{wheel['sha256']}"):
            remedy = "run `nox -s lock` where it can be fetched, or build --without-flash-attn"
            said = f"{pins.PINS}: the flash-attn wheel's sha256 is {wheel['sha256']}; {remedy}"
            raise EngineError(said, outcome.CONFIGURATION)
        arguments |= {"FLASH_ATTN_URL": wheel["url"], "FLASH_ATTN_SHA256": wheel["sha256"]}
    elif lane.flash_attn:
        arguments["FLASH_ATTN"] = "none"
        notes.append("without flash-attn, as asked: stage 2 cannot be proven on it")
    arguments |= _origin(root)
    arguments["LOCK"] = hashlib.sha256((root / lane.lock).read_bytes()).hexdigest()
    return Plan(lane, arguments, _key(root, lane, arguments), notes)


def context(root: Path) -> list[Path]:
    """The files that .dockerignore lets into a build: its `!` lines, without hidden files and byte code."""
    named = [line[1:] for line in (root / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    tops = [path for pattern in named for path in root.glob(pattern)]
    files = [path for top in tops for path in (top.rglob("*") if top.is_dir() else [top]) if path.is_file()]
    return sorted(path for path in files if not any(_left_out(part) for part in path.relative_to(root).parts))


def ensure(client: DockerClient, root: Path, wanted: Plan, say: Callable[[str], None] = print) -> str:
    """The image's id; built if the engine has none of this key. EngineError with the builder's last lines."""
    for note in wanted.notes:
        say(f"image: {note}")
    try:
        found = client.images.get(wanted.tag)
        if found.labels.get(KEY) == wanted.key and found.labels.get(LANE) == wanted.lane.name:
            say(f"image: {wanted.tag} is there")
            return str(found.id)
    except ImageNotFound:
        say(f"image: {wanted.tag} is built")
    _build(client, root, wanted, say)
    return str(client.images.get(wanted.tag).id)


def builder() -> tuple[list[str], dict[str, str]]:
    """A docker CLI that speaks BuildKit, and what it needs in its environment; EngineError if there is none."""
    seen = []
    for folder in [*os.environ.get("PATH", os.defpath).split(os.pathsep), str(FALLBACK)]:
        cli = Path(folder, "docker")
        if not os.access(cli, os.X_OK) or str(cli) in seen:
            continue
        seen.append(str(cli))
        if _says([str(cli), "buildx", "version"]) is not None:
            return [str(cli), "buildx", "build", "--load"], {}
        version = _says([str(cli), "--version"]) or ""
        major = re.search(r"version (\d+)\.", version)
        if major and int(major[1]) < 23:  # BuildKit became a plugin of the client in 23.0
            return [str(cli), "build"], {"DOCKER_BUILDKIT": "1"}
    tried = f"tried {', '.join(seen)}" if seen else "no docker command on PATH"
    raise EngineError(f"no docker CLI that speaks BuildKit ({tried}); install docker-buildx")


def _build(client: DockerClient, root: Path, wanted: Plan, say: Callable[[str], None]) -> None:
    command, environment = builder()
    with tempfile.TemporaryDirectory(prefix="nsa-build-") as scratch, _secrets(Path(scratch)) as (secrets, local):
        command += ["--progress", "plain", "-f", str(root / wanted.lane.dockerfile), "-t", wanted.tag]
        command += ["--label", f"{KEY}={wanted.key}"]
        if local or not _has_bridge(client):
            command += ["--network", "host"]
        for name, value in wanted.arguments.items():
            command += ["--build-arg", f"{name}={value}"]
        for name in (name for name in FORWARDED if os.environ.get(name)):
            command += ["--build-arg", name]
        for name, path in secrets.items():
            command += ["--secret", f"id={name},src={path}"]
        log = root / ".nox" / f"build-{wanted.lane.name}.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("w") as file:
            done = subprocess.run(
                [*command, str(root)], env={**os.environ, **environment}, stdout=file, stderr=subprocess.STDOUT
            )
    if done.returncode:
        for line in log.read_text(errors="replace").splitlines()[-TAIL_LINES:]:
            say(f"    {line}")
        raise EngineError(f"the build of {wanted.tag} failed with exit code {done.returncode}; log: .nox/{log.name}")


@contextmanager
def _secrets(scratch: Path) -> Iterator[tuple[dict[str, Path], bool]]:
    """(secret files by id, whether this machine's loopback must be reachable from the build)."""
    settings = _pip_settings()
    found: dict[str, Path] = {}
    certificates = settings.pop("cert", "") or os.environ.get("SSL_CERT_FILE", "")
    with _served(settings) as (handed, local):
        lines = [f"{name} = {value}" for name, value in handed.items()]
        if certificates and Path(certificates).is_file():
            found["ca"] = Path(certificates)
            lines.append("cert = /run/ca.crt")
        found["pip"] = scratch / "pip.conf"
        found["pip"].write_text("\n".join(["[global]", *lines, ""]))
        yield found, local


@contextmanager
def _served(settings: dict[str, str]) -> Iterator[tuple[dict[str, str], bool]]:
    """The settings with each folder of this machine replaced by a loopback address that serves it meanwhile."""
    servers: list[http.server.ThreadingHTTPServer] = []

    def handed(name: str, place: str) -> str:
        if "://" in place and not place.startswith("file:"):
            return place
        folder = Path(unquote(urlsplit(place).path) if place.startswith("file:") else place)
        # An index links to files beside it (`../../files/`), a folder of wheels holds them.
        top, below = (folder, "") if name == "find-links" else (folder.parent, f"{folder.name}/")
        serve = functools.partial(_Quiet, directory=str(top))
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_address[1]}/{below}"

    changed = dict(settings)
    for name in ("find-links", "index-url", "extra-index-url"):
        if name in changed:
            changed[name] = " ".join(handed(name, place) for place in changed[name].split())
    try:
        yield changed, bool(servers)
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_arguments: object) -> None:
        return


def _pip_settings() -> dict[str, str]:
    """What pip is told on this machine about where packages come from, by its files and its environment."""
    said = _says([sys.executable, "-m", "pip", "config", "list"]) or ""
    found: dict[str, str] = {}
    for line in said.splitlines():  # global.index-url='...'; the environment's lines come last and win, as in pip
        name, _, value = line.partition("=")
        key = name.rpartition(".")[2]
        if key in (*PIP_KEYS, "cert"):
            found[key] = " ".join(" ".join(shlex.split(value)).replace("\\n", " ").split())
    return found


def _origin(root: Path) -> dict[str, str]:
    """REVISION, DIRTY and SOURCE from git; a tree without git says so by their absence."""
    found = {}
    if revision := facts.git(root, "rev-parse", "HEAD"):
        found["REVISION"] = revision
        if facts.dirty(root):
            found["DIRTY"] = "yes"
    remote = facts.git(root, "remote", "get-url", "origin")
    if remote.startswith("https://"):
        found["SOURCE"] = re.sub(r"//[^/@]*@", "//", remote).removesuffix(".git")
    return found


def _key(root: Path, lane: Lane, arguments: dict[str, str]) -> str:
    said = hashlib.sha256(repr((lane.name, sorted(arguments.items()))).encode())
    for path in context(root):
        mode = "x" if os.access(path, os.X_OK) else "-"
        said.update(f"{path.relative_to(root)}\0{mode}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return said.hexdigest()


def _left_out(part: str) -> bool:
    return part.startswith(".") or part == "__pycache__"


def _has_bridge(client: DockerClient) -> bool:
    return bool(client.networks.list(names=["bridge"]))


def _says(command: list[str]) -> str | None:
    if not shutil.which(command[0]):
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else None
