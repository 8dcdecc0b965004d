"""Reads workflow files as GitHub does: YAML 1.2, and what refers to what."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml


class WorkflowError(ValueError):
    """A workflow that cannot be read, or not be run here; the text names file, job and step, and the reason."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's booleans: `on` is a key, not true."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(?:true|false)$"), list("tf"))


def load(path: Path) -> dict[str, Any]:
    """A YAML file as GitHub reads it; WorkflowError if it is none."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise WorkflowError(f"{path}: unreadable ({' '.join(str(error).split())})") from error


def parse(text: str) -> dict[str, Any]:
    """The text of such a file; yaml.YAMLError if it is no mapping."""
    data = yaml.load(text, _Loader)
    if not isinstance(data, dict):
        raise yaml.YAMLError("not a mapping")
    return data


def texts(value: Any) -> Iterator[str]:
    """Every string inside a parsed file, but for keys."""
    if isinstance(value, dict):
        for item in value.values():
            yield from texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)
    elif isinstance(value, str):
        yield value


def needs_of(job: dict[str, Any]) -> list[str]:
    """The jobs that a job waits for; one may be written without its list."""
    needs = job.get("needs") or []
    return [needs] if isinstance(needs, str) else list(needs)


def ordered(path: Path, jobs: dict[str, Any]) -> Iterator[str]:
    """Job names, each after its needs, otherwise as written."""
    left = list(jobs)
    done: set[str] = set()
    while left:
        for name in left:
            if set(needs_of(jobs[name])) <= done:
                break
        else:
            raise WorkflowError(f"{path}: the needs of {', '.join(left)} are circular or name no job")
        left.remove(name)
        done.add(name)
        yield name
