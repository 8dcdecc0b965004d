"""`python -m ci repro BUNDLE`: runs again what a verified bundle describes, and says what comes out differently.

Nothing in the bundle is executed: it names a commit, a profile, stages and an image, and the commands are those of
that commit in this repository. So a bundle can only make this machine do what its own history does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ci import audit, container, engine, engine_build, execute, facts, outcome, runbook
from ci.engine_options import LANES
from ci.session import MEANING, leave_exit, offline

TARGET = "artifacts.repro"
RUNBOOK = "ci/runbook.toml"
FACTS = (("commit", "git_sha"), ("profile", "profile"), ("Python", "python"), ("CPU", "cpu"), ("cores", "cores"))


class ReproError(Exception):
    """The bundle cannot be run again here; the text is a line with the reason and the remedy."""

    def __init__(self, text: str, code: int = outcome.CONFIGURATION) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True)
class Recorded:
    """What a bundle describes. `stages`: those that left a record, in the runbook's order once `plan` has seen them."""

    git_sha: str
    dirty: bool
    profile: str
    verdict: str
    exit_code: int
    verdicts: dict[str, str]
    stages: list[str]
    env: dict[str, Any]
    runbook_sha256: str


def main(args: argparse.Namespace, book: runbook.Runbook, root: Path, say: Callable[[str], None]) -> int:
    """The exit code of the second run, or why there was none."""
    try:
        with execute.stoppable():
            code = _repro(args, book, root, say)
    except (ReproError, engine.EngineError) as error:
        say(f"repro: {error}")
        code = error.code
    except execute.Stopped as stop:
        say(f"repro: {stop}: the run was ended")
        code = stop.code
    say(f"repro: exit code {code} ({MEANING.get(code, '')})")
    return leave_exit(root, "repro", code)


def read(path: Path) -> Recorded:
    """A bundle's description, once it verifies; ReproError with the first reason if it does not."""
    report = audit.verify(path)
    if not report.ok:
        code = outcome.TEST_FAILED if path.is_file() else outcome.USAGE
        raise ReproError("; ".join(report.lines()[:3]), code)
    members = _members(path, report.sha256)
    result, env = json.loads(members["artifacts/result.json"]), json.loads(members["artifacts/env.json"])
    recorded = [name for name in members if name.startswith("artifacts/results/")]
    return Recorded(
        git_sha=result["git_sha"],
        dirty=bool(result["dirty"]),
        profile=result["profile"],
        verdict=report.verdict,
        exit_code=int(result["exit_code"]),
        verdicts={f"{step['stage']}.{step['id']}": step["verdict"] for step in result["steps"]},
        stages=sorted({Path(name).name.split(".")[0] for name in recorded}),
        env=env,
        runbook_sha256=hashlib.sha256(members["runbook.toml"]).hexdigest(),
    )


def differences(recorded: Recorded, now: dict[str, Any]) -> list[str]:
    """What was not as it was, a line each: `now` is the second run's env.json."""
    then = recorded.env
    pairs: list[tuple[Any, ...]] = [(name, then.get(key), now.get(key)) for name, key in FACTS]
    pairs += [("GPUs", _gpus(then), _gpus(now)), ("image", *map(container.title, (_image(then), _image(now))))]
    versions, others = then.get("versions") or {}, now.get("versions") or {}
    names = sorted(set(versions) | set(others))
    pairs += [(name, versions.get(name, "absent"), others.get(name, "absent")) for name in names]
    return [f"{name}: {was} in the bundle, {is_} now" for name, was, is_ in pairs if was != is_]


def compare(recorded: Recorded, artifacts: Path) -> list[str]:
    """Both runs' verdicts, and each step that came out differently."""
    again = outcome.load_result(artifacts / "result.json")
    now = {f"{step.stage}.{step.id}": step.verdict for step in again.steps}
    lines = [
        f"  {key}: {recorded.verdicts.get(key, 'not there')} in the bundle, {now.get(key, 'not there')} now"
        for key in sorted(recorded.verdicts.keys() | now.keys())
        if recorded.verdicts.get(key) != now.get(key)
    ]
    same = recorded.verdict == again.verdict
    head = f"same verdict, {again.verdict}" if same else f"{recorded.verdict} in the bundle, {again.verdict} now"
    return [head + ("" if lines else ", and every step came out alike"), *lines]


def _repro(args: argparse.Namespace, book: runbook.Runbook, root: Path, say: Callable[[str], None]) -> int:
    recorded = read(args.bundle)
    say(f"repro: verified: {recorded.verdict}, commit {recorded.git_sha[:12]}, profile {recorded.profile}")
    target = root / TARGET
    shutil.rmtree(target, ignore_errors=True)
    image = None if args.native else recorded.env.get("image")
    if recorded.dirty and not args.here:
        say("repro: differs: uncommitted changes were in the bundle's tree; its commit is run without them")
    with _tree(root, "" if args.here else recorded.git_sha) as tree:
        steps = _steps(recorded, book, tree)
        commands = _commands(recorded, runbook.load(steps))
        if image:
            code = _in_image(recorded, image, commands, steps, tree, target, say)
        else:
            code = _natively(recorded, commands, steps, tree, target)
    if (target / "env.json").is_file():
        for line in differences(recorded, json.loads((target / "env.json").read_text())):
            say(f"repro: differs: {line}")
    if (target / "result.json").is_file():
        for line in compare(recorded, target):
            say(f"repro: {line}")
        say(f"repro: evidence in {TARGET}")
    return code


def _members(path: Path, sha256: str) -> dict[str, bytes]:
    """The small text members that describe the run, of exactly the file that was verified."""
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ReproError(f"{path}: changed while it was read", outcome.TEST_FAILED)
    found = {}
    with tarfile.open(path) as tar:
        for info in tar:
            name = info.name.partition("/")[2]
            wanted = name in ("runbook.toml", "artifacts/result.json", "artifacts/env.json")
            source = tar.extractfile(info) if wanted or name.startswith("artifacts/results/") else None
            if source is not None:
                found[name] = source.read()
    return found


@contextmanager
def _tree(root: Path, commit: str) -> Iterator[Path]:
    """A checkout of the commit for the time of the run, so that this tree's files stay as they are; or this tree."""
    if not commit:
        yield root
        return
    if not facts.git(root, "cat-file", "-t", f"{commit}^{{commit}}"):
        remedy = f"fetch it (git fetch origin {commit}), or run this tree instead: --here"
        raise ReproError(f"commit {commit} is not in this repository; {remedy}")
    place = Path(tempfile.mkdtemp(prefix="nsa-repro-"))
    try:
        command = ["git", "-C", str(root), "worktree", "add", "--detach", "--quiet", str(place / "tree"), commit]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ReproError(f"git cannot check {commit} out: {done.stderr.strip()}")
        yield place / "tree"
    finally:
        shutil.rmtree(place, ignore_errors=True)
        subprocess.run(["git", "-C", str(root), "worktree", "prune"], capture_output=True)


def _steps(recorded: Recorded, book: runbook.Runbook, tree: Path) -> Path:
    """The runbook to run by: the commit's own, or the one that --steps names; it must be the one that judged."""
    for path in (tree / RUNBOOK, book.path):
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == recorded.runbook_sha256:
            return path
    remedy = "if you have that runbook, name it: python -m ci --steps FILE repro BUNDLE"
    raise ReproError(f"the bundle was judged by a runbook that is not its commit's {RUNBOOK}; {remedy}")


def _commands(recorded: Recorded, book: runbook.Runbook) -> list[list[str]]:
    """Arguments of `python -m ci`, in order: everything, or the stages that ran and a report over them."""
    stages = [stage.id for stage in book.stages if stage.id in recorded.stages]
    if len(stages) == len(book.stages):
        return [["readiness"]]
    return [*(["stage", stage] for stage in stages), ["report"]]


def _natively(recorded: Recorded, commands: list[list[str]], steps: Path, tree: Path, target: Path) -> int:
    command = [sys.executable, "-m", "ci", "--root", str(tree), "--profile", recorded.profile, "--steps", str(steps)]
    dropped = ("NSA_CI_ROOT", "NSA_CI_STEPS", "NSA_CI_PROFILE")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    environment |= {"PYTHONPATH": str(tree), "NSA_CI_ARTIFACTS": str(target)}
    code = outcome.READY
    for arguments in commands:
        process = subprocess.Popen([*command, *arguments], cwd=tree, env=environment)
        try:
            code = process.wait()
        except execute.Stopped:
            process.terminate()
            process.wait()
            raise
    return code


def _in_image(
    recorded: Recorded,
    image: dict[str, Any],
    commands: list[list[str]],
    steps: Path,
    tree: Path,
    target: Path,
    say: Callable[[str], None],
) -> int:
    client = engine.connect()
    name = _find_image(client, image, tree, say)
    lines = [" ".join(["python", "-m", "ci", *arguments]) for arguments in commands]
    environment, mounts = {"NSA_CI_PROFILE": recorded.profile}, {}
    if steps != tree / RUNBOOK:
        environment["NSA_CI_STEPS"], mounts[steps] = "/runbook.toml", "/runbook.toml"
    request = engine.Request(
        image=name,
        command=["bash", "-c", "; ".join(lines)],
        environment=environment,
        mounts=mounts,
        gpus=str(recorded.env.get("gpus_asked") or ("all" if recorded.env.get("gpus") else "")),
        network="none" if offline() or not recorded.env.get("network") else "bridge",
    )
    finished = engine.run(client, request, target, say)
    if finished.said:
        say(f"repro: {finished.said}")
    return finished.code


def _find_image(client: Any, image: dict[str, Any], tree: Path, say: Callable[[str], None]) -> str:
    """The very image if the engine has it; else one built from the commit for the same lane, which is said."""
    known = str(image.get("id", ""))
    if known:
        try:
            return str(engine.ours(client, known).id)
        except engine.EngineError:
            say(f"repro: differs: image {known[:19]} is not in this engine; one is built from the commit")
    lane = LANES.get(str(image.get("lane")))
    if lane is None:
        raise ReproError(f"the bundle names an image lane {image.get('lane')!r} that this project does not have")
    base = str(image["base"]) if image.get("stand_in") else ""
    if base and base != os.environ.get("NSA_CI_BASE"):
        said = f"the bundle's image stands on {base!r}, which is not the pinned base"
        raise ReproError(f"{said}; if you trust that image name it yourself: NSA_CI_BASE={base}")
    wanted = engine_build.plan(tree, lane, base=base, flash_attn=image.get("flash_attn") != "absent")
    return engine_build.ensure(client, tree, wanted, say)


def _image(env: dict[str, Any]) -> dict[str, Any]:
    return env.get("image") or {}


def _gpus(env: dict[str, Any]) -> str:
    return ", ".join(str(gpu.get("name")) for gpu in env.get("gpus") or []) or "none"
