"""What a run inside an image of this project knows about it, and whether it got the GPUs that were asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from ci.outcome import CONFIGURATION, INFRASTRUCTURE

Finding = tuple[str, Literal["ok", "note", "fail"], str, int]
IMAGE, IMAGE_ID, GPUS = "NSA_CI_IMAGE", "NSA_CI_IMAGE_ID", "NSA_CI_GPUS"


def facts() -> dict[str, Any]:
    """`image`: what docker/describe.py wrote at the build, and the id if an engine told it; `gpus_asked`: what the
    caller wanted from the engine. Nothing outside a container."""
    found: dict[str, Any] = {}
    path = os.environ.get(IMAGE, "")
    if path:
        try:
            found["image"] = dict(json.loads(Path(path).read_text()))
        except (OSError, ValueError) as error:
            found["image"] = {"error": f"{IMAGE}={path} cannot be read ({error})"}
        if os.environ.get(IMAGE_ID):
            found["image"]["id"] = os.environ[IMAGE_ID]
    if os.environ.get(GPUS):
        found["gpus_asked"] = os.environ[GPUS]
    return found


def check(facts: dict[str, Any]) -> Iterator[Finding]:
    """(name, status, detail, exit code) of each finding, as ci.preflight.Check takes them."""
    image = facts.get("image")
    if image is not None:
        yield _image(image)
    if facts.get("gpus_asked"):
        yield _gpus(facts["gpus_asked"], facts)


def title(image: dict[str, Any]) -> str:
    """The image in a line, for people; "none" for an empty one."""
    if not image or "error" in image:
        return str(image.get("error", "none"))
    base = f"base {image.get('base')}"
    if image.get("stand_in"):
        base = f"stand-in {base}, not the pinned one"
    return f"{image.get('lane')}, {base}, lock sha256 {str(image.get('lock_sha256'))[:12]}"


def _image(image: dict[str, Any]) -> Finding:
    if "error" in image:
        return ("image", "fail", image["error"], CONFIGURATION)
    return ("image", "note" if image["stand_in"] else "ok", title(image), 0)


def _gpus(asked: str, facts: dict[str, Any]) -> Finding:
    """An engine may ignore a request for GPUs without an error: only what is visible from inside counts."""
    uuids = [str(gpu["uuid"]) for gpu in facts["gpus"]]
    seen = max(len(uuids), len(facts["torch"].get("devices", [])))
    if asked == "all":
        missing = "" if seen else "all"
    else:
        wanted = asked.split(",")
        named = [each for each in wanted if each.startswith("GPU-")]
        missing = ", ".join(each for each in named if each not in uuids)
        if not missing and seen != len(wanted):
            missing = f"{len(wanted)}, {seen} visible"
    if missing:
        said = f"asked for {asked}, not inside: {missing}; the engine ignored the request"
        return ("gpus-asked", "fail", f"{said}, install the NVIDIA container toolkit", INFRASTRUCTURE)
    return ("gpus-asked", "ok", f"{asked}: visible inside", 0)
