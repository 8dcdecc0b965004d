"""The library's tests can fail: each planted mistake of mutations.toml turns its named test red."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TESTS = Path(__file__).parent
MUTATIONS = tomllib.loads((TESTS / "mutations.toml").read_text())["mutation"]


@pytest.fixture(scope="module")
def server():
    """A process that runs pytest in forks of itself and knows nothing of this run."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV", "NSA_"))}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env.pop("PYTHONPATH", None)
    command = [sys.executable, str(TESTS / "pytest_fork.py")]
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def run(server, tmp_path):
    """run(test, ...) on a copy of the package, as it is by then -> (pytest's exit code, what it said)."""
    shutil.copytree(TESTS.parent / "nsa", tmp_path / "nsa", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(TESTS.parent / "pyproject.toml", tmp_path)

    def run_tests(*tests):
        log = tmp_path / "log"
        server.stdin.write(json.dumps({"root": str(tmp_path), "tests": tests, "log": str(log)}) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, f"the server of forks died with {server.wait()}"
        return int(answer), log.read_text()

    return run_tests


def _plant(root, mutation):
    path = root / mutation["file"]
    source = path.read_text()
    found = source.count(mutation["old"])
    assert found == 1, (
        f"{mutation['file']} holds {mutation['old']!r} {found} times, not once: bring the list up to date"
    )
    source = source.replace(mutation["old"], mutation["new"])
    if "imports" in mutation:
        source = source.replace("\nimport torch\n", f"\nimport torch\n{mutation['imports']}\n", 1)
    path.write_text(source)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[m["name"].replace(" ", "_") for m in MUTATIONS])
def test_a_planted_mistake_turns_its_test_red(run, tmp_path, mutation):
    _plant(tmp_path, mutation)
    code, said = run(mutation["test"])
    assert code == pytest.ExitCode.TESTS_FAILED, f"pytest exited {code}:\n{said[-3000:]}"
    assert re.search(r"^E +(AssertionError|assert |Failed: )", said, re.MULTILINE), (
        f"not by an assertion:\n{said[-3000:]}"
    )


def test_the_named_tests_are_green_without_a_mistake(run):
    named = sorted({mutation["test"] for mutation in MUTATIONS})
    code, said = run(*named)
    assert code == pytest.ExitCode.OK, said[-3000:]
    assert f"{len(named)} passed" in said


def test_a_mistake_that_no_longer_applies_is_an_error(run, tmp_path):
    with pytest.raises(AssertionError, match="0 times, not once"):
        _plant(tmp_path, {"file": "nsa/blocks.py", "old": "no such line", "new": ""})


def test_no_mistake_is_listed_twice():
    planted = {(m["file"], m["old"], m["new"]) for m in MUTATIONS}
    assert len({m["name"] for m in MUTATIONS}) == len(planted) == len(MUTATIONS)
