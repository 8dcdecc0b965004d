"""Sessions of the readiness harness, one a stage of the runbook. `ci/nox -l` lists them, `ci/nox -s NAME` runs one.

The sessions use the interpreter that runs nox (`ci/nox` makes a .venv for it), but for those whose tools or versions
would not fit there. A stage's arguments after `--` go to pytest, and prove nothing: a stage run with them fails.
"""

import sys

import nox

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "none"
nox.options.sessions = ["readiness"]


def _ci(session: nox.Session, *arguments: str) -> None:
    session.run("python", "-m", "ci", *arguments, external=True)


@nox.session
def readiness(session: nox.Session) -> None:
    """Everything this machine can prove, then the report: READY, READY ON CPU or NOT READY."""
    _ci(session, "readiness", "--", *session.posargs)


@nox.session
def preflight(session: nox.Session) -> None:
    """Is this machine what its profile says, and fit to run the stages?"""
    _ci(session, "preflight")


@nox.session
def cpu_correctness(session: nox.Session) -> None:
    """Stage 1: the mathematics of NSA, on any CPU."""
    _ci(session, "stage", "cpu_correctness", "--", *session.posargs)


@nox.session
def gpu_parity(session: nox.Session) -> None:
    """Stage 2: routing snapshot, and Triton and FA-2 against the reference."""
    _ci(session, "stage", "gpu_parity", "--", *session.posargs)


@nox.session
def long_context(session: nox.Session) -> None:
    """Stage 3: a 65,536-token prefill in tiles, and the needle."""
    _ci(session, "stage", "long_context", "--", *session.posargs)


@nox.session
def train_readiness(session: nox.Session) -> None:
    """Stage 4: the showcase, and data parallel (two gloo processes; NCCL on two GPUs)."""
    _ci(session, "stage", "train_readiness", "--", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Stage 5: decode time and reads against the length, and their table."""
    _ci(session, "stage", "bench", "--", *session.posargs)


@nox.session
def perf_compare(session: nox.Session) -> None:
    """Is decoding slower at HEAD than at BASE, beyond noise: `-- BASE HEAD`; 4 regression, 75 inconclusive."""
    session.run("python", "-m", "ci.perf_compare", *session.posargs, external=True)


@nox.session
def report(session: nox.Session) -> None:
    """Judge what has run: merged JUnit, summary.md, summary.html, the bundle."""
    _ci(session, "report")


@nox.session
def publish(session: nox.Session) -> None:
    """What a stranger's run uploaded, checked and turned into a comment: `-- FOLDER --head SHA`."""
    session.run("python", "-m", "ci.publish", *session.posargs, external=True)


@nox.session
def changes(session: nox.Session) -> None:
    """New and known failures of two runs: `-- BEFORE AFTER`, folders of their artifacts."""
    session.run("python", "-m", "ci.changes", *session.posargs, external=True)


@nox.session(venv_backend="virtualenv", reuse_venv=True)
def lock(session: nox.Session) -> None:
    """Hashed locks of the images from the pinned inputs; `-- --check` only says whether they fit."""
    session.install("-q", "-r", "requirements-lock.txt")
    session.run(sys.executable, "-m", "ci.lock", *session.posargs, external=True)


@nox.session(venv_backend="virtualenv", reuse_venv=True)
def sbom(session: nox.Session) -> None:
    """CycloneDX bills of materials of both images, from the locks, in dist/."""
    session.install("-q", "-r", "requirements-lock.txt")
    session.run("python", "-m", "ci.sbom", *session.posargs)


@nox.session
def image(session: nox.Session) -> None:
    """Build an image of this tree and run it: `-- cpu gpu_parity`, `-- gpu`; without a stage, everything."""
    _ci(session, "image", *session.posargs)


@nox.session
def repro(session: nox.Session) -> None:
    """Run again what a bundle describes, at its commit and in its image: `-- BUNDLE`."""
    _ci(session, "repro", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """The library's and the repository's tests, with coverage; `-- -k NAME` narrows them."""
    options = ["-n", "2", "--cov", "--cov-report=term:skip-covered", "--junitxml=dist/tests.xml"]
    session.run("python", "-m", "pytest", *options, *session.posargs, env={"OMP_NUM_THREADS": "1"}, external=True)


@nox.session
def kernels(session: nox.Session) -> None:
    """The Triton kernels, interpreted and compiled without a GPU, under the GPU lane's Triton or `-- VERSION`."""
    session.run("python", "-m", "ci.kernels", *session.posargs, external=True)


@nox.session(venv_backend="virtualenv", reuse_venv=True)
def tests_pinned(session: nox.Session) -> None:
    """The CPU-safe tests on the GPU lane's torch 2.4.1 and Triton 3.0.0, really installed: several GB, so nightly."""
    hashed = sys.version_info[:2] == (3, 11)  # the Python of the lock
    pins = ["--require-hashes", "-r", "docker/lock-gpu.txt"] if hashed else ["-r", "requirements-gpu-cu121-torch24.txt"]
    session.install("-q", *pins)
    session.run("python", "-m", "ci.pinned", *session.posargs)


@nox.session(venv_backend="virtualenv", reuse_venv=True)
def lint(session: nox.Session) -> None:
    """Every static check, offline: Python, workflows, YAML, shell scripts, Dockerfiles."""
    session.install("-q", "-r", "requirements-lint.txt")
    session.run(sys.executable, "-m", "ci.lint", external=True)
