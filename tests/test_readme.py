"""The README says only what holds: its code runs, its table is the runbook's, its links and commands exist."""

import re
from pathlib import Path

from ci import document, runbook, workflow

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_python_example_runs(capsys):
    (example,) = blocks("python")
    exec(compile(example, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "Reads(cmp=" in printed
    assert "torch.Size([1, 305])" in printed


def test_stage_table_is_the_runbooks():
    assert document.with_table(README, runbook.load()) == README


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_command_is_run_by_the_gate():
    jobs = workflow.load(ROOT / ".github/workflows/ci.yml")["jobs"].values()  # the gate runs these steps
    run = {line for job in jobs for step in job["steps"] for line in step.get("run", "").splitlines()}
    commands = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines() if line.strip()]
    assert commands
    assert [command for command in commands if command not in run] == []
