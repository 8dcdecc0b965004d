"""A bundle: the same bytes every time, what it says it holds, no secret, and refused once a part of it is changed."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from report_factory import MATHS_TXT, MATHS_XML, STARTED, Run, make_run

from ci import audit, bundle
from ci.__main__ import main
from ci.redact import Redactor, secrets_in
from ci.session import Session

FAILED_XML = MATHS_XML.replace('failures="0"', 'failures="1"').replace(
    '<testcase classname="nsa.tests.test_block_math" name="test_taps" time="0.3" />',
    '<testcase classname="nsa.tests.test_block_math" name="test_taps" time="0.3">'
    '<failure message="assert 2 == 3">E assert 2 == 3</failure></testcase>',
)
FAILED_TXT = MATHS_TXT.replace("2 passed", "1 failed, 1 passed")
MATHS = "artifacts/junit/correct.maths.xml"

Members = dict[str, bytes]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path)


def pack(run: Run, out: str = "out") -> Path:
    return bundle.build(run.artifacts, run.result, run.root / out, runbook=run.runbook)


def unpack(path: Path) -> Members:
    with tarfile.open(path) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]


def repack(path: Path, members: Members, special: list[tarfile.TarInfo] | None = None) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for info in special or []:
            tar.addfile(info)
    return path


def resign(members: Members) -> Members:
    """What a forger does: every hash and size made to fit the contents again."""
    top = next(iter(members)).split("/")[0]
    files = {name.removeprefix(f"{top}/"): data for name, data in members.items()}
    del files["SHA256SUMS"]
    manifest = json.loads(files["manifest.json"])
    for entry in manifest["files"]:
        data = files[entry["path"]]
        entry["size"], entry["sha256"] = len(data), hashlib.sha256(data).hexdigest()
    files["manifest.json"] = json.dumps(manifest).encode()
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in sorted(files.items()))
    return {f"{top}/{name}": data for name, data in {**files, "SHA256SUMS": sums.encode()}.items()}


def edited(path: Path, edits: dict[str, Callable[[str], str]], *, signed: bool = True) -> Path:
    members = unpack(path)
    top = next(iter(members)).split("/")[0]
    for name, edit in edits.items():
        before = members[f"{top}/{name}"].decode()
        members[f"{top}/{name}"] = edit(before).encode()
        assert edit(before) != before, "the edit must change something"
    return repack(path, resign(members) if signed else members)


def test_building_twice_gives_the_same_bytes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    first = pack(run).read_bytes()
    (run.artifacts / "bench" / "decode.csv").touch()
    (run.artifacts / "bench" / "decode.csv").chmod(0o600)
    monkeypatch.setattr("time.time", lambda: 2e9)
    assert pack(run, "again").read_bytes() == first


def test_name_says_commit_profile_and_run(run: Run) -> None:
    assert pack(run).name == "nsa-readiness-0123456789ab-cpu-r1.tar.gz"


def test_an_untouched_bundle_verifies(run: Run) -> None:
    report = bundle.verify(pack(run))
    assert report.problems == []
    assert (report.ok, report.verdict, report.exit_code) == (True, "READY ON CPU", 0)
    first, note = report.lines()
    assert first == f"verified: READY ON CPU, exit code 0; {report.files} files agree; sha256 {report.sha256}"
    assert note.startswith("note: judged by the runbook.toml in it, which is not this checkout's")


def test_a_failed_run_verifies_as_not_ready(run: Run) -> None:
    run.write("junit/correct.maths.xml", FAILED_XML)
    run.write("test-reports/maths.txt", FAILED_TXT)
    run.record("maths", exit_code=1)
    run.judge()
    report = bundle.verify(pack(run))
    assert (report.problems, report.verdict, report.exit_code) == ([], "NOT READY", 1)


def test_holds_the_evidence_and_lists_checkpoints_by_hash(run: Run) -> None:
    members = unpack(pack(run))
    names = {name.split("/", 1)[1] for name in members}
    assert {"manifest.json", "SHA256SUMS", "artifacts/tracked/note.txt", "artifacts/bench/decode.csv"} <= names
    assert not any(name.endswith((".pt", ".gitkeep")) or "train_showcase.1" in name for name in names)
    manifest = json.loads(next(data for name, data in members.items() if name.endswith("/manifest.json")))
    weights = hashlib.sha256(b"weights").hexdigest()
    assert manifest["checkpoints"] == [
        {"path": "artifacts/train_showcase/step_000200.pt", "size": 7, "sha256": weights, "step": "train"}
    ]
    writers = {entry["path"]: entry["step"] for entry in manifest["files"]}
    assert writers["artifacts/train_showcase/training.csv"] == "train"
    assert writers["artifacts/junit/correct.maths.xml"] == "maths"
    assert writers["artifacts/tracked/note.txt"] == "tracked"


def test_what_is_not_of_this_run_is_left_out_and_named(run: Run) -> None:
    os.utime(run.write("bench/old.csv", "S\n1\n"), (STARTED - 60, STARTED - 60))
    os.utime(run.write("tracked/old.txt", "kept"), (STARTED - 60, STARTED - 60))
    (run.artifacts / "bench" / "link").symlink_to("/etc/hostname")
    run.write("nsa-readiness-000000000000-cpu-r0.tar.gz", "an earlier one")
    run.write("tracked/two\nlines", "")
    (run.artifacts / "tracked" / os.fsdecode(b"\xff")).write_text("")
    members = unpack(pack(run))
    manifest = json.loads(next(data for name, data in members.items() if name.endswith("/manifest.json")))
    assert {entry["path"]: entry["why"] for entry in manifest["left_out"]} == {
        "artifacts/bench/link": "a symbolic link",
        "artifacts/bench/old.csv": "older than this run",
        "artifacts/nsa-readiness-000000000000-cpu-r0.tar.gz": "a bundle",
        "artifacts/tracked/two\nlines": "its name has characters that no archive keeps; rename it",
        "artifacts/tracked/?": "its name has characters that no archive keeps; rename it",
        "artifacts/train_showcase.1/training.csv": "an earlier training run",
    }
    assert bundle.verify(run.root / "out" / bundle.bundle_name(run.result)).ok
    assert any(name.endswith("tracked/old.txt") for name in members)


def test_a_checkpoint_in_tracked_is_packed(run: Run) -> None:
    run.write("tracked/best.pt", "small weights")
    assert any(name.endswith("tracked/best.pt") for name in unpack(pack(run)))


def test_no_machine_path_anywhere(run: Run) -> None:
    run.write("tracked/log.txt", f"wrote {run.root}/artifacts/x and {Path.home()}/.cache/y\n")
    members = unpack(pack(run))
    for name, data in members.items():
        assert not name.startswith("/")
        assert str(run.root).encode() not in data, name
    log = next(data for name, data in members.items() if name.endswith("tracked/log.txt"))
    assert log == b"wrote ./artifacts/x and ~/.cache/y\n"


def test_a_masked_deliverable_still_verifies(run: Run) -> None:
    run.write("train/train_showcase.txt", f"reading {run.root}/data\n")
    run.record("train")
    run.judge()
    report = bundle.verify(pack(run))
    assert report.problems == []


def test_a_runbook_changed_since_is_not_packed(run: Run) -> None:
    run.runbook.write_text(run.runbook.read_text() + "\n# edited\n")
    with pytest.raises(bundle.BundleError, match=r"planted\.toml: changed since the run was judged"):
        pack(run)


def test_a_secret_is_masked_in_text(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPLOAD_TOKEN", "s3cr3t-value-of-mine")
    monkeypatch.setenv("EXTRA_INDEX", "https://me:hunter2hunter2@index.invalid/simple")
    run.write(
        "train/train_showcase.txt", "got s3cr3t-value-of-mine and hunter2hunter2 and czNjcjN0LXZhbHVlLW9mLW1pbmU=\n"
    )
    run.record("train")
    run.judge()
    path = pack(run)
    everything = b"".join(unpack(path).values())
    for value in (b"s3cr3t-value-of-mine", b"hunter2hunter2", b"czNjcjN0LXZhbHVlLW9mLW1pbmU"):
        assert value not in everything
    assert b"[masked:UPLOAD_TOKEN]" in everything
    assert bundle.verify(path).ok


def test_a_run_without_a_bundle_is_not_ready(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPLOAD_TOKEN", "s3cr3t-value-of-mine")
    (run.artifacts / "tracked" / "blob.bin").write_bytes(b"\0\1s3cr3t-value-of-mine")
    said: list[str] = []
    session = Session(run.book, run.root, say=said.append)
    session.profile = "cpu"
    assert session.report().exit_code == 3
    assert json.loads((run.artifacts / "exit.json").read_text())["code"] == 3
    text = (run.artifacts / "summary.md").read_text()
    assert text.startswith("NOT READY (exit code 3). Not proven: ")
    reason = "artifacts/tracked/blob.bin: holds the value of $UPLOAD_TOKEN in a binary file; remove it"
    assert f"- no bundle: {reason}" in text.splitlines()


def test_a_secret_in_a_binary_file_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPLOAD_TOKEN", "s3cr3t-value-of-mine")
    (run.artifacts / "tracked" / "blob.bin").write_bytes(b"\0\1s3cr3t-value-of-mine")
    with pytest.raises(bundle.BundleError, match=r"tracked/blob\.bin: holds the value of \$UPLOAD_TOKEN"):
        pack(run)


def test_an_access_token_is_masked_whatever_its_variable(run: Run) -> None:
    token = "ghp_" + "A1b2" * 9
    run.write("tracked/log.txt", f"using {token}\n")
    assert token.encode() not in b"".join(unpack(pack(run)).values())


@pytest.mark.parametrize(
    "spelling", ['a"b<c&d\\e/f', r"a\"b<c&d\\e/f", "a&quot;b&lt;c&amp;d\\e/f", "a%22b%3Cc%26d%5Ce%2Ff"]
)
def test_a_secret_is_masked_however_it_is_spelled(spelling: str) -> None:
    clean = Redactor({"MY_TOKEN": 'a"b<c&d\\e/f'}).clean
    assert clean("x", f"got {spelling}.".encode()) == b"got [masked:MY_TOKEN]."


def test_the_host_name_leaves_the_junit() -> None:
    clean = Redactor({}).clean
    suite = b'<testsuite name="a" hostname="box.internal" tests="1">'
    assert clean("a.xml", suite) == b'<testsuite name="a" tests="1">'
    assert clean("a.txt", suite) == suite


def test_ordinary_variables_are_not_secrets() -> None:
    plain = {
        "TOKENIZERS_PARALLELISM": "parallel-yes",
        "HOME": "/home/somebody",
        "API_KEY": "short",
        "KEYBOARD": "qwertyuiop",
        "SSH_AUTH_SOCK": "/dev/null",
    }
    assert secrets_in(plain) == {}
    assert secrets_in({"HF_TOKEN": "abcdefghijk", "aws.secret": "abcdefghijk"}) == {
        "HF_TOKEN": "abcdefghijk",
        "aws.secret": "abcdefghijk",
    }


def test_a_path_is_masked_only_as_a_whole() -> None:
    clean = Redactor({}, root=Path("/srv/box"), home=Path("/home/me")).clean
    assert clean("x", b"/srv/box/a /srv/boxes/a /home/me, x/home/me") == b"./a /srv/boxes/a ~, x/home/me"
    assert clean("x.json", json.dumps("in\n/srv/box/a").encode()) == json.dumps("in\n./a").encode()


def flip(path: Path) -> Path:
    return edited(path, {"artifacts/bench/decode.csv": lambda t: t.replace("7.2", "1.2")}, signed=False)


def remove(path: Path) -> Path:
    members = unpack(path)
    return repack(path, {k: v for k, v in members.items() if not k.endswith("decode.csv")})


def add(path: Path) -> Path:
    members = unpack(path)
    top = next(iter(members)).split("/")[0]
    return repack(path, {**members, f"{top}/artifacts/extra.txt": b"new"})


def with_member(name: str, kind: bytes = tarfile.REGTYPE) -> Callable[[Path], Path]:
    def tamper(path: Path) -> Path:
        members = unpack(path)
        info = tarfile.TarInfo(name.format(top=next(iter(members)).split("/")[0]))
        info.type, info.linkname = kind, "/etc/passwd"
        return repack(path, members, [info])

    return tamper


def hide(path: Path) -> Path:
    """Bytes in the padding behind a small file, where no tool looks."""
    stream = bytearray(gzip.decompress(path.read_bytes()))
    start = stream.index(b"kept by hand\n") + 100
    stream[start : start + 6] = b"hidden"
    path.write_bytes(gzip.compress(bytes(stream)))
    return path


def truncate(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-200])
    return path


def append(path: Path) -> Path:
    with path.open("ab") as file:
        file.write(b"trailing")
    return path


def not_a_tar(path: Path) -> Path:
    path.write_bytes(b"PK\3\4 something else")
    return path


@pytest.mark.parametrize(
    ("tamper", "says"),
    [
        (flip, r"decode\.csv: changed"),
        (remove, r"decode\.csv: listed in manifest\.json and not there"),
        (add, r"extra\.txt: there and not listed"),
        (with_member("{top}/artifacts/bench/decode.csv"), r"decode\.csv: there twice"),
        (with_member("../evil.txt"), r"\.\./evil\.txt: leaves its folder"),
        (with_member("{top}/a/../../evil.txt"), "leaves its folder"),
        (with_member("/etc/evil"), "/etc/evil: an absolute path"),
        (with_member("C:/evil"), "an absolute path"),
        (with_member("{top}/link", tarfile.SYMTYPE), "link: a link"),
        (with_member("{top}/hard", tarfile.LNKTYPE), "hard: a link"),
        (with_member("{top}/pipe", tarfile.FIFOTYPE), "pipe: a folder, device or special"),
        (with_member("{top}/null", tarfile.CHRTYPE), "null: a folder, device or special"),
        (with_member("other/file"), "2 top folders"),
        (with_member("{top}/artifacts/bench/decode.csv/x"), "one member is the folder of another"),
        (with_member("{top}/artifacts\\x"), "not a plain relative path"),
        (with_member("{top}/" + "x" * 300), "not a plain relative path"),
        (with_member("{top}/" + "x/" * 60 + "y"), "not a plain relative path"),
        (hide, "holds bytes that belong to none of its files"),
        (truncate, r"truncated or not a \.tar\.gz"),
        (append, r"truncated or not a \.tar\.gz"),
        (not_a_tar, r"truncated or not a \.tar\.gz"),
    ],
)
def test_a_tampered_file_is_refused_by_name(run: Run, tamper: Callable[[Path], Path], says: str) -> None:
    report = bundle.verify(tamper(pack(run)))
    assert not report.ok
    assert re.search(says, report.problems[0]), report.problems
    assert all("\n" not in line for line in report.lines())
    assert report.lines()[0].startswith("refused: ")


@pytest.mark.parametrize("limits", [{"member": 1000}, {"members": 3}, {"total": 5000}])
def test_more_than_the_limits_allow_is_refused(run: Run, limits: dict[str, int]) -> None:
    assert "over the limit" in audit.verify(pack(run), audit.Limits(**limits)).problems[0]


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    assert bundle.verify(tmp_path / "none.tar.gz").lines() == [f"refused: {tmp_path}/none.tar.gz: no such file"]


def test_the_command_checks_each_file_and_fails_if_one_is_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = pack(run), flip(pack(run, "again"))
    assert main(["bundle", "verify", str(good)]) == 0
    assert capsys.readouterr().out.startswith("verified: READY ON CPU, exit code 0; ")
    assert main(["bundle", "verify", str(good), str(bad)]) == 1
    out = capsys.readouterr().out
    assert f"{good}:\nverified: " in out
    assert f"{bad}:\nrefused: artifacts/bench/decode.csv: changed" in out


class TestResignedTampering:
    """Hashes recomputed, so only the contents can give it away."""

    @pytest.fixture
    def failed(self, run: Run) -> Path:
        run.write("junit/correct.maths.xml", FAILED_XML)
        run.write("test-reports/maths.txt", FAILED_TXT)
        run.record("maths", exit_code=1)
        run.judge()
        return pack(run)

    def refusals(self, path: Path) -> str:
        report = bundle.verify(path)
        assert not report.ok
        return "\n".join(report.problems)

    def test_failure_edited_out_of_the_junit(self, failed: Path) -> None:
        said = self.refusals(edited(failed, {MATHS: lambda _: MATHS_XML}))
        assert "maths.failed is 1, the raw records give 0" in said
        assert "the captured output of maths reports a failure, this file none" in said

    def test_failure_edited_out_of_junit_and_result(self, failed: Path) -> None:
        good = edited(
            failed,
            {
                MATHS: lambda _: MATHS_XML,
                "artifacts/result.json": lambda t: t.replace('"FAILED"', '"PASSED"').replace(
                    "NOT READY", "READY ON CPU"
                ),
            },
        )
        assert "maths.verdict is 'PASSED', the raw records give 'FAILED'" in self.refusals(good)

    def test_everything_but_the_captured_output_edited(self, run: Run) -> None:
        """The step's record, its JUnit, result, exit.json and summary all lie; the captured text does not."""
        run.write("test-reports/maths.txt", FAILED_TXT)
        run.record("maths")
        run.judge()
        assert run.result.verdict == "READY ON CPU"
        assert "captured output of maths reports a failure" in self.refusals(pack(run))

    def test_verdict_edited_in_result_and_manifest(self, failed: Path) -> None:
        def lift(text: str) -> str:
            return text.replace("NOT READY", "READY ON CPU").replace('"exit_code": 1', '"exit_code": 0')

        names = ("artifacts/result.json", "manifest.json", "artifacts/exit.json", "artifacts/summary.md")
        said = self.refusals(edited(failed, dict.fromkeys(names, lift)))
        assert "verdict is 'READY ON CPU', the raw records give 'NOT READY'" in said

    def test_a_laxer_runbook_is_not_the_one_of_the_run(self, run: Run) -> None:
        path = edited(pack(run), {"runbook.toml": lambda t: t.replace('"run" }', '"skip_ok" }')})
        assert "runbook.toml: not the one the run was judged by" in self.refusals(path)

    def test_summary_alone_edited(self, failed: Path) -> None:
        said = self.refusals(edited(failed, {"artifacts/summary.md": lambda t: t.replace("NOT READY", "READY", 1)}))
        assert "summary.md: its first line says READY" in said

    def test_exit_json_alone_edited(self, failed: Path) -> None:
        said = self.refusals(edited(failed, {"artifacts/exit.json": lambda t: t.replace("1", "0")}))
        assert "exit.json: not the code 1" in said

    def test_a_deliverable_edited(self, run: Run) -> None:
        path = edited(pack(run), {"artifacts/train_showcase/training.csv": lambda t: t.replace("2.62", "1.62")})
        assert "training.csv was changed after its step" in self.refusals(path)

    def test_a_step_dropped(self, run: Run) -> None:
        members = unpack(pack(run))
        top = next(iter(members)).split("/")[0]
        result = json.loads(members[f"{top}/artifacts/result.json"])
        result["steps"] = [step for step in result["steps"] if step["id"] != "kernels"]
        members[f"{top}/artifacts/result.json"] = json.dumps(result).encode()
        said = self.refusals(repack(run.root / "b.tar.gz", resign(members)))
        assert "says nothing of step kernels" in said

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("artifacts/result.json", "[]"),
            ("artifacts/result.json", "{" * 10),
            ("artifacts/result.json", "[" * 200_000),
            ("artifacts/results/correct.maths.json", '{"id": 3}'),
            ("artifacts/exit.json", "not json"),
            ("manifest.json", '{"schema": 99}'),
            ("runbook.toml", "schema = 2"),
        ],
    )
    def test_nonsense_is_a_refusal_not_a_crash(self, run: Run, name: str, text: str) -> None:
        members = unpack(pack(run))
        top = next(iter(members)).split("/")[0]
        members[f"{top}/{name}"] = text.encode()
        if name != "manifest.json":
            members = resign(members)
        assert name.split("/")[-1] in self.refusals(repack(run.root / "b.tar.gz", members))

    def test_an_entity_bomb_is_not_expanded(self, run: Run) -> None:
        bomb = '<!DOCTYPE x [<!ENTITY a "aaaa">]>'
        path = edited(pack(run), {MATHS: lambda t: t.replace("<testsuites", bomb + "<testsuites", 1)})
        assert "declares entities" in self.refusals(path)

    def test_a_step_that_points_outside_is_refused(self, run: Run) -> None:
        path = edited(
            pack(run), {"runbook.toml": lambda t: t.replace('artifacts/bench/decode.csv", h', 'artifacts/../../x", h')}
        )
        assert "outside artifacts/" in self.refusals(path)
