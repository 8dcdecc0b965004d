"""NVIDIA hardware as the operating system and nvidia-smi show it, without torch."""

from __future__ import annotations

import csv
import subprocess
from dataclasses import dataclass
from pathlib import Path

FIELDS = (
    "name",
    "uuid",
    "driver_version",
    "compute_cap",
    "memory.total",
    "memory.used",
    "clocks_throttle_reasons.hw_thermal_slowdown",
    "clocks_throttle_reasons.hw_power_brake_slowdown",
    "ecc.errors.uncorrected.volatile.total",
)
# 14: the query was answered although an InfoROM is corrupt; the numbers are good.
ANSWERED = (0, 14)


@dataclass(frozen=True)
class Gpu:
    """One GPU; a number that the driver does not give ([N/A], ERR!) is None."""

    name: str
    uuid: str
    driver: str
    capability: str
    total_mb: int | None
    used_mb: int | None
    throttled: bool
    ecc_errors: int | None


def query() -> tuple[list[Gpu], str]:
    """(GPUs, problem). No nvidia-smi on the machine: no GPUs and no problem."""
    command = ["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return [], ""
    except subprocess.TimeoutExpired:
        return [], "nvidia-smi did not answer within 60 s"
    return parse(done.stdout, done.returncode, done.stderr)


def parse(text: str, code: int, stderr: str = "") -> tuple[list[Gpu], str]:
    """Reads the CSV of `query`. The exit code alone is not believed: a text without GPUs is a problem at any code."""
    gpus = []
    for row in csv.reader(text.splitlines(), skipinitialspace=True):
        if len(row) != len(FIELDS):
            return [], f"nvidia-smi: {' '.join(' '.join(row).split()) or 'no output'}"
        name, uuid, driver, capability, total, used, hot, brake, ecc = (cell.strip() for cell in row)
        if "ERR!" in name or not name:
            return [], f"nvidia-smi reports {name or 'no name'} for a GPU: reset it or take it out of service"
        throttled = "Active" in (hot, brake)
        gpus.append(Gpu(name, uuid, driver, capability, _number(total), _number(used), throttled, _number(ecc)))
    if code not in ANSWERED:
        said = " ".join((stderr or text).split()) or "no output"
        return [], f"nvidia-smi exits {code}: {said[:200]}"
    return gpus, "" if gpus else "nvidia-smi answers and lists no GPU"


def traces(root: Path = Path("/")) -> list[str]:
    """Signs of an NVIDIA GPU that need no working driver and no torch: device nodes, display-class PCI devices."""
    found = [f"/dev/{node.name}" for node in sorted((root / "dev").glob("nvidia[0-9]*"))]
    for device in sorted((root / "sys/bus/pci/devices").glob("*")):
        if _text(device / "vendor") == "0x10de" and _text(device / "class").startswith("0x03"):
            found.append(f"PCI {device.name}")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""  # a device may vanish between listing and reading


def _number(text: str) -> int | None:
    return int(float(text)) if text.replace(".", "", 1).isdigit() else None
