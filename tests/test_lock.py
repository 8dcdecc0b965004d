"""The hashed locks: made of these inputs, whole, without a host; and drift is found offline."""

from __future__ import annotations

import hashlib
import re
import shutil
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ci import lock

ROOT = Path(__file__).resolve().parent.parent
CPU, GPU = (ROOT / each.path for each in lock.LOCKS)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "docker").mkdir()
    for each in lock.LOCKS:
        for name in (each.path, each.inputs):
            shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_the_locks_are_those_of_the_inputs():
    assert lock.drift(ROOT) == []


def test_the_locks_name_no_host_and_no_place():
    for path in (CPU, GPU):
        text = path.read_text()
        assert not re.search(r"://|--(extra-)?index|--find-links|resolved|(?m:^-[ef])", text), path
        assert not re.search(r"(^|\s)/\w", text), path


def test_every_pin_has_a_hash_and_is_there_once():
    for path in (CPU, GPU):
        text = path.read_text()
        names = re.findall(r"(?m)^([A-Za-z0-9._-]+)==", text)
        assert len(names) == len(set(names)) > 50
        for block in re.split(r"(?m)^(?=[A-Za-z0-9])", text)[1:]:
            assert re.match(r"\S+==\S+ \\\n +--hash=sha256:[0-9a-f]{64}\b", block), block[:80]


def test_the_gpu_lock_holds_torch_for_cuda_12_1_and_its_triton():
    pins = lock.pins(GPU.read_text())
    assert (pins["torch"], pins["triton"]) == ("2.4.1", "3.0.0")
    assert pins["nvidia-cuda-runtime-cu12"].startswith("12.1.")
    assert pins["numpy"] < "2"


def test_the_cpu_lock_holds_all_that_torch_needs_but_torch_and_cuda():
    pins = lock.pins(CPU.read_text())
    assert not [name for name in pins if name == "torch" or name.startswith(("nvidia-", "cuda-"))]
    needed = [Requirement(line) for line in metadata.requires("torch") or []]
    needed = [each for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})]
    needed = [each for each in needed if not each.name.startswith(("nvidia-", "cuda-"))]
    assert needed
    for each in needed:
        assert each.specifier.contains(pins[canonicalize_name(each.name)]), each


@pytest.mark.parametrize("which", lock.LOCKS, ids=["cpu", "gpu"])
def test_a_moved_input_is_drift(tree: Path, which: lock.Lock):
    edit(tree / which.inputs, "pytest==", "pytest==0.")
    said = "\n".join(lock.drift(tree))
    assert f"{which.path}: not made from this {which.inputs}; run: nox -s lock" in said
    assert "has pytest" in said
    assert all(line.startswith(which.path) for line in said.splitlines())


def test_a_new_input_is_drift(tree: Path):
    with (tree / "requirements-cpu.txt").open("a") as file:
        file.write("left-pad==1.0\n")
    assert any("left-pad not at all" in line for line in lock.drift(tree))


def test_a_comment_in_the_input_is_no_drift(tree: Path):
    edit(tree / "requirements-cpu.txt", "# data and tokenizers", "# the data")
    assert lock.drift(tree) == []


def test_an_input_of_another_python_is_no_gap(tree: Path):
    assert 'python_version < "3.11"' in (tree / "requirements-cpu.txt").read_text()
    assert "tomli" not in lock.pins(CPU.read_text())
    assert lock.drift(tree) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [("pytest==", "pytest==9"), ("--hash=sha256:", "--hash=sha256:0"), ("# via", "# wanted by")],
    ids=["version", "hash", "remark"],
)
def test_a_lock_edited_by_hand_is_drift(tree: Path, old: str, new: str):
    edit(tree / "docker/lock-gpu.txt", old, new)
    assert any("docker/lock-gpu.txt: edited by hand" in line for line in lock.drift(tree))


def test_a_lock_without_hashes_is_drift_even_if_its_digest_fits(tree: Path):
    path = tree / "docker/lock-cpu.txt"
    text = re.sub(r" \\\n +--hash=\S+", "", path.read_text())
    body = "".join(text.splitlines(keepends=True)[3:])
    path.write_text(re.sub(r"pins sha256:\w+", f"pins sha256:{hashlib.sha256(body.encode()).hexdigest()}", text))
    said = lock.drift(tree)
    assert not any("edited by hand" in line for line in said)
    assert any("absl-py has no hash" in line for line in said)


@pytest.mark.parametrize("name", ["docker/lock-gpu.txt", "requirements-cpu.txt"])
def test_a_missing_file_is_drift(tree: Path, name: str):
    (tree / name).unlink()
    assert any(f"{name} is missing" in line for line in lock.drift(tree))


def test_an_input_that_is_no_requirement_is_named(tree: Path):
    with (tree / "requirements-cpu.txt").open("a") as file:
        file.write("-r other.txt\n")
    assert lock.drift(tree) == ["requirements-cpu.txt: not a requirement: -r other.txt"]


def test_an_image_without_the_docker_folder_has_no_drift(tree: Path):
    shutil.rmtree(tree / "docker")
    assert lock.drift(tree) == []


def test_without_uv_the_remedy_is_named_and_nothing_is_written(tree: Path, monkeypatch, capsys):
    monkeypatch.setattr(lock, "ROOT", tree)
    monkeypatch.setenv("PATH", str(tree))
    before = (tree / "docker/lock-cpu.txt").read_bytes()
    assert lock.main([]) == 78
    said = capsys.readouterr().err
    assert said.startswith("lock: uv is not installed; nox -s lock brings it")
    assert said.count("\n") == 1
    assert (tree / "docker/lock-cpu.txt").read_bytes() == before


def test_check_says_78_for_drift_and_0_without(tree: Path, monkeypatch, capsys):
    monkeypatch.setattr(lock, "ROOT", tree)
    assert lock.main(["--check"]) == 0
    (tree / "docker/lock-gpu.txt").unlink()
    assert lock.main(["--check"]) == 78
    assert "docker/lock-gpu.txt is missing; run: nox -s lock" in capsys.readouterr().err


def fake_uv(folder: Path, script: str) -> str:
    path = folder / "uv"
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)
    return f"{folder}:/usr/bin:/bin"


def test_a_resolution_that_fails_is_one_line_and_no_file(tree: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(lock, "ROOT", tree)
    monkeypatch.setenv("PATH", fake_uv(tmp_path, 'echo "  x No solution found:" >&2; echo "because" >&2; exit 1\n'))
    before = (tree / "docker/lock-cpu.txt").read_bytes()
    assert lock.main([]) == 78
    assert capsys.readouterr().err == "lock: requirements-cpu.txt: x No solution found: because\n"
    assert (tree / "docker/lock-cpu.txt").read_bytes() == before


def test_an_index_that_cannot_be_reached_is_infrastructure(tree: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(lock, "ROOT", tree)
    monkeypatch.setenv("PATH", fake_uv(tmp_path, 'echo "error: Failed to fetch: simple/x" >&2; exit 2\n'))
    assert lock.main([]) == 75


def test_a_made_lock_leaves_torch_out_on_the_cpu_only_and_says_what_moved(
    tree: Path, tmp_path: Path, monkeypatch, capsys
):
    digest = "0" * 64
    script = f"""for last; do :; done
cat > "$last" <<'LOCK'
nvidia-nccl-cu13==2.29.7 \\
    --hash=sha256:{digest}
    # via torch
torch==2.4.1 \\
    --hash=sha256:{digest}
wheel==0.45 \\
    --hash=sha256:{digest}
    # via x
LOCK
"""
    monkeypatch.setenv("PATH", fake_uv(tmp_path, script))
    said = lock.write(tree)
    assert lock.pins((tree / "docker/lock-cpu.txt").read_text()) == {"wheel": "0.45"}
    assert list(lock.pins((tree / "docker/lock-gpu.txt").read_text())) == ["nvidia-nccl-cu13", "torch", "wheel"]
    assert "3 packages" in said[1]
    assert "torch" not in said[1].split("packages, ")[1].split("-absl-py")[0]
