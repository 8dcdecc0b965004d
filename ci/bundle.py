"""The bundle: one deterministic .tar.gz with the evidence of a run. `ci.audit` checks it, anywhere and offline.

    nsa-readiness-<sha12>-<profile>-<run>/
        manifest.json     schema, identity, and of every file: path, size, sha256, the step that wrote it
        SHA256SUMS        for `sha256sum -c`
        runbook.toml      what the run was judged by
        artifacts/...     as on disk: results, JUnit, reports, tracked/; checkpoints are listed, not packed

Files are masked (ci.redact) on their way in; a changed one keeps the digest of the original in the manifest.
"""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ci.audit import MAX_MEMBER, SCHEMA, VerifyReport, verify, write_tar
from ci.contract import digest
from ci.evidence import flatten, is_backup, is_checkpoint, size
from ci.outcome import RunResult
from ci.redact import Redactor, SecretFound, secrets_in
from ci.runbook import SOURCE
from ci.story import RESULT, RUNBOOK

__all__ = ["BundleError", "VerifyReport", "build", "bundle_name", "verify"]

PREFIX = "nsa-readiness"
CHECKPOINT = "checkpoint"


class BundleError(ValueError):
    """The bundle cannot be built; the text names the file and the remedy."""


def bundle_name(result: RunResult) -> str:
    """nsa-readiness-<sha12>-<profile>-<run>.tar.gz; characters that file systems dislike become `_`."""
    parts = (result.git_sha[:12] or "nogit", result.profile, result.run_id)
    return "-".join((PREFIX, *(re.sub(r"[^A-Za-z0-9._]+", "_", part) for part in parts))) + ".tar.gz"


def build(artifacts: Path, result: RunResult, out_dir: Path, *, runbook: Path = SOURCE) -> Path:
    """Packs artifacts/ and the runbook it was judged by into out_dir and returns the file.

    The same input gives the same bytes. Raises BundleError for a file that is too large, or whose secret cannot be
    masked.
    """
    artifacts = Path(artifacts).resolve()
    members, manifest = _contents(artifacts, result, runbook)
    target = Path(out_dir) / bundle_name(result)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(target.name + ".tmp")
    with scratch.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed:
        write_tar(packed, manifest["bundle"], _with_sums(members, manifest))
    scratch.replace(target)
    return target


def _contents(artifacts: Path, result: RunResult, runbook: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    variables = {**dict(flatten(result.env)), **os.environ}
    redactor = Redactor(secrets_in(variables), root=artifacts.parent, home=Path.home())
    members: dict[str, bytes] = {RUNBOOK: runbook.read_bytes()}
    if hashlib.sha256(members[RUNBOOK]).hexdigest() != result.env.get("runbook_sha256", digest(runbook)):
        raise BundleError(f"{runbook.name}: changed since the run was judged by it; run: python -m ci report")
    if redactor.mask(RUNBOOK, members[RUNBOOK]) != members[RUNBOOK]:
        raise BundleError(f"{runbook.name}: holds a secret, and is packed as it is; take it out")
    originals: dict[str, str] = {}
    checkpoints, left_out = [], []
    since = min([result.started, *(step.started for step in result.steps if step.started)])
    for path in sorted(p for p in artifacts.rglob("*") if p.is_symlink() or not p.is_dir()):
        name = f"artifacts/{path.relative_to(artifacts).as_posix()}"
        raw = os.fsencode(name)
        masked = redactor.mask(name, raw)
        reason = _left_out(path, name, since)
        if masked != raw:
            left_out.append({"path": masked.decode(errors="replace"), "why": "its name holds a secret; rename it"})
        elif reason == CHECKPOINT:
            checkpoints.append({"path": name, "size": path.stat().st_size, "sha256": digest(path)})
        elif reason:
            left_out.append({"path": name.encode(errors="replace").decode(), "why": reason})
        elif name != RESULT and path.name != ".gitkeep":
            original = _read(path, name)
            members[name] = _clean(redactor, name, original)
            if members[name] != original:
                originals[name] = hashlib.sha256(original).hexdigest()
    said = json.dumps(asdict(result), indent=2, sort_keys=True) + "\n"
    members[RESULT] = _clean(redactor, RESULT, said.encode())
    _follow(members, originals)
    files = [
        {"path": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in sorted(members.items())
    ]
    for entry in files:
        if str(entry["path"]) in originals:
            entry["original_sha256"] = originals[str(entry["path"])]
    for entry in (*files, *checkpoints):
        entry["step"] = _step(str(entry["path"]), result)
    manifest = {
        "schema": SCHEMA,
        "bundle": bundle_name(result).removesuffix(".tar.gz"),
        "git_sha": result.git_sha,
        "dirty": result.dirty,
        "profile": result.profile,
        "run_id": result.run_id,
        "verdict": result.verdict,
        "exit_code": result.exit_code,
        "files": files,
        "checkpoints": checkpoints,
        "left_out": left_out,
    }
    return members, manifest


def _left_out(path: Path, name: str, since: float) -> str:
    """Why a file of artifacts/ is not packed; empty if it is. What a user puts into tracked/ always is."""
    parts = name.split("/")[1:]
    if not name.isprintable() or "\\" in name:
        return "its name has characters that no archive keeps; rename it"
    if path.is_symlink():
        return "a symbolic link"
    if not path.is_file():
        return "not a plain file"
    if parts[0] == "tracked":
        return ""
    if len(parts) == 1 and name.endswith(".tar.gz") and parts[0].startswith(PREFIX):
        return "a bundle"
    if any(is_backup(part) for part in parts[:-1]):
        return "an earlier training run"
    if len(parts) > 1 and path.stat().st_mtime < since:
        return "older than this run"
    if is_checkpoint(name):
        return CHECKPOINT
    if name.endswith(".tmp"):
        return "half written"
    return ""


def _read(path: Path, name: str) -> bytes:
    if path.stat().st_size > MAX_MEMBER:
        raise BundleError(f"{name}: {size(path.stat().st_size)} is too large to pack; move it out of artifacts/")
    try:
        return path.read_bytes()
    except OSError as error:
        raise BundleError(f"{name}: unreadable ({error.strerror}); make it readable or remove it") from error


def _clean(redactor: Redactor, name: str, data: bytes) -> bytes:
    try:
        return redactor.clean(name, data)
    except SecretFound as error:
        raise BundleError(str(error)) from error


def _follow(members: dict[str, bytes], originals: dict[str, str]) -> None:
    """Lets the step records name the digest of the file as packed, where masking has changed it."""
    for name, original in list(originals.items()):
        packed = hashlib.sha256(members[name]).hexdigest()
        for record in members:
            if record.startswith("artifacts/results/") and original.encode() in members[record]:
                originals.setdefault(record, hashlib.sha256(members[record]).hexdigest())
                members[record] = members[record].replace(original.encode(), packed.encode())


def _with_sums(members: dict[str, bytes], manifest: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    packed = {**members, "manifest.json": (json.dumps(manifest, indent=2) + "\n").encode()}
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in sorted(packed.items()))
    packed["SHA256SUMS"] = sums.encode()
    return iter(sorted(packed.items()))


def _step(name: str, result: RunResult) -> str:
    """The step that wrote a file: it declares it, its record or JUnit it is, or it alone writes to that folder."""
    if name.startswith("artifacts/tracked/"):
        return "tracked"
    folder = name.rpartition("/")[0]
    neighbours = set()
    for step in result.steps:
        if name.startswith((f"artifacts/results/{step.stage}.{step.id}.", f"artifacts/junit/{step.stage}.{step.id}.")):
            return step.id
        for declared in step.deliverables:
            if fnmatch.fnmatchcase(name, declared):
                return step.id
            if folder.startswith(declared.rpartition("/")[0]) and declared.count("/") > 1:
                neighbours.add(step.id)
    return neighbours.pop() if len(neighbours) == 1 else "harness"
