"""The executor behind .ci/run: the steps of a workflow run as GitHub runs them, and what it cannot run is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from ci import expressions, workflow_run

ROOT = Path(__file__).resolve().parent.parent
HEAD = """
name: planted
on: push
defaults: {run: {shell: bash}}
env: {GREETING: hello, WHERE: workflow}
jobs:
"""
CONTEXT = {
    "github": {"event": expressions.Open(), "sha": "abc", "event_name": "push"},
    "needs": {"a": {"result": "success"}, "b": {"result": "failure"}},
    "matrix": {"python": "3.11"},
    "vars": expressions.Open(),
}


def flow(
    tmp_path: Path, jobs: str, wanted: Sequence[str] = (), without: dict[str, str] | None = None, **choices: str
) -> dict[str, workflow_run.JobResult]:
    """The jobs' results by id."""
    path = tmp_path / "planted.yml"
    path.write_text(HEAD + textwrap.indent(textwrap.dedent(jobs), "  "))
    done = workflow_run.run(path, tmp_path, jobs=list(wanted), choices=choices, say=lambda line: None, without=without)
    return {job.id: job for job in done}


def outcomes(job: workflow_run.JobResult) -> list[str]:
    return [step.outcome for step in job.steps]


def test_steps_share_the_tree_and_githubs_files(tmp_path, capfd):
    (tmp_path / "below").mkdir()
    done = flow(
        tmp_path,
        """
        first:
          timeout-minutes: 1
          env: {WHERE: "job ${{ env.GREETING }}"}
          steps:
            - id: one
              run: |
                echo "answer=42" >> "$GITHUB_OUTPUT"
                echo "KEPT=from ${{ github.event_name }}" >> "$GITHUB_ENV"
                printf 'LINES<<END\\na\\nb\\nEND\\n' >> "$GITHUB_ENV"
                echo "# page" >> "$GITHUB_STEP_SUMMARY"
            - run: |
                echo "$WHERE, $KEPT, ${{ steps.one.outputs.answer }}, $OWN"
                echo "$(echo "$LINES" | wc -l), $GITHUB_JOB, $PWD"
              env: {OWN: "${{ steps.one.outcome }}"}
              working-directory: below
        """,
    )
    assert (done["first"].result, outcomes(done["first"])) == ("success", ["success", "success"])
    assert capfd.readouterr().out == f"job hello, from push, 42, success\n2, first, {tmp_path}/below\n"


def test_a_failure_ends_the_job_but_for_steps_that_run_always(tmp_path):
    done = flow(
        tmp_path,
        """
        first:
          timeout-minutes: 1
          steps:
            - run: "false | tee log.txt"
            - run: touch reached
            - if: ${{ always() }}
              run: touch cleaned
            - if: failure()
              run: touch told
            - if: ${{ !cancelled() && matrix.python == '3' }}
              run: touch not_this
          strategy: {matrix: {python: ["3"]}}
        second: {needs: first, timeout-minutes: 1, steps: [{run: touch second}]}
        third: {timeout-minutes: 1, steps: [{run: touch third}]}
        last:
          if: ${{ always() }}
          needs: [first, second, third]
          timeout-minutes: 1
          steps: [{run: 'echo "${{ join(needs.*.result, '' '') }}" > results'}]
        """,
        python="3",
    )
    assert outcomes(done["first"]) == ["failure", "skipped", "success", "success", "success"]
    assert [done[name].result for name in ("first", "second", "third", "last")] == [
        "failure",
        "skipped",
        "success",
        "success",
    ]
    assert (tmp_path / "results").read_text() == "failure skipped success\n"
    assert not (tmp_path / "reached").exists()
    assert (tmp_path / "cleaned").exists()
    assert (tmp_path / "told").exists()


def test_a_job_that_this_machine_cannot_run_is_reported_and_holds_nobody_up(tmp_path):
    jobs = """
    first: {timeout-minutes: 1, steps: [{run: touch started}]}
    gate:
      if: ${{ always() }}
      needs: [first, other]
      timeout-minutes: 1
      steps: [{run: 'echo "${{ join(needs.*.result, '' '') }}" > results'}]
    other: {timeout-minutes: 1, steps: [{run: ls}]}
    """
    done = flow(tmp_path, jobs, without={"first": "no engine here"})
    assert (done["first"].result, done["first"].detail) == ("skipped", "no engine here")
    assert (tmp_path / "results").read_text() == "success\n"
    flow(tmp_path, jobs, wanted=["other", "gate"])
    assert (tmp_path / "results").read_text() == "skipped success\n", "not asked for is no excuse"
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("script", ["false\ntrue", "false | true", "echo $(exit 3); x=$(exit 3); true"])
def test_bash_stops_at_the_first_failure(tmp_path, script):
    jobs = json.dumps({"first": {"timeout-minutes": 1, "steps": [{"run": script}]}})
    assert flow(tmp_path, jobs[1:-1])["first"].result == "failure"


def test_a_step_past_its_time_is_ended_with_its_children(tmp_path):
    started = time.monotonic()
    jobs = "first: {timeout-minutes: 0.1, steps: [{run: 'sleep 60 & echo $! > child; wait'}]}"
    done = flow(tmp_path, jobs)
    assert (done["first"].result, outcomes(done["first"])) == ("failure", ["cancelled"])
    assert time.monotonic() - started < 30
    child = Path(f"/proc/{(tmp_path / 'child').read_text().strip()}/stat")
    assert not child.exists() or child.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_of_a_matrix_the_entry_of_this_python_runs(tmp_path, capfd):
    jobs = """
    first:
      name: on ${{ matrix.python }}
      timeout-minutes: 1
      strategy: {matrix: {python: ["3.1", "%s"], os: [a]}}
      steps: [{run: "echo ${{ matrix.python }}-${{ matrix.os }}"}]
    """
    done = flow(tmp_path, jobs % workflow_run.PYTHON)
    assert done["first"].name == f"on {workflow_run.PYTHON}"
    assert flow(tmp_path, jobs % "3.99", python="3.1")["first"].result == "success"
    assert capfd.readouterr().out == f"{workflow_run.PYTHON}-a\n3.1-a\n"
    with pytest.raises(workflow_run.WorkflowError, match=r"job first: 0 matrix entries fit python="):
        flow(tmp_path, jobs % "3.99")


def test_actions_have_stand_ins_and_uploads_are_checked(tmp_path):
    done = flow(
        tmp_path,
        """
        first:
          timeout-minutes: 1
          steps:
            - uses: actions/checkout@0
            - uses: actions/setup-python@0
              with: {python-version: "2.7"}
            - uses: somebody/else@0
            - run: touch result.txt
            - uses: actions/upload-artifact@0
              with: {name: "r-${{ github.run_attempt }}", path: "*.txt", if-no-files-found: error}
        again:
          timeout-minutes: 1
          steps:
            - uses: actions/upload-artifact@0
              with: {name: r-1, path: result.txt}
        absent:
          timeout-minutes: 1
          steps:
            - uses: actions/upload-artifact@0
              with: {name: other, path: "dist/*.gz", if-no-files-found: error}
        """,
    )
    assert [job.result for job in done.values()] == ["success", "failure", "failure"]
    assert "in the place of 2.7" in done["first"].steps[1].detail
    assert done["first"].steps[2].detail == "somebody/else is not run here"
    assert done["again"].steps[0].detail == "artifact r-1 exists already"
    assert done["absent"].steps[0].detail == "artifact other: nothing at dist/*.gz"


def test_a_summary_that_github_would_drop_fails_its_step(tmp_path):
    jobs = "first: {timeout-minutes: 1, steps: [{run: 'head -c 1100000 /dev/zero > \"$GITHUB_STEP_SUMMARY\"'}]}"
    assert "GitHub drops it whole" in flow(tmp_path, jobs)["first"].steps[0].detail


@pytest.mark.parametrize(
    ("jobs", "says"),
    [
        ("a: {timeout-minutes: 1, steps: [{run: 'echo ${{ secrets.TOKEN }}'}]}", "needs secrets, unknown here"),
        ("a: {timeout-minutes: 1, steps: [{run: \"echo ${{ hashFiles('x') }} ${{ 1 = 1 }}\"}]}", "unreadable at"),
        ("a: {timeout-minutes: 1, steps: [{run: ls, shell: python}]}", "shell is not bash"),
        (
            "a: {timeout-minutes: 1, steps: [{run: ls, continue-on-error: true}]}",
            "continue-on-error has no meaning",
        ),
        ("a: {timeout-minutes: 1, needs: b, steps: []}", "circular or name no job"),
        ("a: {uses: ./.github/workflows/b.yml}", "calls another workflow"),
        ("a: {timeout-minutes: 1, strategy: {matrix: {a: [1], include: [{b: 1}]}}, steps: []}", "a matrix is here"),
        ("a: {timeout-minutes: 1, container: debian, steps: []}", "job a: container has no meaning here"),
        ("a: {timeout-minutes: 1, outputs: {x: y}, steps: []}", "job a: outputs has no meaning here"),
        ("a: [", "unreadable"),
    ],
)
def test_what_cannot_be_run_faithfully_is_refused_before_anything_runs(tmp_path, jobs, says):
    first = "first: {timeout-minutes: 1, steps: [{run: touch started}]}\n"
    with pytest.raises(workflow_run.WorkflowError, match=says):
        flow(tmp_path, first + jobs)
    assert not (tmp_path / "started").exists()


def test_a_name_that_is_not_there_fails_the_step(tmp_path):
    jobs = "a: {timeout-minutes: 1, steps: [{run: 'echo ${{ steps.typo.outputs.x }}'}, {run: 'echo ${{ env.NONE }}'}]}"
    steps = flow(tmp_path, jobs)["a"].steps
    assert (steps[0].outcome, steps[0].detail) == ("failure", "no 'typo' here; known: nothing")
    for wrong in (
        "{timeout-minutes: 1, steps: [{name: '${{ matrix.x }}', run: ls}]}",
        "{name: '${{ matrix.x }}', steps: []}",
    ):
        assert flow(tmp_path, f"a: {wrong}")["a"].result == "failure"


def test_the_command_exits_with_the_worst_and_names_it(tmp_path):
    planted = tmp_path / "w.yml"
    planted.write_text(HEAD + "  a: {timeout-minutes: 1, steps: [{run: exit 7}]}\n")

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ci", "workflow", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)

    done = call(str(planted))
    assert done.returncode == 1
    assert "failure     0 s  exit 7: exit code 7" in done.stdout
    for arguments, code, says in (
        (("absent.yml",), 78, "ci: absent.yml: unreadable"),
        ((str(planted), "--job", "b"), 78, "no job 'b'; jobs: a"),
        ((str(planted), "--matrix", "x"), 2, "'x' is not KEY=VALUE"),
    ):
        done = call(*arguments)
        assert (done.returncode, says in done.stderr) == (code, True), done.stderr


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("github.event.pull_request.head.sha || github.sha", "abc"),
        ("join(needs.*.result, ' ')", "success failure"),
        ("matrix.python == '3.11' && !false", True),
        ("github.event_name == 'PUSH'", True),
        ("vars.ABSENT", None),
        ("needs.b['result'] != 'success'", True),
        ("contains(fromJSON('[\"a\",\"b\"]'), 'B')", True),
        ("format('{0}-{1}', 'it''s', 1 < 2)", "it's-true"),
        ("null == 0", True),
        ("(1 == '1') && 'yes' || 'no'", "yes"),
    ],
)
def test_expressions_have_githubs_values(text, value):
    assert expressions.evaluate(text, CONTEXT) == value


@pytest.mark.parametrize("text", ["matrix.typo", "nothing.x", "1 ==", "'open", "hashFiles('x')", "a..b", "f(1", "1 1"])
def test_what_is_no_expression_is_refused(text):
    with pytest.raises(expressions.ExpressionError):
        expressions.evaluate(text, CONTEXT)


def test_a_condition_without_a_status_function_means_success_too():
    failed = {"success": lambda: False, "failure": lambda: True, "always": lambda: True, "cancelled": lambda: False}
    assert not expressions.holds("${{ github.sha == 'abc' }}", CONTEXT, failed)
    assert expressions.holds("failure() && github.sha == 'abc'", CONTEXT, failed)


def test_sigterm_ends_the_running_step_with_all_its_processes(tmp_path):
    planted = tmp_path / "w.yml"
    script = f"sleep 300 & echo $! > {tmp_path}/child; touch {tmp_path}/started; wait"
    planted.write_text(f'{HEAD}  a: {{timeout-minutes: 5, steps: [{{run: "{script}"}}]}}\n')
    process = subprocess.Popen([sys.executable, "-m", "ci", "workflow", str(planted)], cwd=ROOT, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    _, said = process.communicate(timeout=90)
    assert (process.returncode, said) == (143, b"ci: SIGTERM: the running step was ended\n")
    child = Path(f"/proc/{(tmp_path / 'child').read_text().strip()}/stat")
    assert not child.exists() or child.read_text().rsplit(")", 1)[1].split()[0] == "Z"
