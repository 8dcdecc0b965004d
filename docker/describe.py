"""Build-time helper of the Dockerfiles, standard library only (Python 3.11).

describe.py base BASE STAND_IN                   refuses a base that is neither the pinned one nor named a stand-in
describe.py image LANE BASE REVISION DIRTY       prints what the image is made of, as JSON, for env.json
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import tomllib

ROOT = Path(__file__).resolve().parent.parent


def pinned() -> str:
    """IMAGE@DIGEST of docker/pins.toml, or an empty string while the digest is unresolved."""
    base = tomllib.loads((ROOT / "docker/pins.toml").read_text())["base"]
    known = re.fullmatch(r"sha256:[0-9a-f]{64}", base["digest"])
    return f"{base['image']}@{base['digest']}" if known else ""


def refusal(base: str, stand_in: str) -> str:
    """Why a build on this base must not go on; empty if it may."""
    if stand_in or base == pinned():
        return ""
    want = pinned() or "unresolved: run `nox -s lock` where a registry can be reached"
    return f"base {base} is not the one of docker/pins.toml ({want}); --build-arg STAND_IN=yes takes another one"


def image(lane: str, base: str, revision: str, dirty: str) -> dict[str, Any]:
    """The lane's facts; torch's sha256 is that of the file which pip installed (the CPU lock does not hold it)."""
    facts: dict[str, Any] = {"lane": lane, "base": base, "stand_in": base != pinned()}
    facts |= {"revision": revision, "dirty": bool(dirty)}
    facts["lock_sha256"] = hashlib.sha256((ROOT / f"docker/lock-{lane}.txt").read_bytes()).hexdigest()
    report = ROOT / "torch.json"
    if report.is_file():
        (torch,) = json.loads(report.read_text())["install"]
        # pip 22.2 writes the older of the two spellings, sha256=<hex>, alone.
        archive = torch["download_info"]["archive_info"]
        facts["torch_sha256"] = archive.get("hashes", {}).get("sha256") or archive["hash"].removeprefix("sha256=")
    try:
        facts["flash_attn"] = metadata.version("flash-attn")
    except metadata.PackageNotFoundError:
        facts["flash_attn"] = "absent"
    return facts


def main(arguments: list[str]) -> int:
    """1 for a refusal, said on stderr."""
    if arguments[0] == "image":
        print(json.dumps(image(*arguments[1:]), indent=2))
        return 0
    said = refusal(*arguments[1:])
    if said:
        print(f"docker: {said}", file=sys.stderr)
    return int(bool(said))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
