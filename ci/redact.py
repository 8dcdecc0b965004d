"""Keeps secrets and home folders out of what leaves the machine.

Values of secret-looking variables and strings in well-known token formats are replaced by a mark that names them; the
repository's root becomes `.`, the home folder `~`, and JUnit's host name goes. A secret inside a binary file cannot be
masked: SecretFound.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from urllib.parse import quote

SECRET_NAME = re.compile(
    r"(?:^|[^A-Z0-9])(?:TOKENS?|SECRETS?|PASS|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|KEY|APIKEY|AUTH|COOKIE|PAT)"
    r"(?:[^A-Z0-9]|$)",
    re.IGNORECASE,
)
MIN_SECRET = 8  # shorter values ("true", a port) occur in every log
URL_PASSWORD = re.compile(r"://[^/\s:@]*:([^/\s@]+)@")
TOKEN_FORMATS = re.compile(
    rb"gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,}|hf_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16}"
    rb"|xox[abpr]-[A-Za-z0-9-]{20,}|-----BEGIN [A-Z ]*PRIVATE KEY-----[^-]*(?:-----END [A-Z ]*PRIVATE KEY-----)?"
)
HOST = re.compile(rb'(<testsuite\b[^>]*?) hostname="[^"]*"')


class SecretFound(ValueError):
    """A file that cannot be masked holds a secret."""


class Redactor:
    """Masks bytes. Holds the secrets it knows, longest first, so that one inside another leaves no remainder."""

    def __init__(self, secrets: Mapping[str, str], *, root: Path | None = None, home: Path | None = None) -> None:
        found: dict[bytes, str] = {}
        for name, value in secrets.items():
            for form in _forms(value):
                found.setdefault(form, name)
        self._secrets = sorted(found.items(), key=lambda item: (-len(item[0]), item[0]))
        places = [(root, b"."), (home, b"~")]
        self._paths = [(_path_pattern(path), mark) for path, mark in places if path and len(path.parts) > 1]

    def clean(self, name: str, data: bytes) -> bytes:
        """The bytes as they may be published. SecretFound names the file and the variable if they cannot be masked."""
        text = b"\0" not in data[:8192]
        for value, variable in self._secrets:
            if value in data:
                if not text:
                    raise SecretFound(f"{name}: holds the value of ${variable} in a binary file; remove it")
                data = data.replace(value, f"[masked:{variable}]".encode())
        if not text:
            if TOKEN_FORMATS.search(data):
                raise SecretFound(f"{name}: holds an access token in a binary file; remove it")
            return data
        data = TOKEN_FORMATS.sub(b"[masked:token]", data)
        for pattern, mark in self._paths:
            data = pattern.sub(mark, data)
        return HOST.sub(rb"\1", data) if name.endswith(".xml") else data


def secrets_in(variables: Mapping[str, str]) -> dict[str, str]:
    """Name to value of what looks secret: by the words of its name, or a password inside a URL."""
    secrets = {}
    for name, value in variables.items():
        if SECRET_NAME.search(name) and len(value) >= MIN_SECRET and not _names_a_file(value):
            secrets[name] = value
        for password in URL_PASSWORD.findall(value):
            if len(password) >= MIN_SECRET:
                secrets[name] = password
    return secrets


def _names_a_file(value: str) -> bool:
    return "\n" not in value and len(value) < 4096 and value.startswith("/") and Path(value).exists()


def _forms(value: str) -> Iterable[bytes]:
    raw = value.encode()
    spelled = (json.dumps(value)[1:-1], repr(value)[1:-1], escape(value), quote(value, safe=""))
    return {raw, base64.b64encode(raw).rstrip(b"="), *(form.encode() for form in spelled)}


def _path_pattern(path: Path) -> re.Pattern[bytes]:
    """The path as a whole; in JSON the letter of an escaped line break may stand before it."""
    return re.compile(rb"(?:(?<![\w.-])|(?<=\\[nrt]))" + re.escape(str(path).encode()) + rb"(?![\w-])")
