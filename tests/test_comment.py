"""The comment goes to the pull request whose head is the commit, replaces the bot's own, and fails loudly otherwise."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from ci import comment

HEAD = "a" * 40
BODY = "<!-- nsa-readiness: ci -->\nREADY\n"
BOT = {"login": "github-actions[bot]"}


class Server:
    """GitHub's API as far as it is asked, over HTTP; `seen` holds the requests that change something."""

    def __init__(self) -> None:
        self.pulls = [{"number": 7, "head": {"sha": HEAD}}, {"number": 8, "head": {"sha": "b" * 40}}]
        self.comments: list[dict] = []
        self.seen: list[tuple[str, str, str]] = []
        self.broken = False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                url = urlsplit(self.path)
                length = int(self.headers.get("Content-Length") or 0)
                sent = json.loads(self.rfile.read(length)) if length else {}
                if self.command != "GET":
                    outer.seen.append((self.command, url.path, sent["body"]))
                found = outer.pulls if url.path.endswith("/pulls") else outer.comments
                page, size = (int(parse_qs(url.query).get(key, ["1"])[0]) for key in ("page", "per_page"))
                data = json.dumps(found[(page - 1) * size : page * size]).encode()
                self.send_response(502 if outer.broken else 200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PATCH = answer

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def github(monkeypatch):
    fake = Server()
    monkeypatch.setenv("GITHUB_API_URL", f"http://127.0.0.1:{fake.server.server_port}")
    monkeypatch.setenv("GITHUB_REPOSITORY", "owner/name")
    monkeypatch.setenv("GITHUB_TOKEN", "not-a-token")
    yield fake
    fake.server.shutdown()


def post(tmp_path: Path, body: str = BODY, head: str = HEAD) -> int:
    file = tmp_path / "comment.md"
    file.write_text(body)
    return comment.main([str(file), "--head", head])


def test_the_first_comment_is_written(github, tmp_path):
    assert post(tmp_path) == 0
    assert github.seen == [("POST", "/repos/owner/name/issues/7/comments", BODY)]


def test_the_bots_own_comment_of_the_same_workflow_is_replaced(github, tmp_path):
    github.comments = [
        {"id": 1, "user": {"login": "somebody"}, "body": BODY},
        {"id": 2, "user": BOT, "body": BODY.replace(" ci ", " gpu ")},
        *({"id": 100 + number, "user": BOT, "body": "other"} for number in range(150)),
        {"id": 3, "user": BOT, "body": BODY + "before"},
    ]
    assert post(tmp_path) == 0
    assert github.seen == [("PATCH", "/repos/owner/name/issues/comments/3", BODY)]


def test_a_commit_that_is_no_open_head_any_more_gets_none(github, tmp_path, capsys):
    assert post(tmp_path, head="c" * 40) == 0
    assert github.seen == []
    assert "no open pull request has the head" in capsys.readouterr().out


def test_the_pull_request_may_stand_on_a_later_page(github, tmp_path):
    others = [{"number": 1000 + number, "head": {"sha": "d" * 40}} for number in range(230)]
    github.pulls = [*others, *github.pulls]
    assert post(tmp_path) == 0
    assert github.seen[0][1].endswith("/issues/7/comments")


def test_github_failing_is_75(github, tmp_path, capsys):
    github.broken = True
    assert post(tmp_path) == 75
    assert "HTTP Error 502" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("body", "head", "says"),
    [
        ("READY\n", HEAD, "its first line is no marker"),
        (BODY + "x" * 70_000, HEAD, "longer than the 65536 characters"),
        (BODY, "main", "not a commit of 40 hex digits"),
    ],
)
def test_what_is_no_comment_of_ours_is_not_posted(github, tmp_path, capsys, body, head, says):
    with pytest.raises(SystemExit) as stop:
        post(tmp_path, body, head)
    assert (stop.value.code, says in capsys.readouterr().err) == (2, True)
    assert github.seen == []


def test_without_a_token_nothing_is_asked(github, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("GITHUB_TOKEN")
    with pytest.raises(SystemExit) as stop:
        post(tmp_path)
    assert (stop.value.code, "GITHUB_TOKEN must be set" in capsys.readouterr().err) == (2, True)
