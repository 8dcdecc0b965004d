"""The rules that every workflow keeps. Each is also shown to go red, on a violation planted into the real files."""

from __future__ import annotations

import ast
import functools
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ci import expressions, runbook, workflow, workflow_run

ROOT = Path(__file__).resolve().parent.parent
FILES = {path.name: path.read_text() for path in sorted((ROOT / ".github/workflows").glob("*.yml"))}
NOXFILE = (ROOT / "noxfile.py").read_text()
GATES = {"ci.yml": "ci-ok", "gpu.yml": "gpu-ok", "nightly.yml": "nightly-ok"}
# Triggers that a stranger can pull, with a workflow file of his own or with words of his own.
STRANGERS = {"pull_request", "pull_request_target", "issue_comment", "issues", "workflow_run", "fork"}
SWALLOWED = re.compile(r"\|\|\s*(true\b|:|exit 0)|;\s*true\b|set \+e|set \+o (errexit|pipefail)|^\s*exit 0$", re.M)
PIN = re.compile(r"^\s*(?:- )?uses: [\w.-]+/[\w./-]+@([0-9a-f]{40}) # (v\d+\.\d+\.\d+)$")
SESSION = re.compile(r"ci/nox -s ([\w ]+?)(?: --|$)", re.M)

parsed = functools.cache(workflow.parse)  # nothing here changes what it gets
Files = dict[str, str]
Found = Iterator[str]


def triggers(data: dict[str, Any]) -> set[str]:
    return set(data["on"])


def jobs(files: Files) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for name, text in files.items():
        for job, body in parsed(text)["jobs"].items():
            yield name, job, body


def steps(files: Files) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    for name, job, body in jobs(files):
        for number, step in enumerate(body.get("steps", [])):
            yield f"{name}, {job}, step {number}", body, step


def uses(files: Files, action: str) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    for where, body, step in steps(files):
        if step.get("uses", "").startswith(f"{action}@"):
            yield where, body, step


def scripts(files: Files) -> Iterator[tuple[str, str]]:
    for where, _, step in steps(files):
        if "run" in step:
            yield where, step["run"]


def needed(data: dict[str, Any], job: str) -> set[str]:
    """All that a job waits for, directly or not."""
    direct = set(workflow.needs_of(data["jobs"][job]))
    return direct.union(*(needed(data, each) for each in direct)) if direct else set()


def nothing_is_permitted_by_default(files: Files) -> Found:
    for name, text in files.items():
        if parsed(text).get("permissions") != {}:
            yield f"{name}: top-level permissions are not {{}}"
    for name, job, body in jobs(files):
        if not isinstance(body.get("permissions"), dict):
            yield f"{name}, {job}: does not list its permissions"


def every_job_ends(files: Files) -> Found:
    for name, job, body in jobs(files):
        if "uses" not in body and not 0 < int(body.get("timeout-minutes", 0)) <= 240:
            yield f"{name}, {job}: no timeout-minutes up to 240"


def bash_fails_on_a_broken_pipe(files: Files) -> Found:
    for name, text in files.items():
        if parsed(text).get("defaults") != {"run": {"shell": "bash"}}:
            yield f"{name}: defaults.run.shell is not bash, which brings pipefail"
    for where, _, step in steps(files):
        if "shell" in step:
            yield f"{where}: a shell of its own"


def runs_do_not_pile_up(files: Files) -> Found:
    for name, text in files.items():
        group = parsed(text).get("concurrency", {})
        if not {"group", "cancel-in-progress"} <= set(group):
            yield f"{name}: no concurrency group"


def actions_are_pinned_by_commit(files: Files) -> Found:
    pins: dict[str, set[str]] = {}
    for name, text in files.items():
        for line in text.splitlines():
            if re.match(r"\s*(- )?uses: (?!\./)", line):
                if not PIN.match(line):
                    yield f"{name}: not a commit with its version: {line.strip()}"
                action, _, pin = line.split("uses: ")[1].partition("@")
                pins.setdefault(action, set()).add(pin)
    yield from (f"{action}: pinned to {len(pin)} commits" for action, pin in pins.items() if len(pin) > 1)


def the_token_is_not_left_on_disk(files: Files) -> Found:
    for where, _, step in uses(files, "actions/checkout"):
        if step.get("with", {}).get("persist-credentials") is not False:
            yield f"{where}: checkout keeps its credentials"


def no_failure_is_swallowed(files: Files) -> Found:
    for where, script in scripts(files):
        if SWALLOWED.search(script):
            yield f"{where}: a failure is swallowed"
    for where, body, step in steps(files):
        if "continue-on-error" in step or "continue-on-error" in body:
            yield f"{where}: continue-on-error"


def nothing_is_pasted_into_a_script(files: Files) -> Found:
    for where, script in scripts(files):
        if "${{" in script:
            yield f"{where}: an expression inside run; hand it over in env"


def strangers_reach_no_machine_of_ours(files: Files) -> Found:
    reached = {name: triggers(parsed(text)) for name, text in files.items()}
    for name, _, body in jobs(files):
        if called := re.fullmatch(r"\./\.github/workflows/(.*)", body.get("uses", "")):
            reached[called[1]] |= reached[name]
    for name, job, body in jobs(files):
        if "self-hosted" in str(body.get("runs-on")) and reached[name] & STRANGERS:
            yield f"{name}, {job}: self-hosted, and {sorted(reached[name] & STRANGERS)[0]} reaches it"
    yield from (f"{name}: pull_request_target" for name in files if "pull_request_target" in reached[name])


def evidence_is_kept_whatever_happens(files: Files) -> Found:
    for where, body, step in uses(files, "actions/upload-artifact"):
        options = step["with"]
        if step.get("if") != "${{ always() }}":
            yield f"{where}: not uploaded always"
        if options.get("if-no-files-found") != "error":
            yield f"{where}: an upload of nothing is no failure"
        wanted = ["github.run_attempt", *(f"matrix.{key}" for key in body.get("strategy", {}).get("matrix", {}))]
        yield from (f"{where}: {part} is not in its name" for part in wanted if part not in options["name"])


def junit_and_bundle_are_uploaded(files: Files) -> Found:
    for name, job, body in jobs(files):
        script = "\n".join(step.get("run", "") for step in body.get("steps", []))
        if not re.search(r"ci/nox -s (readiness|tests\w*|image -- (--network bridge )?(gpu|cpu)$)", script, re.M):
            continue
        prefixes = ("junit-",) if "-s tests" in script else ("junit-", "bundle-")
        mine = [step["with"]["name"] for step in body["steps"] if "upload-artifact" in step.get("uses", "")]
        yield from (f"{name}, {job}: no {p}* artifact" for p in prefixes if not any(n.startswith(p) for n in mine))


def every_job_reaches_the_gate(files: Files) -> Found:
    for name, gate in GATES.items():
        data = parsed(files[name])
        after = {job for job in data["jobs"] if gate in needed(data, job)}
        for job in data["jobs"].keys() - needed(data, gate) - after - {gate}:
            yield f"{name}, {job}: {gate} does not wait for it"
        body = data["jobs"][gate]
        if "always()" not in str(body.get("if")):
            yield f"{name}, {gate}: skipped when a job fails, and a skipped check counts as passed"
        if needed(data, gate) != set(workflow.needs_of(body)):
            yield f"{name}, {gate}: does not look at the result of every job"


def a_gate_counts_success_alone(files: Files) -> Found:
    for name, gate in GATES.items():
        (step,) = parsed(files[name])["jobs"][gate]["steps"]
        if step["env"]["RESULTS"] != "${{ join(needs.*.result, ' ') }}":
            yield f"{name}, {gate}: does not see the results"
        for results, passes in (
            ("success success", True),
            ("success skipped", False),
            ("failure success", False),
            ("success cancelled success", False),
            ("", False),
        ):
            done = subprocess.run(
                [*workflow_run.BASH, "-c", step["run"]], env={"RESULTS": results, "NEEDS": "{}"}, capture_output=True
            )
            if (done.returncode == 0) != passes:
                yield f"{name}, {gate}: {results!r} gives {done.returncode}"


def nothing_in_ci_is_skipped_by_a_condition(files: Files) -> Found:
    for job, body in parsed(files["ci.yml"])["jobs"].items():
        if "if" in body and job != GATES["ci.yml"]:
            yield f"ci.yml, {job}: has a condition"


def every_session_is_run_by_a_workflow(files: Files) -> Found:
    sessions = set(re.findall(r"^def (\w+)\(session: nox\.Session\)", NOXFILE, re.M))
    called = {name for _, script in scripts(files) for found in SESSION.findall(script) for name in found.split()}
    yield from (f"ci/nox -s {name}: no such session" for name in sorted(called - sessions))
    if "readiness" in called:  # it runs preflight, every stage, and the report
        called |= {"preflight", "report", *(stage.id for stage in runbook.load().stages)}
    yield from (f"session {name}: no workflow runs it" for name in sorted(sessions - called))


def steps_are_thin(files: Files) -> Found:
    for where, script in scripts(files):
        if len(script.strip().splitlines()) > 12:
            yield f"{where}: more than 12 lines; that is a session's work"


def expressions_name_what_exists(files: Files) -> Found:
    for name, text in files.items():
        data = parsed(text)
        events = [event for event in data["on"].values() if isinstance(event, dict)]
        inputs = {key for event in events for key in event.get("inputs", {})}
        for job, body in data["jobs"].items():
            known = {
                "needs": set(workflow.needs_of(body)) | {"*"},
                "matrix": set(body.get("strategy", {}).get("matrix", {})),
                "steps": {step["id"] for step in body.get("steps", []) if "id" in step},
                "inputs": inputs,
            }
            for expression in (e for part in workflow.texts(body) for e in expressions.inline(part)):
                try:
                    found = expressions.references(expression)
                except expressions.ExpressionError as error:
                    yield f"{name}, {job}: {error}"
                    continue
                for path in found:
                    if path[0] in known and len(path) > 1 and path[1] not in known[path[0]]:
                        yield f"{name}, {job}: {'.'.join(path)} does not exist"


def no_secret_is_handed_over(files: Files) -> Found:
    yield from (f"{name}: uses secrets" for name, text in files.items() if re.search(r"\bsecrets[.:\[]", text))


def a_right_to_write_stands_alone(files: Files) -> Found:
    """After a stranger's run, the job that may write installs nothing and takes no code but the base branch's."""
    served = {name: text for name, text in files.items() if "workflow_run" in triggers(parsed(text))}
    for where, _, step in uses(served, "actions/checkout"):
        if step["with"].get("ref") != "${{ github.event.repository.default_branch }}":
            yield f"{where}: checks out something else than the base branch"
    for name, job, body in jobs(served):
        installs = any(re.search(r"ci/nox|pip|setup-python", str(step)) for step in body["steps"])
        reads = any("run-id" in step.get("with", {}) for step in body["steps"])
        if "write" in body["permissions"].values() and (installs or reads):
            yield f"{name}, {job}: may write, and installs or reads a stranger's files"


def both_base_branches_are_served(files: Files) -> Found:
    for name, text in files.items():
        push = parsed(text)["on"].get("push")
        if push is not None and push.get("branches") != ["main", "master"]:
            yield f"{name}: push is not for main and master"


RULES: list[Callable[[Files], Found]] = [
    nothing_is_permitted_by_default,
    every_job_ends,
    bash_fails_on_a_broken_pipe,
    runs_do_not_pile_up,
    actions_are_pinned_by_commit,
    the_token_is_not_left_on_disk,
    no_failure_is_swallowed,
    nothing_is_pasted_into_a_script,
    strangers_reach_no_machine_of_ours,
    evidence_is_kept_whatever_happens,
    junit_and_bundle_are_uploaded,
    every_job_reaches_the_gate,
    a_gate_counts_success_alone,
    nothing_in_ci_is_skipped_by_a_condition,
    every_session_is_run_by_a_workflow,
    steps_are_thin,
    expressions_name_what_exists,
    no_secret_is_handed_over,
    a_right_to_write_stands_alone,
    both_base_branches_are_served,
]

CI, GPU, PUBLISH = "ci.yml", "gpu.yml", "publish-report.yml"
PLANTED = [
    (nothing_is_permitted_by_default, CI, "permissions: {}\n\ndefaults", "defaults"),
    (nothing_is_permitted_by_default, CI, "permissions: {}\n\ndefaults", "permissions: write-all\n\ndefaults"),
    (nothing_is_permitted_by_default, CI, "    permissions: {}\n    steps", "    steps"),
    (every_job_ends, CI, "    timeout-minutes: 20\n", ""),
    (every_job_ends, CI, "    timeout-minutes: 20\n", "    timeout-minutes: 1440\n"),
    (bash_fails_on_a_broken_pipe, CI, "    shell: bash\n", "    shell: sh\n"),
    (bash_fails_on_a_broken_pipe, CI, "        run: ci/nox -s lint", "        shell: sh\n        run: ci/nox -s lint"),
    (runs_do_not_pile_up, CI, "  group: ci-", "  other: ci-"),
    (actions_are_pinned_by_commit, CI, "@3d3c42e5aac5ba805825da76410c181273ba90b1 # v7.0.1", "@v7"),
    (actions_are_pinned_by_commit, CI, " # v7.0.1", ""),
    (actions_are_pinned_by_commit, CI, "@3d3c42e5", "@00000000"),
    (the_token_is_not_left_on_disk, CI, "          persist-credentials: false\n", "          fetch-depth: 1\n"),
    (no_failure_is_swallowed, CI, "run: ci/nox -s lint", "run: ci/nox -s lint || true"),
    (no_failure_is_swallowed, CI, "run: ci/nox -s lint", "run: 'ci/nox -s lint || :'"),
    (no_failure_is_swallowed, CI, "run: ci/nox -s lint", "run: set +e; ci/nox -s lint"),
    (no_failure_is_swallowed, CI, "run: ci/nox -s lint", "run: ci/nox -s lint\n        continue-on-error: true"),
    (nothing_is_pasted_into_a_script, CI, "run: ci/nox -s lint", "run: echo ${{ github.event.pull_request.title }}"),
    (strangers_reach_no_machine_of_ours, CI, "runs-on: ubuntu-24.04", "runs-on: [self-hosted, linux]"),
    (strangers_reach_no_machine_of_ours, GPU, "on:\n", "on:\n  pull_request:\n"),
    (strangers_reach_no_machine_of_ours, CI, "on:\n", "on:\n  pull_request_target:\n"),
    (
        strangers_reach_no_machine_of_ours,
        CI,
        "    name: lint\n",
        "    name: lint\n    uses: ./.github/workflows/gpu.yml\n",
    ),
    (evidence_is_kept_whatever_happens, CI, "        if: ${{ always() }}\n        uses", "        uses"),
    (evidence_is_kept_whatever_happens, CI, "          if-no-files-found: error\n", ""),
    (evidence_is_kept_whatever_happens, CI, "-${{ github.run_attempt }}", ""),
    (evidence_is_kept_whatever_happens, GPU, "bundle-${{ matrix.profile }}", "bundle"),
    (junit_and_bundle_are_uploaded, CI, "name: bundle-cpu", "name: things-cpu"),
    (junit_and_bundle_are_uploaded, GPU, "name: bundle-", "name: things-"),
    (junit_and_bundle_are_uploaded, CI, "name: junit-tests", "name: things-tests"),
    (every_job_reaches_the_gate, CI, "needs: [lint, cpu, image, tests", "needs: [lint, cpu, tests"),
    (every_job_reaches_the_gate, CI, "    if: ${{ always() }}\n    needs", "    needs"),
    (every_job_reaches_the_gate, GPU, "needs: [vetted, readiness, performance]", "needs: [readiness, performance]"),
    (a_gate_counts_success_alone, CI, "^success(\\ success)*$", "(success|skipped)"),
    (a_gate_counts_success_alone, CI, "              exit 1\n", ""),
    (a_gate_counts_success_alone, CI, "join(needs.*.result, ' ')", "needs.lint.result"),
    (nothing_in_ci_is_skipped_by_a_condition, CI, "    name: lint\n", "    name: lint\n    if: ${{ github.event }}\n"),
    (every_session_is_run_by_a_workflow, CI, "run: ci/nox -s lint", "run: ci/nox -s lnt"),
    (steps_are_thin, CI, "run: ci/nox -s lint", "run: |\n" + "          ls\n" * 13),
    (expressions_name_what_exists, CI, "${{ matrix.python }}", "${{ matrix.phyton }}"),
    (expressions_name_what_exists, GPU, "needs.vetted.outputs", "needs.vettd.outputs"),
    (expressions_name_what_exists, GPU, "steps.commit.outputs", "steps.comit.outputs"),
    (expressions_name_what_exists, GPU, "inputs.profile ||", "inputs.profil ||"),
    (expressions_name_what_exists, CI, "join(needs.*.result, ' ')", "join(needs.*.result, "),
    (no_secret_is_handed_over, CI, "${{ matrix.python }}", "${{ secrets.TOKEN }}"),
    (a_right_to_write_stands_alone, PUBLISH, "actions: read # the run's", "pull-requests: write # the run's"),
    (
        a_right_to_write_stands_alone,
        PUBLISH,
        "github.event.repository.default_branch }}\n          p",
        "env.HEAD }}\n          p",
    ),
    (both_base_branches_are_served, CI, "branches: [main, master]", "branches: [main]"),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule):
    assert list(rule(FILES)) == []


@pytest.mark.parametrize(("rule", "name", "old", "new"), PLANTED, ids=lambda value: getattr(value, "__name__", ""))
def test_a_planted_violation_is_seen(rule, name, old, new):
    assert old in FILES[name], f"{name} has no {old!r} any more: plant it elsewhere"
    assert list(rule({**FILES, name: FILES[name].replace(old, new)}))


def test_every_rule_has_a_planted_violation():
    assert {plant[0] for plant in PLANTED} == set(RULES)


def test_the_workflows_are_all_there():
    assert {"ci.yml", "gpu.yml", "nightly.yml", "publish-report.yml"} <= set(FILES)


def test_gpu_runs_on_each_machine_that_the_runbook_names():
    (job,) = (body for name, job, body in jobs(FILES) if (name, job) == (GPU, "readiness"))
    assert job["runs-on"] == ["self-hosted", "linux", "x64", "gpu", "${{ matrix.profile }}"]
    profiles = set(re.findall(r"\w+", job["strategy"]["matrix"]["profile"].split("||")[-1]))
    assert profiles == set(runbook.load().profiles) - {"cpu", "gpu"}
    offered = parsed(FILES[GPU])["on"]["workflow_dispatch"]["inputs"]["profile"]["options"]
    assert set(offered) - {"all"} == profiles


def test_whatever_an_image_holds_builds_it_anew():
    held = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    wanted = {f"{name}/**" if (ROOT / name).is_dir() else name for name in held} | {".dockerignore"}
    assert wanted <= set(parsed(FILES["images.yml"])["on"]["push"]["paths"])


def test_the_local_gate_can_run_every_job_of_ci():
    assert ".venv/bin/python -m ci workflow .github/workflows/ci.yml " in (ROOT / ".ci/run").read_text()
    pythons = {p for _, _, body in jobs(FILES) for p in body.get("strategy", {}).get("matrix", {}).get("python", [])}
    assert workflow_run.PYTHON in pythons
    assert workflow_run.check(ROOT / ".github/workflows" / CI, ROOT) == list(parsed(FILES[CI])["jobs"])


def test_the_noxfile_is_read_as_it_is():
    names = {node.name for node in ast.parse(NOXFILE).body if isinstance(node, ast.FunctionDef) and node.decorator_list}
    assert names == set(re.findall(r"^def (\w+)\(session: nox\.Session\)", NOXFILE, re.M))


def test_codeowners_names_what_exists():
    for line in (ROOT / ".github/CODEOWNERS").read_text().splitlines():
        if line and not line.startswith(("#", "*")):
            path, *owners = line.split()
            assert (ROOT / path.strip("/")).exists() or path == "/docker/", path
            assert owners
            assert all(owner.startswith("@") for owner in owners)


def script_of(name: str, job: str, step: str) -> str:
    (script,) = (s["run"] for s in parsed(FILES[name])["jobs"][job]["steps"] if s["name"] == step)
    return script


SHA = "a" * 40


@pytest.mark.parametrize(
    ("ref", "event", "sha", "code"),
    [
        ("refs/heads/main", "push", SHA, 0),
        ("refs/heads/master", "workflow_dispatch", SHA, 0),
        ("refs/heads/main", "schedule", SHA, 0),
        ("refs/heads/topic", "workflow_dispatch", SHA, 1),
        ("refs/pull/7/merge", "pull_request", SHA, 1),
        ("refs/heads/main", "pull_request_target", SHA, 1),
        ("refs/heads/main", "workflow_dispatch", "abc1234", 1),
        ("refs/heads/main", "workflow_dispatch", f"{SHA}; id", 1),
        ("refs/heads/main/../x", "push", SHA, 1),
    ],
)
def test_only_vetted_commits_reach_a_gpu(tmp_path, ref, event, sha, code):
    output = tmp_path / "output"
    output.touch()
    environment = {"GITHUB_REF": ref, "GITHUB_EVENT_NAME": event, "SHA": sha, "GITHUB_OUTPUT": str(output)}
    script = script_of(GPU, "vetted", "from the base branch, a whole sha")
    done = subprocess.run([*workflow_run.BASH, "-c", script], env=environment, capture_output=True)
    assert (done.returncode, output.read_text()) == (code, "" if code else f"sha={sha}\n"), done.stdout


@pytest.mark.parametrize(("title", "head"), [("", "b" * 40), (f"gpu {SHA}", SHA)])
def test_the_comment_is_about_the_commit_that_github_names(tmp_path, title, head):
    (tmp_path / "ci").mkdir()
    stub = tmp_path / "ci/nox"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    environment = {
        "PATH": os.environ["PATH"],
        "TITLE": title,
        "HEAD": "b" * 40,
        "INCOMING": str(tmp_path / "incoming"),
        "RUN": "1.1",
        "WORKFLOW": "ci",
        "PROFILES": "cpu",
    }
    script = script_of(PUBLISH, "verify", "check, and render")
    done = subprocess.run(
        [*workflow_run.BASH, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    given = done.stdout.splitlines()
    assert given[given.index("--head") + 1] == head
    assert given[given.index("--") + 1] == str(tmp_path / "incoming")
