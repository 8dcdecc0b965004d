"""What the images are made of besides the locks, recorded in docker/pins.toml as it was really found: `nox -s lock`.

A base image's digest is the sha256 of the manifest that its registry serves; the flash-attn wheel's is that of the
file, downloaded whole. What cannot be fetched keeps its entry: no digest is copied, guessed or made up.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping
from email.parser import HeaderParser
from pathlib import Path
from typing import IO, Any

from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PINS = "docker/pins.toml"
UNRESOLVED = "unresolved"
TIMEOUT_S = 30
MANIFEST_LIMIT = 4 * 2**20  # what registries accept
CHUNK = 2**20
HUB = "registry-1.docker.io"  # where an image name without a host lives
MANIFESTS = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
CHALLENGE = re.compile(r'(\w+)="([^"]*)"')


class PinError(Exception):
    """A pin cannot be resolved; the text is one line with the thing and the reason."""


def load(root: Path) -> dict[str, Any]:
    """docker/pins.toml; PinError if it is missing or no TOML."""
    try:
        return tomllib.loads((root / PINS).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PinError(f"{PINS} is missing") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PinError(f"{PINS}: not TOML ({error})") from error


def entries(root: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Section and content of every pin. PinError for one that is neither an image nor a wheel."""
    for section, entry in load(root).items():
        if isinstance(entry, dict):
            if not ({"image", "digest"} <= entry.keys() or {"url", "version", "sha256"} <= entry.keys()):
                raise PinError(f"{PINS}: [{section}] has neither image and digest nor url, version and sha256")
            yield section, entry


def resolve(root: Path, *, upgrade: bool = False) -> tuple[list[str], list[str]]:
    """Records what is unresolved, and with `upgrade` newer bases: a line each on what was done, and on what failed.

    A wheel whose recorded digest is no longer that of its file is a failure, never an update.
    """
    done: list[str] = []
    failed: list[str] = []
    for section, entry in list(entries(root)):
        key = "digest" if "image" in entry else "sha256"
        title = f"{PINS}: [{section}] {entry.get('image') or entry['url'].rsplit('/', 1)[-1]}"
        if entry[key] != UNRESOLVED and not upgrade:
            continue
        try:
            found = _find(section, entry)
        except PinError as error:
            failed.append(f"{title}: {error}; it stays {entry[key]!r}")
            continue
        if found == entry[key]:
            done.append(f"{title}: unchanged")
        else:
            _record(root / PINS, section, key, found)
            done.append(f"{title}: {found}")
    return done, failed


def _find(section: str, entry: dict[str, Any]) -> str:
    if "image" in entry:
        return manifest_digest(entry["image"])
    found = wheel_digest(entry["url"], section, entry["version"])
    if entry["sha256"] not in (UNRESOLVED, found):
        raise PinError(f"the file is now {found}: it was replaced after it was recorded; find out why")
    return found


def manifest_digest(image: str) -> str:
    """sha256:... of the manifest (the index, where there is one) that a registry serves for `name:tag`."""
    host, name, tag = _parts(image)
    url = f"{_scheme(host)}://{host}/v2/{name}/manifests/{tag}"
    headers = {"Accept": ", ".join(MANIFESTS)}
    try:
        body, served = _get(url, headers)
    except urllib.error.HTTPError as refusal:
        if refusal.code != 401:
            raise PinError(_said(host, refusal)) from refusal
        token = _token(host, refusal.headers.get("WWW-Authenticate", ""))
        try:
            body, served = _get(url, headers | {"Authorization": f"Bearer {token}"})
        except urllib.error.HTTPError as error:
            raise PinError(_said(host, error)) from error
    kind = served.get("Content-Type", "").split(";")[0]
    digest = "sha256:" + hashlib.sha256(body).hexdigest()
    if kind not in MANIFESTS:
        raise PinError(f"{host} serves {kind or 'something unnamed'}, not an image manifest")
    if served.get("Docker-Content-Digest", digest) != digest:
        raise PinError(f"{host} serves a manifest that is not the one it names: damaged on the way, or a bad mirror")
    return digest


def wheel_digest(url: str, package: str, version: str) -> str:
    """sha256 in hex of the wheel at `url`, once it is seen to be that version of the package."""
    scheme, host, *_ = urllib.parse.urlsplit(url)
    if scheme != _scheme(host):
        raise PinError(f"{scheme}: is no way to fetch it")
    sha = hashlib.sha256()
    with tempfile.TemporaryFile() as file:
        try:
            with _open(url, {}) as response:
                while chunk := response.read(CHUNK):
                    sha.update(chunk)
                    file.write(chunk)
                announced = response.headers.get("Content-Length")
        except urllib.error.HTTPError as error:
            raise PinError(_said(host, error)) from error
        except (OSError, http.client.HTTPException) as error:
            raise PinError(_unreachable(host, error)) from error
        if announced and file.tell() != int(announced):
            raise PinError(f"{host} sent {file.tell()} of {announced} bytes")
        _check_wheel(file, package, version)
    return sha.hexdigest()


def _check_wheel(file: IO[bytes], package: str, version: str) -> None:
    try:
        with zipfile.ZipFile(file) as wheel:
            name = next((n for n in wheel.namelist() if n.endswith(".dist-info/METADATA")), None)
            fields = dict(HeaderParser().parsestr(wheel.read(name).decode(errors="replace")).items()) if name else {}
    except zipfile.BadZipFile as error:
        raise PinError("what came is not a wheel") from error
    have = (canonicalize_name(fields.get("Name", "")), fields.get("Version"))
    if have != (canonicalize_name(package), version):
        raise PinError(f"what came is {have[0] or 'not a wheel'} {have[1] or ''}, not {package} {version}")


def _parts(image: str) -> tuple[str, str, str]:
    """Host, repository and tag of `python:3.11`, `nvidia/cuda:12.1` or `host:5000/a/b:tag`."""
    first, _, rest = image.partition("/")
    has_host = bool(rest) and ("." in first or ":" in first or first == "localhost")
    host, path = (first, rest) if has_host else (HUB, image if rest else f"library/{image}")
    name, colon, tag = path.rpartition(":")
    if not colon or not re.fullmatch(r"[a-z0-9._/-]+", name) or not re.fullmatch(r"\w[\w.-]{0,127}", tag):
        raise PinError("not of the form name:tag")
    return host, name, tag


def _scheme(host: str) -> str:
    # As Docker does: a registry on this machine may speak plainly.
    return "http" if host.split(":")[0] in ("localhost", "127.0.0.1") else "https"


def _token(host: str, challenge: str) -> str:
    """The anonymous pull token that the registry's challenge points to."""
    asked = dict(CHALLENGE.findall(challenge))
    realm = asked.pop("realm", "")
    if not challenge.lower().startswith("bearer") or not realm.startswith(f"{_scheme(host)}://"):
        raise PinError(f"{host} wants a log-in that is not anonymous")
    try:
        body, _ = _get(f"{realm}?{urllib.parse.urlencode(asked)}", {})
        answer = json.loads(body)
        return str(answer.get("token") or answer["access_token"])
    except urllib.error.HTTPError as error:
        raise PinError(_said(urllib.parse.urlsplit(realm).netloc, error)) from error
    except (ValueError, KeyError, AttributeError) as error:
        raise PinError(f"{host}: no token in its answer") from error


def _get(url: str, headers: Mapping[str, str]) -> tuple[bytes, Mapping[str, str]]:
    """Body and headers of a small answer; HTTPError is left to the caller."""
    host = urllib.parse.urlsplit(url).netloc
    try:
        with _open(url, headers) as response:
            body: bytes = response.read(MANIFEST_LIMIT + 1)
            served = response.headers
    except urllib.error.HTTPError:
        raise
    except (OSError, http.client.HTTPException) as error:
        raise PinError(_unreachable(host, error)) from error
    if len(body) > MANIFEST_LIMIT:
        raise PinError(f"{host} answers with more than {MANIFEST_LIMIT} bytes")
    return body, served


def _open(url: str, headers: Mapping[str, str]) -> Any:
    request = urllib.request.Request(url)
    for name, value in headers.items():
        request.add_unredirected_header(name, value)  # a token stays with the host it is for
    return urllib.request.urlopen(request, timeout=TIMEOUT_S)


def _said(host: str, error: urllib.error.HTTPError) -> str:
    return f"{host} answers {error.code}" + (": no such image, tag or file" if error.code == 404 else "")


def _unreachable(host: str, error: Exception) -> str:
    reason = getattr(error, "reason", None) or error
    return f"{host} cannot be reached ({str(reason).splitlines()[0] if str(reason) else type(error).__name__})"


def _record(path: Path, section: str, key: str, value: str) -> None:
    """Replaces one value of one section; comments and the rest stay as they are."""
    head = re.escape(f"[{section}]")
    pattern = re.compile(rf'(^{head}(?:(?!^\[).)*?^{key} = ")[^"\n]*(")', re.MULTILINE | re.DOTALL)
    text, count = pattern.subn(lambda match: match[1] + value + match[2], path.read_text(encoding="utf-8"))
    if count != 1:
        raise PinError(f'{PINS}: [{section}] has no line {key} = "..."')
    path.write_text(text, encoding="utf-8")
