"""A planted secret, in the environment, a log, a configuration, a report and a file's name: no bundle holds it."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from urllib.parse import quote_plus

import pytest

from ci import audit
from ci.redact import Redactor, SecretFound, secrets_in

ROOT = Path(__file__).resolve().parent.parent
VALUE = 'Pl4nted/secret+of "mine"'
KEY = (
    "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\n"
    + "MIIEplanted0key" * 4
    + "\n-----END RSA PRIVATE KEY-----"
)
TOKEN = "ghp_" + "Z9y8" * 9
SECRETS = {
    "UPLOAD_TOKEN": VALUE,
    "PGPASSWORD": "planted-pg-password",
    "DEPLOY_KEY": KEY,
    "EXTRA_INDEX": "https://me:planted-in-url@index.invalid/simple",
}
SPELLINGS = [
    VALUE,
    json.dumps(VALUE),
    repr(VALUE),
    quote_plus(VALUE),
    base64.b64encode(f"user:{VALUE}".encode()).decode(),
    base64.urlsafe_b64encode(f"x{VALUE}".encode()).decode(),
    VALUE.encode().hex(),
]
BETRAYALS = [
    *(text.strip('"') for text in (VALUE, json.dumps(VALUE), quote_plus(VALUE), VALUE.encode().hex())),
    "planted-pg-password",
    "planted-in-url",
    "MIIEplanted0key",
    TOKEN,
    "Pl4nted",
    # the middle of the value in base64, at each of the three places it can start
    *(base64.b64encode(b"x" * shift + VALUE.encode())[4:28].decode() for shift in range(3)),
]
STEPS = """
schema = 1
[profiles.cpu]
title = "no GPU"
gpus = 0
[[stages]]
id = "leaks"
number = 1
title = "leaks"
about = "A script and a test that give away what they know."
[[steps]]
id = "script"
stage = "leaks"
title = "prints, writes a configuration"
kind = "script"
command = "python leak.py > artifacts/test-reports/leak.txt"
timeout = 60
expect = { "*" = "run" }
deliverables = [{ path = "artifacts/test-reports/leak.txt" }]
[[steps]]
id = "test"
stage = "leaks"
title = "fails with the value in its message"
kind = "pytest"
command = "PYTHONPATH=. pytest -q test_leak.py"
output = "artifacts/test-reports/test.txt"
timeout = 60
expect = { "*" = "run" }
deliverables = [{ path = "artifacts/test-reports/test.txt" }]
"""
LEAK = f"""
import os, pathlib, sys
for text in {SPELLINGS!r}:
    print("log:", text)
print("indented:")
for line in os.environ["DEPLOY_KEY"].splitlines():
    print("   |", line)
print(os.environ["PGPASSWORD"], os.environ["EXTRA_INDEX"], file=sys.stderr)
run = pathlib.Path("artifacts/train_leak")
run.mkdir(parents=True)
(run / "config.yaml").write_text("token: " + os.environ["UPLOAD_TOKEN"] + "\\nother: {TOKEN}\\n")
(pathlib.Path("artifacts/tracked") / "{TOKEN}.txt").write_text("named after it")
"""
TEST = "import os\ndef test_leak():\n    assert os.environ['UPLOAD_TOKEN'] == os.environ['PGPASSWORD']\n"


def call(root: Path, command: str, secrets: dict[str, str]) -> str:
    plain = {name: value for name, value in os.environ.items() if name not in SECRETS}
    named = {"NSA_CI_ROOT": str(root), "NSA_CI_STEPS": str(root / "steps.toml"), "NSA_CI_PROFILE": "cpu"}
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "ci", command],
        cwd=ROOT,
        env={**plain, **secrets, **named, **path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "bundle: dist/" in done.stdout, done.stdout + done.stderr
    return done.stdout + done.stderr


def contents(bundle: Path) -> bytes:
    with tarfile.open(bundle) as tar:
        return b"".join(info.name.encode() + tar.extractfile(info).read() for info in tar)  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def leaked(tmp_path_factory) -> Path:
    """A tree after one readiness run of steps that leak, with the secrets in its environment."""
    root = tmp_path_factory.mktemp("leaks")
    for name, text in (("steps.toml", STEPS), ("leak.py", LEAK), ("test_leak.py", TEST)):
        (root / name).write_text(text)
    said = call(root, "readiness", SECRETS)
    (root / "said").write_text(said)
    return root


def bundle_of(root: Path) -> Path:
    (bundle,) = (root / "dist").glob("*.tar.gz")
    return bundle


def test_no_bundle_holds_the_secret(leaked: Path):
    everything = contents(bundle_of(leaked)).decode(errors="replace")
    assert [text for text in BETRAYALS if text in everything] == []
    for mark in ("[masked:UPLOAD_TOKEN]", "[masked:PGPASSWORD]", "[masked:DEPLOY_KEY]", "[masked:token]"):
        assert mark in everything
    assert "its name holds a secret; rename it" in everything
    assert "log: " in everything


def test_such_a_bundle_still_verifies(leaked: Path):
    report = audit.verify(bundle_of(leaked))
    assert report.problems == []
    assert report.verdict == "NOT READY"


def test_what_lies_in_artifacts_for_an_upload_holds_it_no_more_either(leaked: Path):
    held = {
        path.name: [text for text in BETRAYALS if text.encode() in path.read_bytes()]
        for path in (leaked / "artifacts").rglob("*")
        if path.is_file()
    }
    assert {name: found for name, found in held.items() if found} == {}


def test_the_process_that_reports_need_not_know_the_secret(leaked: Path):
    bundle_of(leaked).unlink()
    said = call(leaked, "report", {})
    everything = contents(bundle_of(leaked)).decode(errors="replace")
    assert [text for text in BETRAYALS if text in everything + said] == []


def test_the_run_itself_says_nothing_of_it(leaked: Path):
    assert [text for text in BETRAYALS if text in (leaked / "said").read_text()] == []


@pytest.mark.parametrize("name", ["PGPASSWORD", "GHTOKEN", "MYSQL_PWD", "SSHPASS", "client-secret", "X_API_KEY"])
def test_these_names_are_of_secrets(name: str):
    assert secrets_in({name: "planted-value"}) == {name: "planted-value"}


@pytest.mark.parametrize(
    "text",
    [
        "glpat-" + "a1B2" * 6,
        "npm_" + "a1B2" * 9,
        "pypi-" + "AgEI" * 15,
        "dckr_pat_" + "a1B2" * 6,
        "sk-" + "a1B2" * 10,
        "eyJhbGciOiJI.eyJzdWIiOiIx.c2lnbmF0dXJl",
        "Authorization: Bearer abcdef0123456789",
        '"authorization": "Basic dXNlcjpwYXNz"',
    ],
)
def test_a_token_is_known_by_its_form(text: str):
    assert text.split()[-1].strip('"').encode() not in Redactor({}).clean("log", f"got {text} here".encode())


def test_a_log_in_inside_a_url_is_masked_whoever_set_it():
    clean = Redactor({}).clean("log", b"from https://me:hunter2@index.invalid/simple and https://host.invalid/a@b")
    assert clean == b"from https://me:[masked:login]@index.invalid/simple and https://host.invalid/a@b"


def test_plain_figures_and_words_stay():
    text = b"task-sk-learn 0123456789abcdef Basic training, eyJ, sha256:%s" % (b"ab" * 32)
    assert Redactor({"UPLOAD_TOKEN": VALUE}).clean("log", text) == text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le"])
def test_a_binary_file_with_the_secret_is_refused(encoding: str):
    with pytest.raises(SecretFound, match=r"events: holds the value of \$UPLOAD_TOKEN"):
        Redactor({"UPLOAD_TOKEN": VALUE}).clean("events", b"\0\1" + VALUE.encode(encoding))


def test_masking_in_place_leaves_older_files_and_times_alone(tmp_path: Path):
    for name, when in (("old", 1000), ("new", 3000)):
        (tmp_path / name).write_text(VALUE)
        os.utime(tmp_path / name, (when, when))
    (tmp_path / "link").symlink_to(tmp_path / "old")
    Redactor({"UPLOAD_TOKEN": VALUE}).mask_written(tmp_path, 2000)
    assert (tmp_path / "old").read_text() == VALUE
    assert (tmp_path / "new").read_text() == "[masked:UPLOAD_TOKEN]"
    assert (tmp_path / "new").stat().st_mtime == 3000
