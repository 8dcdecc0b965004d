"""`python -m ci image LANE [COMMAND ...]`: builds the lane's image if it is stale, and runs it."""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from ci import engine, engine_build, execute, outcome
from ci.engine_options import LANES, PROGRAMS
from ci.session import MEANING, leave_exit, offline

FORWARDED = ("NSA_CI_PROFILE", "NSA_CI_RUN_ID", "NSA_CI_STEPS", "NSA_CI_ROOT")


def main(args: argparse.Namespace, root: Path, say: Callable[[str], None]) -> int:
    """The exit code of what ran inside, or why it could not run; artifacts/exit.json holds it too."""
    started = time.monotonic()
    try:
        with execute.stoppable():
            code, said = _image(args, root, say)
    except engine.EngineError as error:
        code, said = error.code, str(error)
    except execute.Stopped as stop:
        code, said = stop.code, f"{stop}: the container was ended and removed"
    if said:
        say(f"image: {said}")
    say(
        f"image: exit code {code} ({MEANING.get(code, 'the command gave it')}) after {time.monotonic() - started:.0f} s"
    )
    leave_exit(root, "image", code, lane=args.lane, said=said)
    return code


def _image(args: argparse.Namespace, root: Path, say: Callable[[str], None]) -> tuple[int, str]:
    lane = LANES[args.lane]
    client = engine.connect()
    if args.image:
        name = args.image
    else:
        wanted = engine_build.plan(root, lane, base=args.base, flash_attn=not args.without_flash_attn)
        engine_build.ensure(client, root, wanted, say)
        name = wanted.tag
        if args.build_only:
            say(f"image: {name}")
            return outcome.READY, ""
    target = _target(args, root)
    finished = engine.run(client, request(args, name), target, say)
    if finished.files:
        say(f"image: {finished.files} files in {os.path.relpath(target, root)}")
    return finished.code, finished.said


def request(args: argparse.Namespace, name: str) -> engine.Request:
    """The container that the command line asks for."""
    what = args.what[1:] if args.what[:1] == ["--"] else args.what
    environment = {name: os.environ[name] for name in FORWARDED if os.environ.get(name)}
    if args.profile:
        environment["NSA_CI_PROFILE"] = args.profile
    if offline():
        environment["NSA_CI_OFFLINE"] = "1"
    gpus = args.gpus or ("all" if args.lane == "gpu" else "")
    judged = not what or (what[0] not in PROGRAMS and not what[0].startswith(("-", "/")))
    return engine.Request(
        image=name,
        command=what,
        environment=environment,
        gpus="" if gpus == "none" else gpus,
        network=args.network or "none",
        memory=args.memory,
        timeout=args.timeout,
        judged=judged,
    )


def _target(args: argparse.Namespace, root: Path) -> Path:
    if args.artifacts is None:
        target = root / f"artifacts.image-{args.lane}"
        shutil.rmtree(target, ignore_errors=True)
    else:
        target = Path(args.artifacts)
        if target.is_dir() and any(target.iterdir()):
            raise engine.EngineError(
                f"{target} is not empty; name a new folder for the evidence", outcome.CONFIGURATION
            )
    target.mkdir(parents=True, exist_ok=True)
    return target
