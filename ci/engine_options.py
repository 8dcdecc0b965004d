"""The images and the command lines that use them; imports no Docker SDK, since a plain stage needs none."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

# Commands of an image that end without a verdict of their own.
PROGRAMS = ("bash", "sh", "python", "python3", "pytest", "list", "bundle", "runbook")


@dataclass(frozen=True)
class Lane:
    """An image of this project: its Dockerfile, its lock, and whether it holds flash-attn."""

    name: str
    dockerfile: str
    lock: str
    flash_attn: bool = False


LANES = {
    "cpu": Lane("cpu", "docker/cpu.Dockerfile", "docker/lock-cpu.txt"),
    "gpu": Lane("gpu", "docker/gpu-cu121-torch24.Dockerfile", "docker/lock-gpu.txt", flash_attn=True),
}


def add_image(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `image` to the harness's command line."""
    image = commands.add_parser("image", help="build an image of this tree if need be, and run it")
    image.add_argument("--image", default="", help="run this image of the project instead of building one")
    image.add_argument("--base", default=os.environ.get("NSA_CI_BASE", ""), help="a stand-in for the pinned base")
    image.add_argument("--without-flash-attn", action="store_true", help="build the GPU image without it")
    image.add_argument("--build-only", action="store_true", help="build, print the image's name, and end")
    image.add_argument("--gpus", default="", help="all, or ids or UUIDs with commas (default: all for the GPU lane)")
    image.add_argument("--network", default="", help="host, bridge or a name (default: none, and nothing is fetched)")
    image.add_argument("--memory", default="", help="the container's limit, as 8g")
    image.add_argument("--timeout", type=float, default=4 * 3600, help="seconds for the whole run")
    image.add_argument("--artifacts", type=Path, help="where the evidence goes (default: artifacts.image-LANE)")
    image.add_argument("lane", nargs="?", default="cpu", choices=sorted(LANES))
    image.add_argument("what", nargs=argparse.REMAINDER, help="a command of the image (`-l` lists them); default: all")


def add_repro(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `repro` to the harness's command line."""
    repro = commands.add_parser("repro", help="run again what a bundle describes, at its commit and in its image")
    repro.add_argument("bundle", type=Path, metavar="BUNDLE")
    repro.add_argument("--here", action="store_true", help="run this tree as it is, not the bundle's commit")
    repro.add_argument("--native", action="store_true", help="on this machine, although it was made in an image")
