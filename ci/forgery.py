"""Forges a bundle in the ways that matter and expects each to be refused: a check of the checker, on the real file."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from ci import audit

Members = dict[str, bytes]


def canary(path: Path) -> list[str]:
    """A line a forgery: refused and why, or ACCEPTED. The bundle itself must verify first (audit.Refused if not)."""
    whole = audit.verify(path)
    if not whole.ok:
        raise audit.Refused(f"{path.name}: {whole.problems[0]}")
    lines = []
    with tempfile.TemporaryDirectory(prefix="nsa-forgery-") as scratch:
        for name, forge in FORGERIES.items():
            forged = Path(scratch) / path.name
            forge(path, forged)
            report = audit.verify(forged)
            lines.append(f"{name}: " + (f"refused ({report.problems[0]})" if report.problems else "ACCEPTED"))
    return lines


def members(path: Path) -> Members:
    """Path in the archive to content."""
    with tarfile.open(path) as tar:
        return {info.name: file.read() for info in tar if (file := tar.extractfile(info))}


def resign(files: Members) -> Members:
    """Every hash and size made to fit the contents again, as a forger does."""
    top = next(iter(files)).split("/")[0]
    inner = {name.removeprefix(f"{top}/"): data for name, data in files.items()}
    del inner[audit.SUMS]
    manifest = json.loads(inner[audit.MANIFEST])
    manifest["files"] = [entry for entry in manifest["files"] if entry["path"] in inner]
    for entry in manifest["files"]:
        data = inner[entry["path"]]
        entry["size"], entry["sha256"] = len(data), hashlib.sha256(data).hexdigest()
    inner[audit.MANIFEST] = (json.dumps(manifest, indent=2) + "\n").encode()
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in sorted(inner.items()))
    return {f"{top}/{name}": data for name, data in sorted({**inner, audit.SUMS: sums.encode()}.items())}


def pack(files: Members, target: Path) -> None:
    with tarfile.open(target, "w:gz", format=tarfile.PAX_FORMAT) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o644
            tar.addfile(info, io.BytesIO(data))


def _edited(source: Path, target: Path) -> None:
    files = members(source)
    files[_first(files, "/artifacts/results/")] += b" "
    pack(files, target)


def _resigned(source: Path, target: Path) -> None:
    """A step's record taken out, and every hash made to fit."""
    files = members(source)
    del files[_first(files, "/artifacts/results/")]
    pack(resign(files), target)


def _another_verdict(source: Path, target: Path) -> None:
    files = members(source)
    name = next(name for name in files if name.endswith("/artifacts/result.json"))
    result = json.loads(files[name])
    claimed = ("READY", 0) if result["verdict"] == "NOT READY" else ("NOT READY", 1)
    result["verdict"], result["exit_code"] = claimed
    files[name] = json.dumps(result).encode()
    pack(resign(files), target)


def _truncated(source: Path, target: Path) -> None:
    data = source.read_bytes()
    target.write_bytes(data[: len(data) // 2])


def _climbing(source: Path, target: Path) -> None:
    files = members(source)
    top = next(iter(files)).split("/")[0]
    pack({**files, f"{top}/../../escaped.txt": b"out"}, target)


def _first(files: Members, part: str) -> str:
    return min(name for name in files if part in name)


FORGERIES: dict[str, Callable[[Path, Path], None]] = {
    "a file changed": _edited,
    "a step taken out, hashes made to fit": _resigned,
    "another verdict, hashes made to fit": _another_verdict,
    "cut in half": _truncated,
    "a member that climbs out by ..": _climbing,
}
