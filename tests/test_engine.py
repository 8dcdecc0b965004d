"""What the engine's side decides, without an engine: codes, arguments, refusals, what a build is made of.

tests/test_image.py does the same with a real one.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import subprocess
import sys
import tarfile
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest

from ci import container, engine_options

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("docker.client", reason="needs the Docker SDK")
CPU, GPU = engine_options.LANES["cpu"], engine_options.LANES["gpu"]


@pytest.fixture
def engine():
    from ci import engine

    return engine


@pytest.fixture
def build():
    from ci import engine_build

    return engine_build


@pytest.fixture
def tree(tmp_path):
    """A small tree that the build code takes for the project's."""
    for name in ("docker", "nsa/__pycache__", ".git"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / ".dockerignore").write_text("*\n!docker\n!nsa\n!requirements-*.txt\n**/__pycache__\n**/.*\n")
    for name in ("docker/lock-cpu.txt", "docker/lock-gpu.txt", "nsa/a.py", "requirements-cpu.txt", "secrets.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "nsa/__pycache__/a.pyc").write_text("")
    (tmp_path / "nsa/.env").write_text("")
    return tmp_path


def pin(tree: Path, base: str = "unresolved", wheel: str = "unresolved") -> None:
    text = f'[base]\nimage = "python:3.11-slim"\ndigest = "{base}"\n[flash-attn]\nurl = "https://host/x.whl"\n'
    (tree / "docker/pins.toml").write_text(f'{text}sha256 = "{wheel}"\n')


@pytest.mark.parametrize(
    ("state", "recorded", "timed_out", "code", "said"),
    [
        ({"ExitCode": 0}, 0, False, 0, ""),
        ({"ExitCode": 3}, 3, False, 3, ""),
        ({"ExitCode": 2}, None, False, 2, ""),  # a usage error comes before any exit.json
        ({"ExitCode": 0}, None, False, 1, "ended with 0 and left no exit.json"),
        ({"ExitCode": 137}, None, False, 1, "killed from outside"),
        ({"ExitCode": 137, "OOMKilled": True}, None, False, 75, "out of memory"),
        ({"ExitCode": 1, "OOMKilled": True}, 1, False, 75, "out of memory"),
        ({"ExitCode": 0, "OOMKilled": True}, 0, False, 0, ""),
        ({"ExitCode": 1}, 0, False, 75, "neither is believed"),
        ({"ExitCode": 143}, 143, True, 124, "did not end within 60 s"),
        ({"ExitCode": 127, "Error": "exec: not found"}, None, False, 75, "engine error"),
    ],
)
def test_the_one_exit_code_of_a_container(engine, state, recorded, timed_out, code, said):
    request = engine.Request("image", timeout=60, memory="1g")
    got, why = engine.judge(state, request, timed_out, recorded)
    assert got == code
    assert said in why
    assert bool(why) == bool(said)


def test_a_program_of_the_image_keeps_its_own_code(engine):
    assert engine.judge({"ExitCode": 42}, engine.Request("image", judged=False), False, None) == (42, "")


def test_a_container_gets_no_more_than_it_needs(engine):
    given = engine.arguments(engine.Request("name", ["preflight"]), SimpleNamespace(id="sha256:1"))
    assert (given["image"], given["command"]) == ("sha256:1", ["preflight"])
    assert (given["network_mode"], given["read_only"], given["cap_drop"]) == ("none", True, ["ALL"])
    assert given["environment"] == {"NSA_CI_IMAGE_ID": "sha256:1", "NSA_CI_OFFLINE": "1"}
    assert not {"auto_remove", "remove", "device_requests", "mem_limit", "user", "privileged"} & set(given)
    assert float(given["labels"][engine.DEADLINE]) > 0
    assert given["labels"][engine.OWNER] == engine._owner(os.getpid()) != ""


@pytest.mark.parametrize(
    ("gpus", "wanted"), [("all", {"Count": -1, "DeviceIDs": []}), ("0,1", {"Count": 0, "DeviceIDs": ["0", "1"]})]
)
def test_gpus_are_asked_for_by_id_and_told_to_the_inside(engine, gpus, wanted):
    given = engine.arguments(engine.Request("name", gpus=gpus, network="bridge"), SimpleNamespace(id="i"))
    (asked,) = given["device_requests"]
    assert {key: asked[key] for key in wanted} == wanted
    assert asked["Capabilities"] == [["gpu"]]
    assert given["environment"]["NSA_CI_GPUS"] == gpus
    assert "NSA_CI_OFFLINE" not in given["environment"]


@pytest.mark.parametrize(
    ("asked", "uuids", "seen", "status"),
    [
        ("all", [], 0, "fail"),
        ("all", ["GPU-a"], 1, "ok"),
        ("GPU-a", ["GPU-a"], 1, "ok"),
        ("GPU-a", ["GPU-b"], 1, "fail"),
        ("0,1", ["GPU-a"], 1, "fail"),
        ("0,1", ["GPU-a", "GPU-b"], 2, "ok"),
    ],
)
def test_the_inside_proves_that_it_got_the_gpus(asked, uuids, seen, status):
    facts = {"gpus_asked": asked, "gpus": [{"uuid": each} for each in uuids], "torch": {"devices": [{}] * seen}}
    ((name, got, _, code),) = container.check(facts)
    assert (name, got, code) == ("gpus-asked", status, 75 if status == "fail" else 0)


def test_a_stand_in_base_is_a_note_and_a_damaged_description_a_failure(tmp_path, monkeypatch):
    described = tmp_path / "image.json"
    monkeypatch.setenv("NSA_CI_IMAGE", str(described))
    described.write_text('{"lane": "cpu", "base": "mine", "stand_in": true, "lock_sha256": "abc"}')
    ((_, status, said, code),) = container.check(container.facts())
    assert (status, said, code) == ("note", "cpu, stand-in base mine, not the pinned one, lock sha256 abc", 0)
    described.write_text("{")
    ((_, status, said, code),) = container.check(container.facts())
    assert (status, code) == ("fail", 78)
    assert "cannot be read" in said


def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ci", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_no_engine_is_infrastructure_with_the_reason_and_a_remedy(tmp_path):
    nowhere = {"DOCKER_HOST": f"unix://{tmp_path}/nothing.sock", "NSA_CI_ROOT": str(tmp_path)}
    done = call("image", "cpu", "preflight", **nowhere)
    assert done.returncode == 75, done.stdout + done.stderr
    assert "no Docker engine answers at unix://" in done.stdout
    assert "ci/engine.sh" in done.stdout
    assert "Traceback" not in done.stderr
    assert '"code": 75' in (tmp_path / "artifacts/exit.json").read_text()


@pytest.mark.parametrize("arguments", [["image", "tpu"], ["repro"]])
def test_a_wrong_command_line_is_usage(arguments):
    done = call(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_build_refuses_while_a_pin_is_unresolved(build, engine, tree):
    pin(tree)
    with pytest.raises(engine.EngineError, match="digest is unresolved; run `nox -s lock`") as refused:
        build.plan(tree, CPU)
    assert refused.value.code == 78
    pin(tree, base="sha256:" + "a" * 64)
    assert build.plan(tree, CPU).arguments["BASE"] == "python:3.11-slim@sha256:" + "a" * 64
    with pytest.raises(engine.EngineError, match="wheel's sha256 is unresolved"):
        build.plan(tree, GPU)
    pin(tree, base="sha256:" + "a" * 64, wheel="b" * 64)
    assert build.plan(tree, GPU).arguments["FLASH_ATTN_SHA256"] == "b" * 64


def test_a_stand_in_and_a_missing_flash_attn_are_said(build, tree):
    pin(tree)
    wanted = build.plan(tree, GPU, base="mine:1", flash_attn=False)
    assert (wanted.arguments["BASE"], wanted.arguments["STAND_IN"]) == ("mine:1", "yes")
    assert wanted.arguments["FLASH_ATTN"] == "none"
    assert [note.split(":")[0] for note in wanted.notes] == ["stand-in base mine", "without flash-attn, as asked"]


def test_an_image_is_stale_exactly_when_something_in_it_changed(build, tree):
    pin(tree)
    before = build.plan(tree, CPU, base="mine").key
    assert [str(path.relative_to(tree)) for path in build.context(tree)] == [
        "docker/lock-cpu.txt",
        "docker/lock-gpu.txt",
        "docker/pins.toml",
        "nsa/a.py",
        "requirements-cpu.txt",
    ]
    (tree / "secrets.txt").write_text("changed")
    (tree / "nsa/__pycache__/a.pyc").write_text("changed")
    assert build.plan(tree, CPU, base="mine").key == before
    assert build.plan(tree, CPU, base="other").key != before
    (tree / "nsa/a.py").write_text("changed")
    assert build.plan(tree, CPU, base="mine").key != before


def test_a_folder_of_wheels_is_served_to_the_build_and_an_index_address_is_passed_on(build, tmp_path):
    (tmp_path / "x.whl").write_text("wheel")
    settings = {"find-links": str(tmp_path), "extra-index-url": "https://host/simple", "timeout": "9"}
    with build._served(settings) as (handed, local):
        assert local
        assert handed["extra-index-url"] == "https://host/simple"
        with urllib.request.urlopen(handed["find-links"] + "x.whl", timeout=5) as answer:
            assert answer.read() == b"wheel"
    with build._served({"timeout": "9"}) as (handed, local):
        assert (handed, local) == ({"timeout": "9"}, False)


def test_a_client_without_buildkit_is_passed_over(build, engine, tmp_path, monkeypatch):
    def client(folder: str, body: str) -> str:
        path = tmp_path / folder / "docker"
        path.parent.mkdir()
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
        return str(path.parent)

    without = client("a", '[ "$1" = --version ] && echo "Docker version 28.2.2, build x"')
    old = client("b", '[ "$1" = --version ] && echo "Docker version 20.10.24+dfsg1, build x"')
    plugin = client("c", '[ "$1" = buildx ] && echo v0.20')
    monkeypatch.setattr(build, "FALLBACK", tmp_path)
    monkeypatch.setenv("PATH", os.pathsep.join([without, old]))
    assert build.builder() == ([f"{old}/docker", "build"], {"DOCKER_BUILDKIT": "1"})
    monkeypatch.setenv("PATH", os.pathsep.join([without, plugin, old]))
    assert build.builder() == ([f"{plugin}/docker", "buildx", "build", "--load"], {})
    monkeypatch.setenv("PATH", without)
    with pytest.raises(engine.EngineError, match="no docker CLI that speaks BuildKit"):
        build.builder()


@pytest.mark.parametrize("name", ["artifacts/../../evil", "/etc/evil", "../evil"])
def test_an_archive_that_leads_out_of_its_folder_is_refused(engine, tmp_path, name):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        tar.addfile(tarfile.TarInfo(name))
    box = SimpleNamespace(get_archive=lambda path: (iter([packed.getvalue()]), {}))
    with pytest.raises(engine.EngineError, match="leads out of it"):
        engine.fetch(box, "/artifacts", tmp_path / "target")
    assert not (tmp_path / "evil").exists()


def test_a_link_in_the_way_is_not_followed(engine, tmp_path):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("artifacts/exit.json"))
    (tmp_path / "target").mkdir()
    (tmp_path / "target/exit.json").symlink_to(tmp_path / "elsewhere")
    box = SimpleNamespace(get_archive=lambda path: (iter([packed.getvalue()]), {}))
    with pytest.raises(engine.EngineError, match="a link in the way"):
        engine.fetch(box, "/artifacts", tmp_path / "target")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("what", "command", "judged"),
    [
        ([], [], True),
        (["gpu_parity"], ["gpu_parity"], True),
        (["gpu_parity", "--", "-k", "x"], ["gpu_parity", "--", "-k", "x"], True),
        (["-l"], ["-l"], False),
        (["bash", "-c", "true"], ["bash", "-c", "true"], False),
    ],
)
def test_the_command_line_reaches_the_container(what, command, judged):
    from ci import engine_command

    options = argparse.ArgumentParser()
    options.add_argument("--profile", default="")
    engine_options.add_image(options.add_subparsers(dest="command"))
    asked = engine_command.request(options.parse_args(["--profile", "cpu", "image", "cpu", *what]), "name")
    assert (asked.command, asked.judged) == (command, judged)
    assert asked.environment["NSA_CI_PROFILE"] == "cpu"
    gpu = engine_command.request(options.parse_args(["image", "--gpus", "0,1", "gpu"]), "name")
    assert gpu.gpus == "0,1"
    assert engine_command.request(options.parse_args(["image", "gpu"]), "name").gpus == "all"


def test_every_command_of_the_page_is_in_the_gate_or_says_why_not():
    gate = (ROOT / ".ci/run").read_text() + (ROOT / ".github/workflows/ci.yml").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/containers.md").read_text(), re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    assert len(lines) > 10
    for line in lines:
        command, _, comment = line.partition("#")
        ran = command.strip() in gate or command.strip().removeprefix('eval "$(').removesuffix(')"') in gate
        assert ran or re.match(r" not in the gate[^:]*: ?\S|.*not in the gate, minutes", comment), line


def test_no_module_shadows_the_sdk():
    assert not (ROOT / "docker/__init__.py").exists()
