"""Keeps secrets and home folders out of what leaves the machine.

Values of secret-looking variables and strings in well-known token formats are replaced by a mark that names them; the
repository's root becomes `.`, the home folder `~`, and JUnit's host name goes. A secret inside a binary file cannot be
masked: SecretFound.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from urllib.parse import quote, quote_plus

SECRET_NAME = re.compile(
    r"(?:(?:^|[^A-Z0-9])(?:TOKENS?|SECRETS?|CREDENTIALS?|PASS|KEY|AUTH|COOKIE|PAT|PWD)"
    r"|(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|SSHPASS|APIKEY))(?:[^A-Z0-9]|$)",
    re.IGNORECASE,
)
MIN_SECRET = 8  # shorter values ("true", a port) occur in every log
MIN_LINE = 16  # of a secret of several lines: a line alone is masked too, since logs indent
MAX_MASKED = 64 * 2**20  # larger files are data sets and weights, not logs
URL_PASSWORD = re.compile(r"://[^/\s:@]*:([^/\s@]+)@")
URL_LOGIN = re.compile(rb"(://[^/\s:@]*:)[^/\s@]{3,}(?=@)")
TOKEN_FORMATS = re.compile(
    rb"gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,}|glpat-[\w-]{20,}|hf_[A-Za-z0-9]{30,}|npm_[A-Za-z0-9]{36,}"
    rb"|pypi-[\w-]{50,}|dckr_pat_[\w-]{20,}|AKIA[0-9A-Z]{16}|AIza[\w-]{35}|xox[abpr]-[A-Za-z0-9-]{20,}"
    rb"|(?<![A-Za-z0-9])sk-[\w-]{32,}|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}"
    rb"|(?i:authorization[\"']?\s*[:=]\s*[\"']?(?:basic|bearer|token)\s+)[\w.~+/=-]{8,}"
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY-----(?:(?s:.{0,20000}?)-----END [A-Z ]*PRIVATE KEY-----|[\w+/=\\\s:,-]*)"
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
        data = self.mask(name, data)
        if _is_binary(data):
            return data
        for pattern, mark in self._paths:
            data = pattern.sub(mark, data)
        return HOST.sub(rb"\1", data) if name.endswith(".xml") else data

    def mask(self, name: str, data: bytes) -> bytes:
        """The bytes without secrets; paths and host names stay. SecretFound as in `clean`."""
        binary = _is_binary(data)
        for value, variable in self._secrets:
            if value in data:
                if binary:
                    raise SecretFound(f"{name}: holds the value of ${variable} in a binary file; remove it")
                data = data.replace(value, f"[masked:{variable}]".encode())
        if binary:
            if TOKEN_FORMATS.search(data):
                raise SecretFound(f"{name}: holds an access token in a binary file; remove it")
            return data
        return URL_LOGIN.sub(rb"\1[masked:login]", TOKEN_FORMATS.sub(b"[masked:token]", data))

    def mask_written(self, folder: Path, since: float) -> None:
        """Masks the text files below `folder` that were written since then, in place; their times stay.

        So what one process knows to be secret is gone before another, which does not, packs or uploads the file. Binary
        files are left to `clean`, which refuses them.
        """
        for path in sorted(folder.rglob("*")):
            if path.is_symlink() or not path.is_file():
                continue
            stat = path.stat()
            if stat.st_mtime < since or stat.st_size > MAX_MASKED:
                continue
            data = path.read_bytes()
            masked = data if _is_binary(data) else self.mask(path.name, data)
            if masked != data:
                path.write_bytes(masked)
                os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _is_binary(data: bytes) -> bool:
    return b"\0" in data[:8192]


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
    """How a value is spelled in logs, JSON, XML, URLs and headers; each long line of it alone, too."""
    lines = [line.strip() for line in value.splitlines()] if "\n" in value else []
    found: set[bytes] = set()
    for text in (value, *(line for line in lines if len(line) >= MIN_LINE)):
        spelled = (text, json.dumps(text)[1:-1], repr(text)[1:-1], escape(text), quote(text, safe=""), quote(text))
        found |= {form.encode() for form in (*spelled, quote_plus(text), text.encode().hex())}
        found |= {text.encode("utf-16-le"), base64.b64encode(text.encode()).rstrip(b"=")}
        found |= set(_base64_forms(text.encode()))
    return found


def _base64_forms(raw: bytes) -> Iterable[bytes]:
    """The value inside a longer base64 text, as in `user:password`: the characters that no neighbour has a part in."""
    for shift, first in ((0, 0), (1, 2), (2, 3)):
        encoded = base64.b64encode(b"\0" * shift + raw)
        last = (shift + len(raw)) * 8 // 6
        inner = encoded[first:last]
        if len(inner) >= MIN_SECRET:
            yield from (inner, inner.translate(bytes.maketrans(b"+/", b"-_")))


def _path_pattern(path: Path) -> re.Pattern[bytes]:
    """The path as a whole; in JSON the letter of an escaped line break may stand before it."""
    return re.compile(rb"(?:(?<![\w.-])|(?<=\\[nrt]))" + re.escape(str(path).encode()) + rb"(?![\w-])")
