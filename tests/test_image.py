"""The CPU image for real: every canary's exit code, and what the engine's run makes of hangs, kills, memory, leaks.

Skipped, with the reason, where there is no engine or the image of this tree was not built: `nox -s image -- cpu`.
NSA_CI_NEED_IMAGE makes a failure of that.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from test_canaries import CANARIES, CODES, plant

ROOT = Path(__file__).resolve().parent.parent


def lack(reason: str) -> None:
    (pytest.fail if os.environ.get("NSA_CI_NEED_IMAGE") else pytest.skip)(reason)


@pytest.fixture(scope="session")
def docker_engine():
    pytest.importorskip("docker.client", reason="needs the Docker SDK")
    from ci import engine

    try:
        return engine.connect()
    except engine.EngineError as error:
        lack(str(error))


@pytest.fixture(scope="session")
def image(docker_engine):
    from docker.errors import ImageNotFound

    from ci import engine, engine_build, engine_options

    try:
        wanted = engine_build.plan(ROOT, engine_options.LANES["cpu"], base=os.environ.get("NSA_CI_BASE", ""))
        return docker_engine.images.get(wanted.tag)
    except engine.EngineError as error:
        lack(str(error))
    except ImageNotFound:
        lack(f"{wanted.tag}, the image of this tree, is not built; nox -s image -- cpu")


@pytest.fixture
def run(docker_engine, image, tmp_path):
    """Runs a container of the image: (what the engine reports, its lines). Its evidence goes to tmp_path/evidence."""
    from ci import engine

    def run(*command: str, **options):
        lines: list[str] = []
        request = engine.Request(image.id, list(command), **options)
        finished = engine.run(docker_engine, replace(request, timeout=options.get("timeout", 240)), place, lines.append)
        return finished, lines

    place = tmp_path / "evidence"
    place.mkdir()
    return run


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    root = tmp_path_factory.mktemp("planted")
    plant(root)
    (root / "canaries.toml").write_text(CANARIES.read_text())
    root.chmod(0o755)
    return root


@pytest.mark.parametrize("name", CODES)
def test_a_canary_gives_its_code_in_the_container(run, planted, name):
    inside = "cp -a /planted /tmp/root && exec python -m ci --root /tmp/root --steps /planted/canaries.toml stage"
    mounts, environment = {planted: "/planted"}, {"NSA_CI_ARTIFACTS": "/artifacts"}
    finished, lines = run("bash", "-c", f"{inside} {name}", mounts=mounts, environment=environment)
    code, verdict = CODES[name]
    assert (finished.code, finished.container_code) == (code, code), "\n".join([finished.said, *lines])
    assert any(line.startswith(f"  {verdict:8} {name} (") for line in lines), lines


def test_a_container_that_hangs_is_stopped_and_gone(run, docker_engine, monkeypatch):
    from ci import engine

    monkeypatch.setattr(engine, "GRACE_S", 2)
    options = {"timeout": 5, "environment": {"NSA_CI_RUN_ID": "hangs"}}
    finished, lines = run("bash", "-c", "trap '' TERM; echo started; sleep 600 & wait; sleep 600", **options)
    assert (finished.code, finished.timed_out) == (124, True)
    assert lines == ["started"]
    assert docker_engine.containers.list(all=True, filters={"label": f"{engine.RUN}=hangs"}) == []


def test_a_container_told_to_stop_ends_its_step_and_says_so(run, planted):
    inside = "cp -a /planted /tmp/root; sed -i 's/timeout = 1$/timeout = 90/' /tmp/root/canaries.toml; "
    inside += "exec python -m ci --root /tmp/root --steps /tmp/root/canaries.toml stage hangs"
    options = {"mounts": {planted: "/planted"}, "environment": {"NSA_CI_ARTIFACTS": "/artifacts"}, "timeout": 20}
    finished, lines = run("bash", "-c", inside, **options)
    assert (finished.code, finished.container_code) == (124, 143), lines


def test_a_kill_from_outside_is_a_failure_without_a_verdict(run):
    finished, _ = run("bash", "-c", "kill -9 $$")
    assert (finished.code, finished.container_code) == (1, 137)
    assert "no exit.json" in finished.said


def test_out_of_memory_is_the_machines(run):
    finished, _ = run("python", "-c", "x = bytearray(2**30)", memory="64m")
    assert (finished.code, finished.oom_killed) == (75, True)
    assert "out of memory: killed at its limit of 64m" in finished.said


@pytest.mark.parametrize(("code", "recorded"), [(3, 0), (0, 3)])
def test_an_exit_code_and_an_exit_json_that_disagree_are_not_believed(run, code, recorded):
    finished, _ = run("bash", "-c", f"echo '{{\"code\": {recorded}}}' > /artifacts/exit.json; exit {code}")
    assert finished.code == 75
    assert "neither is believed" in finished.said


def test_preflight_as_any_user_without_network_on_a_read_only_system(run, tmp_path):
    finished, lines = run("preflight", user="4242:4242")
    assert finished.code == 0, lines
    env = json.loads((tmp_path / "evidence/env.json").read_text())
    assert (env["network"], env["image"]["lane"]) == (False, "cpu")
    assert env["image"]["stand_in"] == bool(os.environ.get("NSA_CI_BASE"))
    assert any("stand-in base" in line for line in lines) == env["image"]["stand_in"]
    assert len(env["image"]["torch_sha256"]) == 64


def test_the_image_says_what_it_was_made_from(image):
    import hashlib

    assert image.labels["nsa-readiness.lock"] == hashlib.sha256((ROOT / "docker/lock-cpu.txt").read_bytes()).hexdigest()
    assert image.labels["nsa-readiness.stand-in"] == ("yes" if os.environ.get("NSA_CI_BASE") else "")
    assert image.labels["org.opencontainers.image.revision"]
    assert image.attrs["Config"]["User"] == "10001:10001"
    history = json.dumps(image.history()) + json.dumps(image.attrs["Config"])
    assert "127.0.0.1" not in history, "an address of the build machine is in a layer's command"


def test_no_layer_keeps_the_machines_pip_configuration(run):
    finished, lines = run("bash", "-c", "cat /etc/pip.conf /run/ca.crt 2>/dev/null | wc -c", judged=False)
    assert (finished.code, lines) == (0, ["0"])


def test_artifacts_that_cannot_be_written_are_a_configuration_error(run, tmp_path):
    finished, lines = run("preflight", mounts={tmp_path: "/artifacts"})
    assert finished.code == 78
    assert lines == [
        "nsa-readiness: /artifacts is not writable; make it writable for uid 10001, or add --user $(id -u):$(id -g)"
    ]


def test_a_gpu_that_the_engine_did_not_give_is_infrastructure(run):
    finished, lines = run("preflight", environment={"NSA_CI_GPUS": "all"})
    assert finished.code == 75
    assert any("the engine ignored the request" in line for line in lines), lines


def test_a_gpu_profile_without_a_gpu_says_what_to_add(run):
    finished, lines = run("preflight", environment={"NSA_CI_PROFILE": "gpu"})
    assert finished.code == 75
    assert any("add --gpus all" in line for line in lines), lines


def test_an_unknown_command_names_the_stages(run):
    finished, lines = run("gpu_party")
    assert finished.code == 2
    assert "stages: cpu_correctness, gpu_parity" in " ".join(lines)


def test_a_bundle_that_leaves_its_folder_is_refused_inside_too(run, tmp_path):
    folder = tmp_path / "bundles"
    folder.mkdir()
    with tarfile.open(folder / "evil.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("nsa-readiness-x/../../evil"), io.BytesIO())
    finished, lines = run("bundle", "verify", "/in/evil.tar.gz", mounts={folder: "/in"}, judged=False)
    assert finished.code == 1
    assert "leaves its folder" in lines[0]


def test_only_plain_files_come_out_of_a_container(run, tmp_path):
    run("bash", "-c", "cd /artifacts; ln -s /etc/passwd link; mkfifo pipe; mkdir -p a/b; echo hi > a/b/c", judged=False)
    left = [path.relative_to(tmp_path / "evidence") for path in sorted((tmp_path / "evidence").rglob("*"))]
    assert [str(path) for path in left] == ["a", "a/b", "a/b/c"]


def test_what_a_killed_caller_left_is_removed_by_the_next_run(docker_engine, image):
    from ci import engine

    caller = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    mine = engine._owner(os.getpid())
    dead = mine.replace(f"/{os.getpid()}/", f"/{caller.stdout.strip()}/")
    create, future = docker_engine.containers.create, "99999999999"
    boxes = [
        create(image.id, labels={engine.RUN: "yes", engine.OWNER: owner, engine.DEADLINE: deadline})
        for owner, deadline in ((dead, future), (mine, "1"), (mine, future), ("other/1/1", future))
    ]
    try:
        gone = engine.reap(docker_engine)
        assert {box.name for box in boxes[:2]} <= set(gone)
        assert not {box.name for box in boxes[2:]} & set(gone)
    finally:
        for box in boxes[2:]:
            box.remove(v=True, force=True)


def test_an_image_of_somebody_else_is_refused(docker_engine, image):
    from ci import engine

    name = "nsa-readiness-test:not-ours"
    docker_engine.images.load(_empty_image(name))
    try:
        with pytest.raises(engine.EngineError, match="not one of this project's") as refused:
            engine.ours(docker_engine, name)
        assert refused.value.code == 78
    finally:
        docker_engine.images.remove(name, force=True)


def _empty_image(name: str) -> bytes:
    """An image of one empty layer, as `docker save` writes it."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w"):
        pass
    import hashlib

    digest = hashlib.sha256(layer.getvalue()).hexdigest()
    config = {"architecture": "amd64", "os": "linux", "config": {}, "rootfs": {"type": "layers"}}
    config["rootfs"]["diff_ids"] = [f"sha256:{digest}"]
    manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        members = {"layer.tar": layer.getvalue(), "config.json": json.dumps(config).encode()}
        members["manifest.json"] = json.dumps(manifest).encode()
        for member, data in members.items():
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return whole.getvalue()
