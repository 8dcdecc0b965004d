"""What a stranger's workflow run left behind becomes a comment: checked, refused with its reason, and never markup."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.sax.saxutils import quoteattr

import pytest
from report_factory import MATHS_XML, SHA, Run, make_run

from ci import bundle, forgery, publish
from ci.publish import Expected

ROOT = Path(__file__).resolve().parent.parent
HOSTILE = (
    "@everyone [click](https://evil.example) ![x](https://evil.example/x.png) <img src=x onerror=alert(1)> "
    "`` ``` https://evil.example www.evil.example owner/repo#1 #12 | --> \\| $x$ \u202eabc\x1b[31m"
)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path)


def pack(run: Run, artifact: str = "bundle-cpu-py3.12-1") -> Path:
    return bundle.build(run.artifacts, run.result, run.root / "incoming" / artifact, runbook=run.runbook)


def publish_(run: Run, *more: str, head: str = SHA) -> tuple[int, str]:
    """Exit code and comment of the command over incoming/."""
    out = run.root / "comment.md"
    (run.root / "incoming").mkdir(exist_ok=True)
    given = [str(run.root / "incoming"), "--head", head, "--out", str(out), "--runbook", str(run.runbook), *more]
    return publish.main(given), out.read_text()


def test_an_honest_bundle_becomes_a_comment(run):
    packed = pack(run)
    code, text = publish_(run, "--profiles", "cpu")
    assert code == 0
    assert text.startswith("<!-- nsa-readiness: ci -->\n### Readiness of `0123456789ab`, from `ci`\n")
    assert "✅ **READY ON CPU** (exit code 0) on `cpu`, `no GPU`, Python `3.11.9`, torch `2.13.0+cpu`" in text
    assert "| `maths` | ✅ PASSED | 2 | 0 | 1 | 12.5 |  |" in text
    assert f"`{packed.name}`, sha256 `{publish.digest(packed)}`" in text
    assert "| `training loss` | `5.526 → 2.62` | `200 steps at 3,200 toks/s; validation 2.79` |" in text
    assert "Checkpoints: 1, the last `artifacts/train_showcase/step_000200.pt`" in text
    assert "not who wrote it" in text


def test_a_failed_run_is_told_as_one(run):
    run.record("routing", exit_code=1)
    run.judge()
    pack(run)
    code, text = publish_(run)
    assert code == 0, "the bundle is what it says"
    assert "❌ **NOT READY** (exit code 1)" in text
    assert "| `routing` | ❌ FAILED | 0 | 1 | 0 | 12.5 | `exit code 1` |" in text


def _tampered(run: Run, path: Path) -> None:
    forgery.FORGERIES["a file changed"](path, path)


def _retold(run: Run, path: Path) -> None:
    forgery.FORGERIES["another verdict, hashes made to fit"](path, path)


def _truncated(run: Run, path: Path) -> None:
    path.write_bytes(path.read_bytes()[:900])


def _climbing(run: Run, path: Path) -> None:
    forgery.FORGERIES["a member that climbs out by .."](path, path)


def _bomb(run: Run, path: Path) -> None:
    files = forgery.members(path)
    top = next(iter(files)).split("/")[0]
    forgery.pack({**files, f"{top}/artifacts/tracked/zeros": bytes(publish.LIMITS.member + 1)}, path)


def _many(run: Run, path: Path) -> None:
    forgery.pack({f"top/{number}": b"" for number in range(publish.LIMITS.members + 2)}, path)


def _huge(run: Run, path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(publish.MAX_FILE + 1)


def _link(run: Run, path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/hostname")


def _renamed(run: Run, path: Path) -> None:
    path.rename(path.with_name("@everyone`\n::error::x.tar.gz"))


def _digits(run: Run, path: Path) -> None:
    files = forgery.members(path)
    name = next(name for name in files if name.endswith("/exit.json"))
    files[name] = b'{"code": ' + b"1" * 6000 + b"}"
    forgery.pack(forgery.resign(files), path)


def _digits_in_the_manifest(run: Run, path: Path) -> None:
    files = forgery.members(path)
    name = next(name for name in files if name.endswith("/manifest.json"))
    files[name] = b'{"schema": ' + b"1" * 6000 + b"}"
    forgery.pack(files, path)


def _entities(run: Run, path: Path) -> None:
    files = forgery.members(path)
    name = next(name for name in files if name.endswith("correct.maths.xml"))
    files[name] = b'<!DOCTYPE x [<!ENTITY a "aaaa">]>' + files[name]
    forgery.pack(forgery.resign(files), path)


def _half_junit(run: Run, path: Path) -> None:
    files = forgery.members(path)
    name = next(name for name in files if name.endswith("correct.maths.xml"))
    files[name] = files[name][:200]
    forgery.pack(forgery.resign(files), path)


def _nested(run: Run, path: Path) -> None:
    files = forgery.members(path)
    name = next(name for name in files if name.endswith("/env.json"))
    files[name] = b"[" * 100_000
    forgery.pack(forgery.resign(files), path)


@pytest.mark.parametrize(
    ("forge", "says"),
    [
        (_tampered, "changed, its sha256 is not the one in manifest.json"),
        (_retold, "verdict is 'NOT READY', manifest.json says 'READY ON CPU'"),
        (_truncated, "truncated or not a .tar.gz"),
        (_climbing, "leaves its folder by '..'"),
        (_bomb, "over the limit of 2000 files, 67108864 bytes a file, 268435456 in all"),
        (_many, "over the limit of 2000 files"),
        (_huge, "67108865 bytes, over the limit of 67108864"),
        (_link, "not a plain file"),
        (_renamed, "its name is not a bundle's"),
        (_digits, "artifacts/exit.json: unreadable"),
        (_digits_in_the_manifest, "manifest.json: not "),
        (_entities, "declares entities"),
        (_half_junit, "maths.verdict is 'PASSED', the raw records give 'MISSING'"),
        (_nested, "artifacts/env.json: unreadable"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_hostile_bundle_is_refused_with_its_reason(run, capsys, forge: Callable[[Run, Path], None], says: str):
    forge(run, pack(run))
    code, text = publish_(run)
    assert code == 1
    assert "✅" not in text
    assert re.search(rf"❌ \*\*Refused\*\*: `[^`]+`: `[^`]*{re.escape(says)}", text), text
    assert not list(run.root.rglob("escaped.txt"))
    assert not [line for line in capsys.readouterr().out.splitlines() if line.startswith("::")]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--head", "f" * 40), f"made for commit {SHA}, expected {'f' * 40}"),
        (("--run", "7.2"), "made for run r1, expected 7.1 or 7.2"),
        (("--profiles", "a100,a100x2"), "made for profile cpu, expected a100 or a100x2"),
    ],
)
def test_a_bundle_of_another_commit_run_or_profile_is_refused(run, options, says):
    pack(run)
    code, text = publish_(run, *options)
    assert (code, says in text) == (1, True), text


def test_a_bundle_judged_by_another_runbook_is_refused_before_its_patterns_run(run):
    slow = run.runbook.read_text().replace('allow = { "*" = ["CUDA"] }', 'allow = { "*" = ["(C|CU|CUD|.)*!"] }')
    path = pack(run)
    files = forgery.members(path)
    name = next(name for name in files if name.endswith("/runbook.toml"))
    files[name] = slow.encode()
    forgery.pack(forgery.resign(files), path)
    code, text = publish_(run)
    assert (code, "not the one this checkout judges by" in text) == (1, True), text


def test_an_uncommitted_tree_is_refused(run):
    env = json.loads((run.artifacts / "env.json").read_text())
    run.write("env.json", json.dumps({**env, "dirty": True}))
    run.judge()
    pack(run)
    assert "made with uncommitted changes" in publish_(run)[1]


def test_of_a_job_that_was_run_again_the_last_attempt_counts(run):
    for step in run.book.steps:
        run.record(step.id, run_id="7.1")
    run.judge()
    passed = pack(run, "bundle-cpu-py3.10-1")
    _tampered(run, pack(run, "bundle-cpu-py3.12-1"))
    (passed.parents[1] / "bundle-cpu-py3.12-2").mkdir()
    (passed.parents[1] / "bundle-cpu-py3.12-2" / passed.name).write_bytes(passed.read_bytes())
    code, text = publish_(run, "--run", "7.2")
    assert (code, text.count("✅ **READY ON CPU**")) == (0, 2), text


def test_no_bundle_is_no_proof(run):
    code, text = publish_(run)
    assert (code, "❌ The run left no bundle" in text) == (3, True)


def test_too_many_bundles_are_refused_unread(run, tmp_path):
    packed = pack(run)
    for number in range(publish.MAX_BUNDLES):
        folder = tmp_path / "incoming" / str(number)
        folder.mkdir()
        (folder / packed.name).write_bytes(b"")
    code, text = publish_(run)
    assert (code, "more than 16 bundles" in text) == (1, True)


def hostile_run(run: Run) -> None:
    """A failing run that says HOSTILE wherever a run can say anything, in a bundle that verifies."""
    message = quoteattr(re.sub(r"[\x00-\x1f]", "", HOSTILE))
    passing = '<testcase classname="nsa.tests.test_block_math" name="test_taps" time="0.3" />'
    failing = passing.replace(" />", f"><failure message={message}/></testcase>")
    xml = MATHS_XML.replace('failures="0"', 'failures="1"').replace(passing, failing)
    run.write("junit/correct.maths.xml", xml)
    run.write("test-reports/maths.txt", "1 failed, 1 passed in 1s\n")
    env = json.loads((run.artifacts / "env.json").read_text())
    env |= {"python": HOSTILE, "gpus": [{"name": HOSTILE}], "versions": {"torch": HOSTILE}}
    run.write("env.json", json.dumps(env))
    run.write("@everyone [a](evil.example) `x` | <b>/training.csv", "step,loss,lr,toks_per_s\n1,2,3,4\n")
    run.write("train_showcase/zz @everyone <img>.pt", "weights")
    run.record("maths", exit_code=1)
    run.record("kernels", exit_code=None, note=HOSTILE)
    run.judge()
    run.write("summary.md", f"NOT READY {HOSTILE}\n\n# {HOSTILE}\n")


def test_markup_in_a_bundle_reaches_the_comment_only_inside_code_spans(run):
    hostile_run(run)
    pack(run)
    code, text = publish_(run)
    assert code == 0
    assert text.count("everyone") == 7, "two reasons, Python, GPU, torch, a figure, a checkpoint; nothing of summary.md"
    outside = re.sub(r"`[^`\n]*`", "", text)
    for part in ("@", "evil", "<img", "](", "#1", "\u202e", "\x1b", "$x"):
        assert part not in outside, part
    assert all(character.isprintable() for character in text.replace("\n", ""))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} == {4, 8}


@pytest.mark.parametrize(
    ("text", "span"),
    [("a`b``c", "`a'b''c`"), ("a|b\\|c", "`a¦b\\¦c`"), (" a\nb\x00 ", "`a b`"), ("", "`?`"), ("x" * 999, None)],
)
def test_a_code_span_holds_whatever_it_is_given(text, span):
    shown = publish.code(text)
    assert shown.count("`") == 2
    assert shown == span if span else len(shown) == 162


def test_a_long_comment_is_cut_below_githubs_limit(run):
    hostile_run(run)
    pack(run)
    each = publish.check(run.root / "incoming", Expected(SHA), run.runbook)
    text = publish.comment(each * 64, Expected(SHA), "ci")
    assert len(text) < 65_536
    assert text.count("<details>") == text.count("</details>")
    assert "(cut: GitHub takes no longer comment)" in text


def test_a_check_without_end_is_ended(run, monkeypatch):
    pack(run)
    monkeypatch.setattr(publish, "SECONDS", 0.01)
    assert "checking it took more than 0.01 s" in publish_(run)[1]


def test_a_check_that_exhausts_its_memory_is_a_refusal(run, monkeypatch):
    pack(run)
    monkeypatch.setattr(publish, "MEMORY", 2**20)
    assert "checking it broke off" in publish_(run)[1]


def test_usage_is_refused(run, capsys):
    for arguments in (
        ["nowhere", "--head", SHA],
        [str(run.root), "--head", "main"],
        [str(run.root)],
        [str(run.root), "--profiles", "a"],
    ):
        with pytest.raises(SystemExit) as stop:
            publish.main(arguments)
        assert stop.value.code == 2
    assert "does not match" in capsys.readouterr().err


@pytest.mark.parametrize(("module", "says"), [("publish", "the commit they must be of"), ("changes", "earlier run")])
def test_requirements_host_suffices(module, says):
    hidden = "import sys; sys.modules.update(dict.fromkeys(('torch', 'yaml', 'matplotlib', 'jinja2', 'numpy'), None)); "
    code = hidden + f"import runpy; sys.argv = ['x', '--help']; runpy.run_module('ci.{module}', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, says in done.stdout) == (0, True), done.stderr


def test_gzip_of_anything_else_is_refused(run):
    folder = run.root / "incoming" / "bundle-cpu-1"
    folder.mkdir(parents=True)
    (folder / "nsa-readiness-0123456789ab-cpu-r1.tar.gz").write_bytes(gzip.compress(b"no tar"))
    assert publish_(run)[0] == 1
