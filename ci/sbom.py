"""CycloneDX bills of materials of both images, from the locks alone: `nox -s sbom` writes dist/sbom-{cpu,gpu}.cdx.json.

Components are the locks' pins with the sha256 of every file that may be installed, torch where the lock leaves it out,
and what docker/pins.toml names; the graph is the locks' own record of who wants whom. The same locks give the same
bytes: no time, no serial number of chance. Licences are not in a lock, so none is stated.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import uuid
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name

from ci import pins
from ci.lock import HASH, LOCKS, ROOT, Lock, LockError, blocks, drift, pinned
from ci.outcome import CONFIGURATION, READY

SPEC = "1.6"
VIA = re.compile(r"^ +# via (.+)$", re.MULTILINE)
PROJECT = "nsa-readiness"
NAMESPACE = uuid.UUID("6f1d2f5e-2a52-5d0c-9c3e-0b7d7f3a9a11")  # of this project's serial numbers; drawn once


def document(root: Path, lock: Lock) -> dict[str, Any]:
    """The bill of one image as CycloneDX JSON. PinError if docker/pins.toml is missing or malformed."""
    text = (root / lock.path).read_text()
    components = {name: _package(name, block) for name, block in blocks(text)}
    wanted_by = {name: _wanted_by(block) for name, block in blocks(text)}
    for name, version in pinned(root / lock.inputs).items():
        if lock.leaves_out(name) and name not in components:
            components[name] = _component("library", name, version, _purl(name, version))
            wanted_by[name] = {PROJECT}
    for name, component in _from_pins(root, lock):
        components[name] = component
        wanted_by[name] = {PROJECT}
    top = _project(root, lock)
    graph: dict[str, set[str]] = {PROJECT: set(), **{name: set() for name in components}}
    for name, parents in wanted_by.items():
        for parent in parents & graph.keys():
            graph[parent].add(name)
    refs = {PROJECT: top["bom-ref"], **{name: each["bom-ref"] for name, each in components.items()}}
    return {
        "$schema": f"http://cyclonedx.org/schema/bom-{SPEC}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": SPEC,
        "serialNumber": f"urn:uuid:{uuid.uuid5(NAMESPACE, json.dumps([top, components], sort_keys=True))}",
        "version": 1,
        "metadata": {"component": top},
        "components": [components[name] for name in sorted(components)],
        "dependencies": [
            {"ref": refs[name], "dependsOn": sorted(refs[child] for child in children)}
            for name, children in sorted(graph.items())
        ],
    }


def write(root: Path, folder: Path) -> list[Path]:
    """Writes a document for each lock and returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for lock in LOCKS:
        path = folder / f"sbom-{Path(lock.path).stem.removeprefix('lock-')}.cdx.json"
        path.write_text(json.dumps(document(root, lock), indent=1) + "\n")
        written.append(path)
    return written


def _component(kind: str, name: str, version: str, purl: str, hashes: list[str] | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"type": kind, "bom-ref": purl, "name": name, "version": version, "purl": purl}
    if hashes:
        found["hashes"] = [{"alg": "SHA-256", "content": content} for content in hashes]
    return found


def _package(name: str, block: str) -> dict[str, Any]:
    version = block.split("==", 1)[1].split()[0]
    hashes = [match.removeprefix("--hash=sha256:") for match in HASH.findall(block)]
    return _component("library", name, version, _purl(name, version), hashes)


def _purl(name: str, version: str) -> str:
    return f"pkg:pypi/{name}@{version}"


def _wanted_by(block: str) -> set[str]:
    found = VIA.search(block)
    names = [each.strip() for each in found[1].split(",")] if found else []
    return {PROJECT if name.startswith("-r ") else canonicalize_name(name) for name in names}


def _from_pins(root: Path, lock: Lock) -> list[tuple[str, dict[str, Any]]]:
    """The base image, and for the image with CUDA the wheels that no lock holds."""
    found = []
    for section, entry in pins.entries(root):
        unresolved = pins.UNRESOLVED in (entry.get("digest"), entry.get("sha256"))
        if "image" in entry:
            name, _, tag = entry["image"].rpartition(":")
            version = tag if unresolved else f"{tag}@{entry['digest']}"
            purl = f"pkg:docker/{name}@{tag if unresolved else entry['digest']}"
            component = _component("container", name, version, purl)
        elif lock.leaves_out("torch"):
            continue
        else:
            hashes = [] if unresolved else [entry["sha256"]]
            component = _component("library", section, entry["version"], _purl(section, entry["version"]), hashes)
        if unresolved:
            component["properties"] = [{"name": "nsa:digest", "value": pins.UNRESOLVED}]
        found.append((component["name"], component))
    return found


def _project(root: Path, lock: Lock) -> dict[str, Any]:
    init = (root / "nsa/__init__.py").read_text()
    version = re.search(r'^__version__ = "([^"]+)"', init, re.MULTILINE)
    name, number = PROJECT, version[1] if version else "unknown"
    top = _component("application", name, number, _purl(name, number))
    sha256 = hashlib.sha256((root / lock.path).read_bytes()).hexdigest()
    return {**top, "properties": [{"name": "nsa:lock", "value": f"{lock.path} sha256:{sha256}"}]}


def _schema_problem(path: Path) -> str:
    """What CycloneDX's schema objects to; empty if nothing. Needs cyclonedx-python-lib, which `nox -s sbom` brings."""
    try:
        from cyclonedx.schema import SchemaVersion
        from cyclonedx.validation.json import JsonStrictValidator
    except ModuleNotFoundError as error:
        raise LockError(f"{error.name} is not installed to check it with; run: nox -s sbom", CONFIGURATION) from error
    objection = JsonStrictValidator(SchemaVersion.from_version(SPEC)).validate_str(path.read_text())
    return "" if objection is None else str(objection).splitlines()[0]


def main(arguments: list[str] | None = None) -> int:
    """`nox -s sbom`: writes both documents and holds them against the schema; 78 if the locks have drifted."""
    options = argparse.ArgumentParser(prog="nox -s sbom --", description=(__doc__ or "").split("\n\n")[0])
    options.add_argument("--out", type=Path, default=ROOT / "dist", help="folder (dist)")
    args = options.parse_args(arguments)
    try:
        if problems := drift(ROOT):
            raise LockError(problems[0], CONFIGURATION)
        for path in write(ROOT, args.out):
            if problem := _schema_problem(path):
                raise LockError(f"{path.name}: not CycloneDX {SPEC}: {problem}", CONFIGURATION)
            print(f"{path.name}: {len(json.loads(path.read_text())['components'])} components, CycloneDX {SPEC}")
    except (LockError, pins.PinError) as error:
        print(f"sbom: {error}", file=sys.stderr)
        return CONFIGURATION
    return READY


if __name__ == "__main__":
    sys.exit(main())
