"""The bills of materials: everything that the images install, who wants it, and the same bytes from the same locks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ci import lock, pins, sbom

ROOT = Path(__file__).resolve().parent.parent
CPU, GPU = lock.LOCKS


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("docker", "nsa"):
        (tmp_path / name).mkdir()
    for name in (pins.PINS, "nsa/__init__.py", *(name for each in lock.LOCKS for name in (each.path, each.inputs))):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def named(bill: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {component["name"]: component for component in bill["components"]}


@pytest.mark.parametrize("which", lock.LOCKS, ids=["cpu", "gpu"])
def test_every_pin_is_a_component_with_all_its_hashes(which: lock.Lock):
    bill = named(sbom.document(ROOT, which))
    for name, block in lock.blocks((ROOT / which.path).read_text()):
        hashes = [each["content"] for each in bill[name]["hashes"]]
        assert bill[name]["purl"] == f"pkg:pypi/{name}@{bill[name]['version']}"
        assert hashes == [line.split(":")[1].split()[0] for line in block.splitlines() if "--hash" in line]


def test_torch_is_in_both_and_flash_attention_where_cuda_is():
    cpu, gpu = (named(sbom.document(ROOT, each)) for each in lock.LOCKS)
    assert (cpu["torch"]["version"], gpu["torch"]["version"]) == ("2.13.0", "2.4.1")
    assert "hashes" not in cpu["torch"]
    assert gpu["torch"]["hashes"]
    assert "flash-attn" in gpu
    assert "flash-attn" not in cpu


def test_the_graph_is_closed_and_reaches_everything_from_the_project():
    for which in lock.LOCKS:
        bill = sbom.document(ROOT, which)
        graph = {each["ref"]: each["dependsOn"] for each in bill["dependencies"]}
        known = {component["bom-ref"] for component in bill["components"]}
        top = bill["metadata"]["component"]["bom-ref"]
        assert graph.keys() == known | {top}
        reached, todo = set(), [top]
        while todo:
            ref = todo.pop()
            if ref not in reached:
                reached.add(ref)
                todo += graph[ref]
        assert reached == known | {top}


def test_who_wants_whom_comes_from_the_lock():
    bill = sbom.document(ROOT, GPU)
    graph = {each["ref"]: each["dependsOn"] for each in bill["dependencies"]}
    assert "pkg:pypi/triton@3.0.0" in graph["pkg:pypi/torch@2.4.1"]
    assert "pkg:pypi/torch@2.4.1" in graph[bill["metadata"]["component"]["bom-ref"]]


def test_an_unresolved_digest_is_said_and_a_recorded_one_is_there(tree: Path):
    base = next(entry["image"] for _, entry in pins.entries(tree) if "image" in entry)
    name, _, tag = base.rpartition(":")
    path = tree / pins.PINS
    path.write_text(path.read_text().replace('digest = "unresolved"', f'digest = "sha256:{"a" * 64}"'))
    component = named(sbom.document(tree, CPU))[name]
    assert (component["type"], component["purl"]) == ("container", f"pkg:docker/{name}@sha256:{'a' * 64}")
    assert "properties" not in component
    path.write_text(path.read_text().replace("sha256:" + "a" * 64, "unresolved"))
    component = named(sbom.document(tree, CPU))[name]
    assert component["version"] == tag
    assert component["properties"] == [{"name": "nsa:digest", "value": "unresolved"}]


def test_the_same_locks_give_the_same_bytes_and_others_another_serial_number(tree: Path):
    first = [path.read_bytes() for path in sbom.write(tree, tree / "a")]
    assert [path.name for path in sbom.write(tree, tree / "b")] == ["sbom-cpu.cdx.json", "sbom-gpu.cdx.json"]
    assert [path.read_bytes() for path in sorted((tree / "b").iterdir())] == first
    path = tree / GPU.path
    path.write_text(path.read_text().replace("\nabsl-py==", "\nabsl-py==9."))
    assert sbom.document(tree, GPU)["serialNumber"] != json.loads(first[1])["serialNumber"]
    assert sbom.document(tree, CPU)["serialNumber"] == json.loads(first[0])["serialNumber"]


def test_no_bill_is_written_of_a_lock_that_has_drifted(tree: Path, monkeypatch, capsys):
    monkeypatch.setattr(sbom, "ROOT", tree)
    path = tree / GPU.path
    path.write_text(path.read_text().replace("\nabsl-py==", "\nabsl-py==9."))
    assert sbom.main(["--out", str(tree / "out")]) == 78
    assert "docker/lock-gpu.txt: edited by hand" in capsys.readouterr().err
    assert not (tree / "out").exists()
