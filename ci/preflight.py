"""Is this machine what the profile says it is, and fit to run? Pure checks over the facts of `ci.facts.gather`.

A failed check carries its exit code: 78 where a person must change something, 75 where the machine is ill.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from ci import container
from ci.outcome import CONFIGURATION, INFRASTRUCTURE
from ci.runbook import Profile, Runbook, RunbookError

PYTHONS = SpecifierSet(">=3.10")
DRIVER_FLOOR = Version("525")  # CUDA 12 minor-version compatibility
DISK_FLOOR_MB = 2048
SHM_FLOOR_MB = 1024
BUSY_SHARE = 0.2  # of a GPU's memory in use by others before a run starts


@dataclass(frozen=True)
class Check:
    """One finding. `code` is the exit code of a failure, 0 otherwise."""

    name: str
    status: Literal["ok", "note", "fail"]
    detail: str
    code: int = 0


def detect(facts: dict[str, Any]) -> str:
    """The profile this machine fits best, where nobody named one."""
    if not facts["nvidia_traces"] and not facts["gpus"] and not facts["torch"].get("cuda"):
        return "cpu"
    if facts["cuda_hidden"]:
        return "cpu"
    names = [gpu["name"] for gpu in facts["torch"].get("devices", [])]
    if names and all("A100" in name for name in names):
        return "a100x2" if len(names) > 1 else "a100"
    if names and all("4090" in name for name in names):
        return "rtx4090"
    return "gpu"


def choose(book: Runbook, wanted: str, facts: dict[str, Any]) -> Profile:
    """The named profile, or the detected one; RunbookError for a name that the runbook does not know."""
    name = wanted or detect(facts)
    if name not in book.profiles:
        raise RunbookError(f"no profile {name!r}; profiles: {', '.join(book.profiles)}")
    return book.profiles[name]


def check(profile: Profile, facts: dict[str, Any], artifacts: Path) -> list[Check]:
    """All findings; the machine may run the profile's steps if none of them is a failure."""
    findings = [*_software(facts), _disk(facts), _writable(artifacts)]
    findings += [Check(*each) for each in container.check(facts)]
    findings += _no_gpu_expected(facts) if profile.gpus == 0 else _gpus(profile, facts)
    return findings


def code(findings: list[Check]) -> int:
    """The exit code of a preflight: configuration before infrastructure, since no retry cures the first."""
    codes = {each.code for each in findings if each.status == "fail"}
    return next((each for each in (CONFIGURATION, INFRASTRUCTURE) if each in codes), 0)


def as_json(profile: Profile, findings: list[Check]) -> dict[str, Any]:
    """preflight.json."""
    return {"profile": profile.id, "exit_code": code(findings), "checks": [asdict(each) for each in findings]}


def unmet(need: str, facts: dict[str, Any]) -> str:
    """Why a step's need is not met here; empty if it is. The wording is what `allow` in runbook.toml matches."""
    devices = len(facts["torch"].get("devices", []))
    if need == "cuda":
        return "" if facts["torch"].get("cuda") else "needs CUDA, and torch sees none here"
    if need == "network":
        return "" if facts["network"] else "needs the network to fetch its dataset, and there is none here"
    if need.startswith("tool:"):
        tool = need.removeprefix("tool:")
        return "" if shutil.which(tool) else f"needs {tool}, and it is not on PATH"
    count = int(need.removeprefix("gpus>="))
    return "" if devices >= count else f"needs {count} GPUs, and torch sees {devices} here"


def _software(facts: dict[str, Any]) -> Iterator[Check]:
    python = facts["python"]
    if PYTHONS.contains(python, prereleases=True):
        yield Check("python", "ok", python)
    else:
        yield Check("python", "fail", f"Python {python}: 3.10 or newer is needed", CONFIGURATION)
    torch = facts["versions"].get("torch")
    if not torch:
        remedy = "run ci/nox, or pip install -r requirements-cpu.txt into the environment that runs nox"
        yield Check("torch", "fail", f"torch is not installed for this Python; {remedy}", CONFIGURATION)
        return
    if facts["torch"].get("error"):
        yield Check("torch", "fail", f"torch {torch} does not work: {facts['torch']['error']}", CONFIGURATION)
    else:
        yield Check("torch", "ok", torch)
    yield _triton(torch, facts)
    for line in facts["drift"] if "+cpu" in torch or not facts["gpus"] else ():
        yield Check("pins", "note", line)
    for line in facts["lock_drift"]:
        yield Check("locks", "fail", line, CONFIGURATION)


def _triton(torch: str, facts: dict[str, Any]) -> Check:
    have, want = facts["versions"].get("triton"), facts["triton_required"]
    if have and want and not SpecifierSet(want).contains(have, prereleases=True):
        said = f"Triton {have} with torch {torch}, which requires {want}; pip install 'triton{want}'"
        return Check("triton", "fail", said, CONFIGURATION)
    if not have and want and facts["torch"].get("cuda"):
        said = f"torch {torch} requires triton{want} and it is not installed; pip install 'triton{want}'"
        return Check("triton", "fail", said, CONFIGURATION)
    return Check("triton", "ok", f"{have or 'none'}, torch requires {want or 'none'}")


def _disk(facts: dict[str, Any]) -> Check:
    free = facts["disk_free_mb"]
    if free < DISK_FLOOR_MB:
        return Check("disk", "fail", f"{free} MB free, {DISK_FLOOR_MB} MB are needed; make room", INFRASTRUCTURE)
    return Check("disk", "ok", f"{free} MB free")


def _writable(artifacts: Path) -> Check:
    try:
        for name in ("test-reports", "train", "bench", "tracked", "results", "junit"):
            (artifacts / name).mkdir(parents=True, exist_ok=True)
            probe = artifacts / name / ".writable"
            probe.write_bytes(b"")
            probe.unlink()
    except OSError as error:
        said = f"artifacts/ is not writable ({error.strerror}); make it so, or mount a writable folder there"
        return Check("artifacts", "fail", said, CONFIGURATION)
    return Check("artifacts", "ok", "writable")


def _no_gpu_expected(facts: dict[str, Any]) -> Iterator[Check]:
    signs = [gpu["name"] for gpu in facts["gpus"]] or facts["nvidia_traces"]
    if not signs:
        yield Check("gpu", "ok", "none, as profile cpu says")
    elif facts["cuda_hidden"]:
        yield Check("gpu", "note", f"{', '.join(signs)} hidden by CUDA_VISIBLE_DEVICES; nothing here proves it")
    elif facts["torch"].get("cuda"):
        said = f"profile cpu on a machine with {', '.join(signs)}; name its profile, or hide it: CUDA_VISIBLE_DEVICES="
        yield Check("gpu", "fail", said, CONFIGURATION)
    else:
        yield _dead(signs, facts)


def _dead(signs: list[str], facts: dict[str, Any]) -> Check:
    why = facts["nvidia_problem"] or facts["torch"].get("error") or "driver missing, or torch built without CUDA"
    said = f"a GPU is here ({', '.join(signs)}) and torch sees no CUDA: {why}; CUDA_VISIBLE_DEVICES= would hide it"
    return Check("gpu", "fail", said, INFRASTRUCTURE)


def _gpus(profile: Profile, facts: dict[str, Any]) -> Iterator[Check]:
    devices = facts["torch"].get("devices", [])
    if not devices:
        if facts["gpus"] or facts["nvidia_traces"]:
            yield _dead([gpu["name"] for gpu in facts["gpus"]] or facts["nvidia_traces"], facts)
        else:
            said = f"profile {profile.id} and no GPU is visible; in a container add --gpus all"
            yield Check("gpu", "fail", said, INFRASTRUCTURE)
        return
    yield _fits(profile, devices)
    if facts["nvidia_problem"]:
        yield Check("nvidia-smi", "fail", facts["nvidia_problem"], INFRASTRUCTURE)
    for gpu in facts["gpus"]:
        yield from _health(gpu)
    if profile.gpus > 1 and facts["shm_mb"] < SHM_FLOOR_MB:
        said = f"/dev/shm has {facts['shm_mb']} MB, two GPUs want {SHM_FLOOR_MB}; in a container add --shm-size=8g"
        yield Check("shm", "fail", said, CONFIGURATION)
    yield from _selftest(facts.get("selftest", {}))
    if "all_reduce" in facts:
        yield _all_reduce(facts["all_reduce"])


def _fits(profile: Profile, devices: list[dict[str, Any]]) -> Check:
    shown = ", ".join(f"{d['name']} (sm_{d['capability'].replace('.', '')})" for d in devices)
    wrong = [d for d in devices if profile.name not in d["name"]]
    wrong += [d for d in devices if profile.capability not in ("", d["capability"])]
    if len(devices) < profile.gpus or wrong:
        said = f"profile {profile.id} is {profile.title}, this machine has {shown}; name the profile that fits"
        return Check("gpu", "fail", said, CONFIGURATION)
    return Check("gpu", "ok", shown)


def _health(gpu: dict[str, Any]) -> Iterator[Check]:
    number = re.match(r"\d+(\.\d+)*", gpu["driver"])
    if number and Version(number.group()) < DRIVER_FLOOR:
        said = f"{gpu['driver']}; CUDA 12 needs {DRIVER_FLOOR} or newer"
        yield Check("driver", "fail", said, CONFIGURATION)
    if gpu["ecc_errors"]:
        yield Check("ecc", "fail", f"{gpu['ecc_errors']} uncorrected memory errors; reset the GPU", INFRASTRUCTURE)
    if gpu["throttled"]:
        yield Check("throttle", "note", f"{gpu['name']} is slowed down by heat or power: its timings mean little")
    used, total = gpu["used_mb"], gpu["total_mb"]
    if used is not None and total and used > BUSY_SHARE * total:
        said = f"{gpu['name']} is busy: {used} of {total} MB in use before the run; wait, or free it"
        yield Check("memory", "fail", said, INFRASTRUCTURE)


def _all_reduce(report: dict[str, Any]) -> Check:
    wrong = report.get("error") or report["all_reduce"]
    if wrong:
        said = f"{wrong}; the GPUs do not work together: look at their links and at NCCL's own NCCL_DEBUG=INFO"
        return Check("all-reduce", "fail", said, INFRASTRUCTURE)
    return Check("all-reduce", "ok", "the GPUs' sum is right")


def _selftest(report: dict[str, Any]) -> Iterator[Check]:
    if report.get("error"):
        yield Check("selftest", "fail", report["error"], INFRASTRUCTURE)
    for device, results in report.get("devices", {}).items():
        if results["matmul"]:
            yield Check("matmul", "fail", f"{device}: {results['matmul']}; the GPU computes wrongly", INFRASTRUCTURE)
        if results["triton_add"]:
            yield Check("triton-add", "fail", f"{device}: {results['triton_add']}", CONFIGURATION)
        if not results["matmul"] and not results["triton_add"]:
            yield Check("selftest", "ok", f"{device}: matmul and Triton add are right")
    if report.get("flash_attn") not in (None, "", "not installed"):
        yield Check("flash-attn", "fail", f"installed and does not import: {report['flash_attn']}", CONFIGURATION)
    elif "flash_attn" in report:
        yield Check("flash-attn", "note" if report["flash_attn"] else "ok", report["flash_attn"] or "imports")
