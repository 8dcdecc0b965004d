"""docker/pins.toml: only what a server really served is recorded, and what cannot be fetched keeps its entry."""

from __future__ import annotations

import hashlib
import io
import json
import re
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ci import lock, pins

ROOT = Path(__file__).resolve().parent.parent
INDEX = json.dumps({"schemaVersion": 2, "manifests": []}).encode()
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
DIGEST = "sha256:" + hashlib.sha256(INDEX).hexdigest()


def wheel(name: str = "flash_attn", version: str = "2.6.3") -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as file:
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n\nText\nVersion: 9\n"
        file.writestr(f"{name}-{version}.dist-info/METADATA", metadata)
    return sink.getvalue()


class Server(ThreadingHTTPServer):
    """A registry on the loopback: `answers` by path, (status, headers, body); `asked`: path and Authorization."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.token = ""

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        status, headers, body = self.server.answers.get(self.path, (404, {}, b""))
        known = self.headers.get("Authorization") == f"Bearer {self.server.token}"
        if self.server.token and self.path.startswith("/v2/") and not known:
            realm = f'Bearer realm="http://{self.server.host}/token",service="here",scope="pull"'
            status, headers, body = 401, {"WWW-Authenticate": realm}, b""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Not into the tests' output."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server() as registry:
        threading.Thread(target=registry.serve_forever, args=(0.02,), daemon=True).start()
        registry.answers["/v2/library/base/manifests/3"] = (200, {"Content-Type": INDEX_TYPE}, INDEX)
        registry.answers["/wheel.whl"] = (200, {}, wheel())
        yield registry
        registry.shutdown()


@pytest.fixture
def tree(tmp_path: Path, server: Server) -> Path:
    text = f"""# remarks stay
schema = 1

[base]  # of the index
image = "{server.host}/library/base:3"
digest = "unresolved"

[flash-attn]  # of the wheel
version = "2.6.3"
url = "http://{server.host}/wheel.whl"
sha256 = "unresolved"
"""
    (tmp_path / "docker").mkdir()
    (tmp_path / pins.PINS).write_text(text)
    return tmp_path


def test_what_a_registry_serves_is_recorded_and_nothing_else_changes(tree: Path):
    before = (tree / pins.PINS).read_text()
    done, failed = pins.resolve(tree)
    sha = hashlib.sha256(wheel()).hexdigest()
    assert (len(done), failed) == (2, [])
    expected = before.replace('digest = "unresolved"', f'digest = "{DIGEST}"')
    assert (tree / pins.PINS).read_text() == expected.replace('sha256 = "unresolved"', f'sha256 = "{sha}"')


def test_what_is_recorded_is_asked_for_again_only_to_renew_it(tree: Path, server: Server):
    pins.resolve(tree)
    server.asked.clear()
    assert pins.resolve(tree) == ([], [])
    assert server.asked == []
    newer = INDEX.replace(b"[]", b"[{}]")
    server.answers["/v2/library/base/manifests/3"] = (200, {"Content-Type": INDEX_TYPE}, newer)
    done, failed = pins.resolve(tree, upgrade=True)
    assert failed == []
    assert pins.load(tree)["base"]["digest"] == "sha256:" + hashlib.sha256(newer).hexdigest()
    assert done[1].endswith("unchanged")


def test_a_pull_token_is_fetched_where_the_registry_asks_for_one(tree: Path, server: Server):
    server.token = "t0ken"
    server.answers["/token?service=here&scope=pull"] = (200, {}, b'{"token": "t0ken"}')
    assert pins.resolve(tree)[1] == []
    assert pins.load(tree)["base"]["digest"] == DIGEST
    assert [who for path, who in server.asked if not path.startswith("/v2/")] == [None, None]


@pytest.mark.parametrize(
    ("path", "answer", "said"),
    [
        ("/v2/library/base/manifests/3", (404, {}, b""), "answers 404: no such image, tag or file"),
        ("/v2/library/base/manifests/3", (500, {}, b""), "answers 500"),
        ("/v2/library/base/manifests/3", (200, {"Content-Type": "text/html"}, b"hello"), "not an image manifest"),
        (
            "/v2/library/base/manifests/3",
            (200, {"Content-Type": INDEX_TYPE, "Docker-Content-Digest": "sha256:" + "0" * 64}, INDEX),
            "not the one it names",
        ),
        ("/v2/library/base/manifests/3", (401, {"WWW-Authenticate": "Basic"}, b""), "log-in that is not anonymous"),
        (
            "/v2/library/base/manifests/3",
            (401, {"WWW-Authenticate": 'Bearer realm="http+x://elsewhere/"'}, b""),
            "log-in that is not anonymous",
        ),
        ("/wheel.whl", (404, {}, b""), "answers 404"),
        ("/wheel.whl", (200, {}, b"<html>sign in</html>"), "not a wheel"),
        ("/wheel.whl", (200, {}, wheel()[:-30]), "not a wheel"),
        ("/wheel.whl", (200, {"Content-Length": "9999"}, wheel()), "of 9999 bytes"),
        ("/wheel.whl", (200, {}, wheel(version="2.6.4")), "is flash-attn 2.6.4, not flash-attn 2.6.3"),
        ("/wheel.whl", (200, {}, wheel(name="flash_attn_3")), "is flash-attn-3 2.6.3, not"),
    ],
)
def test_what_is_not_what_was_asked_for_is_refused_in_a_line(tree: Path, server: Server, path, answer, said):
    server.answers[path] = answer
    _, (failure,) = pins.resolve(tree)
    assert said in failure
    assert failure.endswith("it stays 'unresolved'")
    assert "\n" not in failure
    assert "unresolved" in {pins.load(tree)["base"]["digest"], pins.load(tree)["flash-attn"]["sha256"]}


def test_a_wheel_that_was_replaced_is_a_failure_and_not_an_update(tree: Path, server: Server):
    pins.resolve(tree)
    recorded = pins.load(tree)["flash-attn"]["sha256"]
    server.answers["/wheel.whl"] = (200, {}, wheel() + b"\0")
    _, (failure,) = pins.resolve(tree, upgrade=True)
    assert "replaced after it was recorded" in failure
    assert pins.load(tree)["flash-attn"]["sha256"] == recorded


def test_a_host_that_is_not_there_keeps_the_entry(tree: Path, server: Server):
    server.shutdown()
    server.server_close()
    before = (tree / pins.PINS).read_bytes()
    done, failed = pins.resolve(tree)
    assert done == []
    assert [re.search(r"127\.0\.0\.1:\d+ cannot be reached \(.+\); it stays", line) is not None for line in failed] == [
        True
    ] * 2
    assert (tree / pins.PINS).read_bytes() == before


@pytest.mark.parametrize(
    ("image", "parts"),
    [
        ("python:3.11-slim", ("registry-1.docker.io", "library/python", "3.11-slim")),
        ("nvidia/cuda:12.1.1-base", ("registry-1.docker.io", "nvidia/cuda", "12.1.1-base")),
        ("mirror.example/a/b:1", ("mirror.example", "a/b", "1")),
        ("localhost:5000/a:1", ("localhost:5000", "a", "1")),
    ],
)
def test_an_image_name_is_read_as_docker_reads_it(image: str, parts: tuple[str, str, str]):
    assert pins._parts(image) == parts


@pytest.mark.parametrize("image", ["python", "python:", "localhost:5000/a", "Python:3", "a:b:c d", "../etc:1?x"])
def test_an_image_without_a_plain_tag_is_refused(image: str):
    with pytest.raises(pins.PinError, match="name:tag"):
        pins.manifest_digest(image)


@pytest.mark.parametrize("url", ["http://example.invalid/x.whl", "file:///etc/hostname", "ftp://127.0.0.1/x"])
def test_a_wheel_is_fetched_over_https_alone(url: str):
    with pytest.raises(pins.PinError, match="no way to fetch it"):
        pins.wheel_digest(url, "flash-attn", "2.6.3")


@pytest.mark.parametrize("text", ["[base]\nimage = 'a:1'\n", "[x]\nurl = 'http://x/'\n", "schema = [", None])
def test_a_file_that_is_no_list_of_pins_is_refused_in_a_line(tree: Path, text: str | None):
    (tree / pins.PINS).unlink()
    if text is not None:
        (tree / pins.PINS).write_text(text)
    with pytest.raises(pins.PinError, match=r"^docker/pins\.toml[^\n]*$"):
        pins.resolve(tree)


def test_the_projects_own_pins_are_recorded_digests_or_unresolved():
    for section, entry in pins.entries(ROOT):
        recorded = entry["digest"] if "image" in entry else f"sha256:{entry['sha256']}"
        assert re.fullmatch(r"unresolved|sha256:([0-9a-f]{64}|unresolved)", recorded), section


def test_nox_s_lock_says_75_while_a_pin_is_unresolved(tree: Path, server: Server, monkeypatch, capsys):
    server.answers.clear()
    monkeypatch.setattr(lock, "ROOT", tree)
    monkeypatch.setattr(lock, "write", lambda root, upgrade: ["locks written"])
    monkeypatch.setattr(lock, "drift", lambda root: [])
    assert lock.main([]) == 75
    assert lock.main(["--no-pins"]) == 0
    assert capsys.readouterr().err.count("it stays 'unresolved'") == 2
