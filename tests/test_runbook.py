"""ci/runbook.toml says what the runbook says: every command a step, every file written by exactly one step."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ci import document, runbook
from ci.runbook import tomllib

ROOT = Path(__file__).resolve().parent.parent
FACTS = tomllib.loads((ROOT / "tests/data/runbook_commands.toml").read_text())
BOOK = runbook.load()
STEPS = {step.id: step for step in BOOK.steps}


def as_run(name: str) -> str:
    """The runbook's line with the listed deviation of its step, if it has one."""
    line = FACTS["commands"][name]
    change = FACTS["deviations"].get(name, {})
    if change.get("newlines"):
        line = line.replace(r"\n", "\n")
    if inserted := change.get("inserted"):
        line = line.replace(change["before"], inserted + change["before"])
    return line


@pytest.mark.parametrize("name", FACTS["commands"])
def test_a_command_of_the_runbook_is_run_as_it_stands(name):
    assert STEPS[name].command == as_run(name)
    assert bool(STEPS[name].deviation) == (name in FACTS["deviations"])


def test_there_is_no_step_besides_the_runbooks_and_the_listed_ones():
    assert set(STEPS) == set(FACTS["commands"]) | set(FACTS["ours"]["steps"])
    assert all(STEPS[name].deviation for name in FACTS["ours"]["steps"])


@pytest.mark.parametrize("path", [*FACTS["deliverables"]["paths"], *FACTS["deliverables"]["short"]])
def test_a_deliverable_is_written_by_exactly_one_step(path):
    writers = [step.id for step in BOOK.steps if path in {item.path for item in step.deliverables}]
    assert len(writers) == 1, writers
    assert writers[0] in FACTS["commands"], "the runbook's file must come from the runbook's command"


@pytest.mark.parametrize("path", FACTS["headers"])
def test_a_header_of_the_runbook_is_asked_for(path):
    headers = [item.header for step in BOOK.steps for item in step.deliverables if item.path == path]
    assert headers == [FACTS["headers"][path]]


def test_every_name_of_a_k_expression_must_be_seen_to_pass():
    for name, line in FACTS["commands"].items():
        wanted = re.findall(r"test_\w+", line.split("-k")[-1]) if '-k "' in line else []
        for test in wanted:
            assert any(test in pattern for pattern in STEPS[name].covers), f"{name}: {test} could vanish unnoticed"
    assert all(step.covers for step in BOOK.steps if step.kind == "pytest")


def test_no_test_outside_the_library_bears_a_name_that_the_runbook_selects():
    words = re.findall(r"test_\w+|fa2_gpu_varlen", STEPS["cpu_correctness"].command + STEPS["fa2_varlen"].command)
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        names = [*re.findall(r"(?m)^def (test_\w+)", path.read_text()), path.stem]
        assert not [name for name in names if any(word in name for word in words)], path.name


def test_what_a_command_redirects_to_is_a_deliverable_and_not_captured_twice():
    for step in BOOK.steps:
        for path in re.findall(r"> (artifacts/\S+)", step.command):
            assert path in {item.path for item in step.deliverables}, step.id
            assert path != step.output, step.id


def test_the_folders_that_commands_redirect_into_are_in_the_tree():
    tracked = subprocess.run(["git", "ls-files", "artifacts"], cwd=ROOT, capture_output=True, text=True).stdout
    if not tracked:
        pytest.skip("not a git checkout: nothing says which folders the tree ships")
    for folder in FACTS["words"]["folders"]:
        assert f"artifacts/{folder}.gitkeep" in tracked.splitlines()


def test_files_named_by_commands_exist():
    missing = []
    for step in BOOK.steps:
        named = re.findall(r"(?:scripts|bench|configs|nsa/tests)/[\w./]+\.(?:py|yaml)", step.command)
        missing += [f"{step.id}: {path}" for path in named if not (ROOT / path).is_file()]
    assert not missing


def test_every_gpu_test_module_is_proven_by_a_step():
    for path in sorted((ROOT / "nsa/tests").glob("test_*gpu*.py")):
        proven = [s.id for s in BOOK.steps if any(re.search(p, f"nsa.tests.{path.stem}::x") for p in s.covers)]
        assert proven, f"no step runs {path.name}"


def test_cpu_runs_whatever_needs_no_gpu():
    open_on_cpu = {step.id for step in BOOK.steps if step.expected("cpu") != "run"}
    assert open_on_cpu == {"triton_fwd", "triton_bwd", "gpu_ops", "sanitizer", "fa2_varlen", "m7c_ddp"}


def test_only_cpu_may_skip_for_want_of_a_gpu():
    for step in BOOK.steps:
        for profile in set(BOOK.profiles) - {"cpu"}:
            if step.id != "cpu_correctness":  # hides the GPU on purpose
                assert not any(re.search(p, "needs CUDA, and torch sees none") for p in step.allowed(profile)), step.id


def test_the_page_is_the_generated_one():
    assert (ROOT / document.DOCUMENT).read_text() == document.page(BOOK), "run: python -m ci runbook --write"


def test_the_page_holds_every_command_and_file_word_for_word():
    page = document.page(BOOK)
    for name in FACTS["commands"]:
        assert as_run(name) in page
    for path in [*FACTS["deliverables"]["paths"], *FACTS["deliverables"]["short"]]:
        assert f"`{path}`" in page
    assert FACTS["setup"]["quick_cpu"] in page


def test_the_readme_table_is_the_generated_one():
    readme = ROOT / "README.md"
    if not readme.is_file() or document.BEGIN not in readme.read_text():
        pytest.skip("README.md has no stage table")
    assert document.with_table(readme.read_text(), BOOK) == readme.read_text(), "run: python -m ci runbook --write"


def test_requirements_hold_the_runbooks_extras():
    for name in ("requirements-cpu.txt", "requirements-gpu-cu121-torch24.txt"):
        pinned = {line.split("==")[0] for line in (ROOT / name).read_text().splitlines() if "==" in line}
        assert set(FACTS["setup"]["extras"].split()[2:]) <= pinned


def test_the_facts_are_those_of_the_runbooks_text():
    path = os.environ.get("NSA_CI_RUNBOOK")
    if not path:
        pytest.skip("NSA_CI_RUNBOOK does not name a runbook to compare with")
    text = Path(path).read_text()
    for group in (FACTS["commands"], FACTS["setup"]):
        for command in group.values():
            assert command in text
    spans = re.findall(r"`([^`\n]+)`", text)
    ours = [*FACTS["commands"].values(), *FACTS["setup"].values()]
    for span in spans:
        if re.match(r"(?:[A-Z_0-9]+=\S+ )*(?:python|pytest|torchrun|pip) ", span):
            assert span in ours, f"the runbook has a command that is no fact: {span}"
        for variable in re.findall(r"\b([A-Z][A-Z0-9_]+)=", span):
            assert variable in FACTS["words"]["variables"]
        if span.startswith("artifacts/") and not span.endswith("/") and "." in span:
            assert span in FACTS["deliverables"]["paths"], f"the runbook names a file that is no fact: {span}"
    for path in FACTS["deliverables"]["paths"]:
        assert path in text
    for path in FACTS["deliverables"]["short"]:
        assert Path(path).name in text
    for word in [*FACTS["headers"].values(), *FACTS["words"]["variables"], *FACTS["words"]["folders"]]:
        assert word in text


MINIMAL = """
schema = 1
[profiles.cpu]
title = "no GPU"
gpus = 0
[[stages]]
id = "s"
number = 1
title = "t"
about = "a"
[[steps]]
id = "x"
stage = "s"
title = "t"
kind = "script"
command = "true"
timeout = 1
expect = { cpu = "run" }
deliverables = [{ path = "artifacts/a.txt" }]
"""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("schema = 1", "schema = 2", "schema must be 1"),
        ('kind = "script"', 'kind = "shell"', "x: kind 'shell'"),
        ('kind = "script"', 'kindd = "script"', "x: unknown key kindd"),
        ('command = "true"', "", "x: command is missing"),
        ("timeout = 1", 'timeout = 1\nneeds = ["tpu"]', "x: needs 'tpu'"),
        ('cpu = "run"', 'cpu = "maybe"', "x: expect.cpu = 'maybe'"),
        ('cpu = "run"', 'a100 = "run"', "x: unknown profile a100"),
        ('stage = "s"', 'stage = "other"', "x: no stage 'other'"),
        ("artifacts/a.txt", "../a.txt", "x: ../a.txt lies outside artifacts/"),
        ("timeout = 1", 'timeout = 1\noutput = "artifacts/b.txt"', "artifacts/b.txt is not among its deliverables"),
        ("timeout = 1", "timeout = 1\nallow = { cpu = ['('] }", "no regular expression"),
        ("schema = 1", "schema = [", "unreadable"),
    ],
)
def test_a_mistake_in_the_runbook_file_is_named(tmp_path, old, new, said):
    path = tmp_path / "runbook.toml"
    path.write_text(MINIMAL)
    assert runbook.load(path).steps[0].id == "x"
    path.write_text(MINIMAL.replace(old, new))
    with pytest.raises(runbook.RunbookError, match=re.escape(said)):
        runbook.load(path)


def test_two_writers_of_one_file_are_refused(tmp_path):
    path = tmp_path / "runbook.toml"
    second = MINIMAL[MINIMAL.index("[[steps]]") :].replace('id = "x"', 'id = "y"')
    path.write_text(MINIMAL + second)
    with pytest.raises(runbook.RunbookError, match="already written by x"):
        runbook.load(path)


def test_a_user_mistake_is_one_line_and_code_2(tmp_path):
    for arguments in (
        ["stage", "no_such_stage"],
        ["--profile", "tpu", "preflight"],
        ["--steps", "gone.toml", "report"],
    ):
        environment = {**os.environ, "NSA_CI_ROOT": str(tmp_path)}
        command = [sys.executable, "-m", "ci", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("lane", ["requirements-cpu.txt", "requirements-gpu-cu121-torch24.txt"])
def test_a_lane_pins_what_the_runbook_installs_on_top_of_it(lane):
    """`pip install transformers datasets` after it then has nothing to do."""
    pinned = {match[1].lower() for match in re.finditer(r"^([\w.-]+)==", (ROOT / lane).read_text(), re.M)}
    assert {"transformers", "datasets", "torch", "pytest", "pytest-xdist", "nox", "junitparser", "docker"} <= pinned
