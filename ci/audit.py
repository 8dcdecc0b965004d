"""Checks a bundle: that it is whole, and that its parts tell one story. Standard library and junitparser only.

What this proves without a signature: the file has exactly the members it lists, unchanged since the manifest was
made, and raw JUnit, step records, captured output, exit.json, result.json and summary.md agree; the contract, run
again over them, gives the verdict that is claimed. So an edit of one part is found, hashes recomputed or not.

What it does not prove is who made the file. Whoever rewrites every part consistently has forged a run; only a signature
over the bundle's sha256, or the CI provider's attestation of it, tells that apart. A bundle with a runbook other than
this checkout's (a note says so) has its regular expressions run: check a stranger's under a time limit.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

from ci.contract import digest
from ci.outcome import RunResult, load_result
from ci.runbook import SOURCE
from ci.story import RESULT, RUNBOOK, contradictions

SCHEMA = 1
MAX_MEMBER = 512 * 2**20
CHUNK = 2**20
MANIFEST, SUMS = "manifest.json", "SHA256SUMS"


@dataclass(frozen=True)
class Limits:
    """How much is read before a bundle is refused: files, bytes of one, bytes in all.

    `runbook`: the sha256 its runbook must have; one of another is refused before its regular expressions run.
    """

    members: int = 20_000
    member: int = MAX_MEMBER
    total: int = 4 * 2**30
    runbook: str = ""


@dataclass(frozen=True)
class VerifyReport:
    """What a bundle is worth. `problems` holds a line each, naming the file and the reason; none means verified.

    `notes` holds what the reader should know although it refutes nothing.
    """

    path: str
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    verdict: str = ""
    exit_code: int | None = None
    files: int = 0
    sha256: str = ""
    result: RunResult | None = None

    @property
    def ok(self) -> bool:
        return not self.problems

    def lines(self) -> list[str]:
        """For people: what is verified and the notes, or a line a refusal."""
        if self.problems:
            return [f"refused: {problem}" for problem in self.problems]
        claim = f"{self.verdict}, exit code {self.exit_code}"
        verified = f"verified: {claim}; {self.files} files agree; sha256 {self.sha256}"
        return [verified, *(f"note: {note}" for note in self.notes)]

    def __str__(self) -> str:
        return "\n".join(self.lines())


class Refused(ValueError):
    """Why the bundle is not read any further: the file in it and the reason."""


def verify(path: Path, limits: Limits | None = None, *, keep: Path | None = None) -> VerifyReport:
    """Checks a bundle, trusting nothing in it; reports, and raises nothing, whatever the file holds.

    The report carries the verified `result`. `keep` is an empty folder in which the unpacked files stay.
    """
    limits = limits or Limits()
    path = Path(path)
    if not path.is_file():
        return VerifyReport(str(path), [f"{path}: no such file"])
    report = VerifyReport(str(path), sha256=digest(path))
    with nullcontext(keep) if keep else tempfile.TemporaryDirectory(prefix="nsa-verify-") as scratch:
        root = Path(scratch)
        try:
            top, digests, stream = _unpack(path, root, limits)
            manifest = _manifest(root, top, digests)
            if limits.runbook and digests.get(RUNBOOK) != limits.runbook:
                raise Refused(f"{RUNBOOK}: not the one this checkout judges by; compare the two by hand")
        except Refused as refusal:
            return replace(report, problems=[str(refusal)])
        problems = [*_differences(root, manifest, digests), *contradictions(root, manifest)]
        again = _Hashing()
        write_tar(again, top, ((name, (root / name).read_bytes()) for name in sorted(digests)))
        if again.digest != stream and not problems:
            problems.append(f"{path.name}: holds bytes that belong to none of its files")
        return replace(
            report,
            problems=problems,
            notes=_notes(manifest, digests),
            verdict=manifest["verdict"],
            exit_code=manifest["exit_code"],
            files=len(digests),
            result=None if problems else load_result(root / RESULT),
        )


def write_tar(sink: Any, top: str, members: Iterable[tuple[str, bytes]]) -> None:
    """The one form of a bundle's tar: plain files below `top` in the order given, without time, owner or rights."""
    with tarfile.open(fileobj=sink, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(f"{top}/{name}")
            info.size, info.mode, info.mtime = len(data), 0o644, 0
            tar.addfile(info, BytesIO(data))


class _Hashing:
    """A file that keeps the sha256 of what passes through it: read from `source`, or written to nowhere."""

    def __init__(self, source: Any = None) -> None:
        self._source, self._sha = source, hashlib.sha256()

    @property
    def digest(self) -> str:
        return self._sha.hexdigest()

    def read(self, size: int) -> bytes:
        data = self._source.read(size) if self._source else b""
        self._sha.update(data)
        return data

    def write(self, data: bytes) -> int:
        self._sha.update(data)
        return len(data)


def _unpack(path: Path, root: Path, limits: Limits) -> tuple[str, dict[str, str], str]:
    """Writes the members below root; the top folder's name, path to sha256 of each, sha256 of the whole stream."""
    tops: set[str] = set()
    digests: dict[str, str] = {}
    total = 0
    try:
        with gzip.open(path) as packed:
            stream: Any = _Hashing(packed)
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                for info in tar:
                    top, name = _safe_name(info)
                    tops.add(top)
                    total += info.size
                    if name in digests:
                        raise Refused(f"{name}: there twice")
                    if len(digests) >= limits.members or info.size > limits.member or total > limits.total:
                        most = f"{limits.members} files, {limits.member} bytes a file, {limits.total} in all"
                        raise Refused(f"{name}: over the limit of {most}")
                    digests[name] = _write(tar, info, root / name)
            if _rest(stream):
                raise Refused(f"{path.name}: data behind the end of the archive")
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Refused(f"{path.name}: truncated or not a .tar.gz ({error})") from error
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise Refused(f"{path.name}: one member is the folder of another") from error
    if len(tops) != 1:
        raise Refused(f"{path.name}: {len(tops)} top folders where one is expected")
    return tops.pop(), digests, stream.digest


def _safe_name(info: tarfile.TarInfo) -> tuple[str, str]:
    name = info.name
    shown = ascii(name)[1:-1]
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name):
        raise Refused(f"{shown}: an absolute path")
    parts = name.split("/")
    if ".." in parts:
        raise Refused(f"{shown}: leaves its folder by `..`")
    if "" in parts or "." in parts or "\\" in name or not name.isprintable() or _too_long(parts):
        raise Refused(f"{shown}: not a plain relative path")
    if info.issym() or info.islnk():
        raise Refused(f"{shown}: a link")
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or info.issparse():
        raise Refused(f"{shown}: a folder, device or special member, not a plain file")
    if len(parts) < 2:
        raise Refused(f"{shown}: outside the bundle's folder")
    return parts[0], "/".join(parts[1:])


def _too_long(parts: list[str]) -> bool:
    return len(parts) > 50 or any(len(part.encode()) > 255 for part in parts)


def _write(tar: tarfile.TarFile, info: tarfile.TarInfo, target: Path) -> str:
    source = tar.extractfile(info)
    if source is None:
        raise Refused(f"{info.name}: has no content")
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with target.open("xb") as file:
        for chunk in _chunks(source):
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()


def _rest(stream: _Hashing) -> bool:
    """True if anything but the archive's zero padding follows. Reading on also checks the gzip trailer."""
    read = 0
    for chunk in _chunks(stream):
        read += len(chunk)
        if chunk.strip(b"\0") or read > CHUNK:
            return True
    return False


def _manifest(root: Path, top: str, digests: dict[str, str]) -> dict[str, Any]:
    for name in (MANIFEST, SUMS):
        if name not in digests:
            raise Refused(f"{name}: missing")
    try:
        data = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits is a ValueError too
        raise Refused(f"{MANIFEST}: not JSON ({error})") from error
    shape = {"bundle": str, "profile": str, "git_sha": str, "run_id": str, "verdict": str, "exit_code": int}
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise Refused(f"{MANIFEST}: not schema {SCHEMA}; verify with the version that built it")
    for key, kind in (*shape.items(), ("files", list), ("checkpoints", list)):
        if not isinstance(data.get(key), kind):
            raise Refused(f"{MANIFEST}: no {key!r} of type {kind.__name__}")
    for entry in (*data["files"], *data["checkpoints"]):
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("path"), str)
            or not isinstance(entry.get("sha256"), str)
        ):
            raise Refused(f"{MANIFEST}: an entry without path and sha256")
    if data["bundle"] != top:
        raise Refused(f"{MANIFEST}: made for {data['bundle']}, found in {top}")
    return data


def _differences(root: Path, manifest: dict[str, Any], digests: dict[str, str]) -> Iterator[str]:
    """Members against manifest.json against SHA256SUMS."""
    listed: dict[str, dict[str, Any]] = {}
    for entry in manifest["files"]:
        if entry["path"] in listed:
            yield f"{entry['path']}: listed twice in {MANIFEST}"
        listed[entry["path"]] = entry
    for name in sorted(listed.keys() - digests.keys()):
        yield f"{name}: listed in {MANIFEST} and not there"
    for name in sorted(digests.keys() - listed.keys() - {MANIFEST, SUMS}):
        yield f"{name}: there and not listed in {MANIFEST}"
    for name in sorted(listed.keys() & digests.keys()):
        if listed[name]["sha256"] != digests[name]:
            yield f"{name}: changed, its sha256 is not the one in {MANIFEST}"
        elif listed[name].get("size") != (root / name).stat().st_size:
            yield f"{name}: not of the size in {MANIFEST}"
    sums = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()) if name != SUMS)
    if (root / SUMS).read_bytes() != sums.encode():
        yield f"{SUMS}: does not match the files"


def _notes(manifest: dict[str, Any], digests: dict[str, str]) -> list[str]:
    notes = []
    if digests.get(RUNBOOK) != digest(SOURCE):
        notes.append(
            f"judged by the {RUNBOOK} in it, which is not this checkout's; look at commit {manifest['git_sha']!a}"
        )
    if manifest.get("dirty"):
        notes.append("made with uncommitted changes")
    return notes


def _chunks(source: Any) -> Iterator[bytes]:
    while chunk := source.read(CHUNK):
        yield chunk
