"""summary.html opens offline, says the verdict in words, draws what was measured, and escapes what steps printed."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_factory import Run, make_run

from ci.html import render_html

VOID = {"meta", "br", "link", "img", "use", "path", "hr"}
LOADING = {"src", "href", "srcset", "data", "action", "poster", "xlink:href", "background"}


class Page(HTMLParser):
    """Collects what a browser would load or run, the visible text, and whether elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in LOADING and not (value or "").startswith("#"):
                self.loads.append(f"{tag} {name}={value}")
            if name.startswith("on"):
                self.loads.append(f"{tag} {name}")
            if name == "id":
                self.ids.append(value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path)


def page(run: Run) -> Page:
    return Page(render_html(run.result, run.artifacts, run.book))


def words(run: Run) -> str:
    return " ".join(" ".join(page(run).text).split())


def everything(run: Run) -> Run:
    run.write("test-reports/needle.json", json.dumps([{"S": 2048, "depth": 0.5, "score": 0.9, "passed": True}]))
    run.write("test-reports/kernels.json", json.dumps([{"kernel": "selected_fwd", "arch": "sm_80", "registers": 168}]))
    return run


def test_loads_nothing_and_runs_nothing(run: Run) -> None:
    text = render_html(everything(run).result, run.artifacts, run.book)
    parsed = Page(text)
    assert parsed.loads == []
    assert not {"script", "link", "iframe", "object", "img", "base", "form"} & set(parsed.tags)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert "http://" not in text
    assert "https://" not in text


def test_is_well_formed_with_unique_ids(run: Run) -> None:
    parsed = page(everything(run))
    assert parsed.open == []
    assert len(parsed.ids) == len(set(parsed.ids))


def test_says_the_verdict_in_words_and_what_is_open(run: Run) -> None:
    text = words(run)
    assert "READY ON CPU" in text
    assert "Not proven here" in text
    assert "Triton forward against the reference needs CUDA" in text


@pytest.mark.parametrize(("verdict", "code"), [("READY", 0), ("READY ON CPU", 0), ("NOT READY", 3)])
def test_colour_follows_the_verdict(run: Run, verdict: str, code: int) -> None:
    run.result = replace(run.result, verdict=verdict, exit_code=code)  # type: ignore[arg-type]
    tone = {"READY": "good", "READY ON CPU": "part", "NOT READY": "bad"}[verdict]
    assert f'<body class="{tone}">' in render_html(run.result, run.artifacts)


def test_a_failure_comes_first_with_its_command(run: Run) -> None:
    first, *rest = run.result.steps
    first = replace(first, verdict="FAILED", reason="test_taps: assert 2 == 3", exit_code=1, failed=1)
    run.result = replace(run.result, verdict="NOT READY", exit_code=1, steps=[first, *rest])
    text = words(run)
    assert "Training should not start: 1 of 6 steps did not hold." in text
    assert text.index("test_taps: assert 2 == 3") < text.index("Every step")
    assert "pytest -q -k 'masks or blocks'" in text


def test_draws_what_was_measured(run: Run) -> None:
    text = words(everything(run))
    assert page(run).tags.count("svg") == 4
    for fact in (
        "Loss falls: 5.526 to 2.62 in 200 steps, 2.79 on held-out text.",
        "NSA takes 1.2x the time, dense 8x; at the end it is 3x faster than dense (7.2 ms).",
        "Counted reads (dots) equal the expected ones (line) at all 4 lengths.",
        "The needle is found at 1 of 1 lengths and depths.",
        "1 launches fit; compiled for sm_80.",
        "selected_fwd",
        "Fixture CPU 9000",
        "1 Correctness",
    ):
        assert fact in text, fact


def test_a_wrong_read_count_is_named_not_smoothed(run: Run) -> None:
    path = run.artifacts / "bench/decode.csv"
    path.write_text(path.read_text().replace(",1663,1663,", ",1664,1663,"))
    assert "Counted reads differ from the expected ones at S = 2,048." in words(run)


def test_hostile_output_stays_text(run: Run) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    first, *rest = run.result.steps
    first = replace(first, title=evil, skip_reasons=[evil], reason=evil, reproduce=evil, deliverables=[evil])
    run.result = replace(
        run.result, steps=[first, *rest], not_proven=[evil], env={evil: evil}, run_id=evil, git_sha=evil
    )
    run.write("test-reports/kernels.json", json.dumps([{"kernel": evil, evil: evil}]))
    run.write("bench/decode.csv", f"{evil}\n")
    run.write(f"{evil.replace('/', '')}/training.csv", "step,loss,lr,toks_per_s\n1,2,3,4\n")
    parsed = page(run)
    assert parsed.loads == []
    assert "script" not in parsed.tags
    assert "img" not in parsed.tags
    assert evil in "".join(parsed.text)


def test_an_empty_folder_still_gives_a_page(run: Run, tmp_path: Path) -> None:
    text = render_html(run.result, tmp_path / "nothing")
    assert "READY ON CPU" in text
    assert "<svg" not in text
    assert "not written" in text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train_showcase/training.csv", "step,loss,lr,toks_per_s\n1,nan,1,1\n2,inf,1,1\n"),
        ("train_showcase/training.csv", "step,loss,lr,toks_per_s\n1,5,1,1\n"),
        ("bench/decode.csv", "S,ms_total,ms_cmp,ms_sel,ms_win,reads_actual,reads_expected\n512,0,0,0,0,0,0\n"),
        ("bench/decode.csv", "S,ms_total,ms_cmp,ms_sel,ms_win,reads_actual,reads_expected\n0,-1,nan,0,0,0,0\n"),
        ("bench/decode.csv", "what\nis this\n"),
        ("test-reports/needle.json", '[{"S": 1, "depth": 0, "score": 1e308}]'),
        ("test-reports/kernels.json", '[{"kernel": {"a": 1}}]'),
    ],
)
def test_odd_numbers_and_broken_files_give_a_page(run: Run, name: str, content: str) -> None:
    run.write(name, content)
    assert "READY ON CPU" in words(run)


def test_the_same_run_gives_the_same_page(run: Run) -> None:
    assert render_html(run.result, run.artifacts) == render_html(run.result, run.artifacts)
