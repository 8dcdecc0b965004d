"""Puts a comment on the open pull request whose head is this commit; the next run's replaces it.

    GITHUB_TOKEN=... GITHUB_REPOSITORY=owner/name python3 -m ci.comment FILE --head SHA

Standard library only: next to a token that may write, nothing is installed and nothing of the pull request is read but
FILE, whose first line marks it as its workflow's. Which pull request it goes to is GitHub's answer, not the file's.

Exit codes: 0 written, or no open pull request has this head any more; 2 usage; 75 GitHub could not be asked.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BOT = "github-actions[bot]"
MARKER = re.compile(r"<!-- nsa-readiness: [a-z-]+ -->")
LONGEST = 65_536
PAGES, PER_PAGE = 20, 100


class GitHubError(Exception):
    """GitHub did not answer as it should; the text names the request and what came back."""


class GitHub:
    """The few requests that are needed, against the API of one repository."""

    def __init__(self, api: str, repository: str, token: str) -> None:
        self.base, self.token = f"{api}/repos/{repository}", token

    def pulls(self, head: str) -> list[int]:
        """Numbers of the open pull requests whose head is this commit."""
        return [int(pull["number"]) for pull in self._all("/pulls?state=open") if pull["head"]["sha"] == head]

    def own_comment(self, pull: int, marker: str) -> int | None:
        """The bot's own comment with this marker; anybody else may write one that looks like it."""
        for comment in self._all(f"/issues/{pull}/comments?"):
            if comment["user"]["login"] == BOT and str(comment["body"]).startswith(marker):
                return int(comment["id"])
        return None

    def write(self, pull: int, body: str) -> str:
        """Writes or replaces the comment; says which."""
        before = self.own_comment(pull, body.partition("\n")[0])
        if before is None:
            self._ask("POST", f"/issues/{pull}/comments", {"body": body})
            return "written"
        self._ask("PATCH", f"/issues/comments/{before}", {"body": body})
        return "replaced"

    def _all(self, path: str) -> Iterator[dict[str, Any]]:
        for page in range(1, PAGES + 1):
            found = self._ask("GET", f"{path}&per_page={PER_PAGE}&page={page}".replace("?&", "?"))
            yield from found
            if len(found) < PER_PAGE:
                return

    def _ask(self, method: str, path: str, data: dict[str, str] | None = None) -> Any:
        headers = {"Authorization": f"Bearer {self.token}", "Accept": "application/vnd.github+json"}
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self.base + path, body, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)
        except (urllib.error.URLError, TimeoutError, ValueError) as error:
            raise GitHubError(f"{method} {path}: {error}") from error


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = argparse.ArgumentParser(
        prog="python3 -m ci.comment", description="A comment on the commit's pull request."
    )
    options.add_argument("file", type=Path)
    options.add_argument("--head", required=True, help="the commit, 40 hex digits")
    args = options.parse_args(arguments)
    repository, token = os.environ.get("GITHUB_REPOSITORY", ""), os.environ.get("GITHUB_TOKEN", "")
    body = args.file.read_text(encoding="utf-8") if args.file.is_file() else ""
    for wrong, why in (
        (not re.fullmatch(r"[0-9a-f]{40}", args.head), "--head is not a commit of 40 hex digits"),
        (
            not (re.fullmatch(r"[\w.-]+/[\w.-]+", repository) and token),
            "GITHUB_REPOSITORY and GITHUB_TOKEN must be set",
        ),
        (not MARKER.fullmatch(body.partition("\n")[0]), f"{args.file} is absent, or its first line is no marker"),
        (len(body) > LONGEST, f"{args.file} is longer than the {LONGEST} characters that GitHub takes"),
    ):
        if wrong:
            options.error(why)
    github = GitHub(os.environ.get("GITHUB_API_URL", "https://api.github.com"), repository, token)
    try:
        pulls = github.pulls(args.head)
        for pull in pulls:
            print(f"pull request {pull}: comment {github.write(pull, body)}")
    except GitHubError as error:
        print(f"comment: {error}", file=sys.stderr)
        return 75
    if not pulls:
        print(f"no open pull request has the head {args.head}; nothing written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
