"""Preflight: what a machine must be for a profile, and which exit code stands for what it is not."""

from __future__ import annotations

import copy
import re
import subprocess
from pathlib import Path

import pytest

from ci import facts, nvidia, preflight, runbook

BOOK = runbook.load()
# Recorded on an H100 (driver 580); the other texts below are that line with other values, or nvidia-smi's own messages.
H100 = (Path(__file__).parent / "data/nvidia-smi/h100.csv").read_text()
A100 = H100.replace("H100 80GB HBM3", "A100-SXM4-80GB").replace(" 9.0,", " 8.0,")

CPU = {
    "python": "3.11.7",
    "versions": {"torch": "2.13.0+cpu"},
    "torch": {"torch": "2.13.0+cpu", "cuda": False, "devices": []},
    "triton_required": None,
    "drift": [],
    "lock_drift": [],
    "disk_free_mb": 50_000,
    "shm_mb": 8192,
    "gpus": [],
    "nvidia_problem": "",
    "nvidia_traces": [],
    "cuda_hidden": False,
    "network": False,
}


def machine(smi: str = A100, **changes) -> dict:
    """Facts of a machine whose nvidia-smi says `smi`, and whose torch sees the same GPUs."""
    gpus, problem = nvidia.parse(smi, 0)
    seen = copy.deepcopy(CPU) | {"gpus": [vars(gpu) for gpu in gpus], "nvidia_problem": problem}
    seen["nvidia_traces"] = ["/dev/nvidia0"]
    seen["versions"] = {"torch": "2.4.1", "triton": "3.0.0"}
    seen["triton_required"] = "==3.0.0"
    devices = [{"name": gpu.name, "capability": gpu.capability} for gpu in gpus]
    seen["torch"] = {"torch": "2.4.1", "cuda": bool(devices), "devices": devices}
    seen["selftest"] = {"devices": {"cuda:0": {"matmul": "", "triton_add": ""}}, "flash_attn": "not installed"}
    return seen | changes


def outcome(profile: str, seen: dict, artifacts: Path) -> tuple[int, str]:
    """(exit code, all that failed)."""
    findings = preflight.check(preflight.choose(BOOK, profile, seen), seen, artifacts)
    return preflight.code(findings), "; ".join(f"{f.name}: {f.detail}" for f in findings if f.status == "fail")


def test_a_recorded_query_is_read():
    (gpu,), problem = nvidia.parse(H100, 0)
    assert (gpu.name, gpu.driver, gpu.capability, gpu.total_mb) == ("NVIDIA H100 80GB HBM3", "580.159.04", "9.0", 81559)
    assert (gpu.used_mb, gpu.throttled, gpu.ecc_errors, problem) == (0, False, 0, "")


def test_exit_code_14_is_an_answer_and_others_are_not():
    assert nvidia.parse(H100, 14)[1] == ""
    assert "exits 9" in nvidia.parse(H100, 9)[1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "lists no GPU"),
        ("No devices were found\n", "No devices were found"),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", "has failed"),
        ("Failed to initialize NVML: Driver/library version mismatch\n", "version mismatch"),
        (H100.replace("NVIDIA H100 80GB HBM3", "ERR!"), "ERR!"),
    ],
)
def test_a_text_without_a_gpu_is_a_problem_even_at_exit_code_0(text, said):
    gpus, problem = nvidia.parse(text, 0)
    assert not gpus
    assert said in problem


def test_numbers_the_driver_does_not_give_are_unknown_not_zero():
    (gpu,), _ = nvidia.parse(H100.replace(", 0\n", ", [N/A]\n").replace("81559, 0", "[N/A], ERR!"), 0)
    assert (gpu.total_mb, gpu.used_mb, gpu.ecc_errors) == (None, None, None)


def test_traces_need_no_driver(tmp_path):
    for name, vendor, kind in (("a", "0x10de", "0x030200"), ("b", "0x10de", "0x040300"), ("c", "0x8086", "0x030000")):
        device = tmp_path / "sys/bus/pci/devices" / name
        device.mkdir(parents=True)
        (device / "vendor").write_text(vendor + "\n")
        (device / "class").write_text(kind + "\n")
    assert nvidia.traces(tmp_path) == ["PCI a"]  # its audio function and Intel's graphics are no NVIDIA GPU
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidiactl"):
        (tmp_path / "dev" / name).touch()
    assert nvidia.traces(tmp_path) == ["/dev/nvidia0", "PCI a"]


def test_a_fit_machine_passes(tmp_path):
    assert outcome("cpu", CPU, tmp_path) == (0, "")
    assert outcome("a100", machine(), tmp_path) == (0, "")
    assert outcome("a100x2", machine(A100 * 2), tmp_path) == (0, "")
    assert outcome("gpu", machine(H100), tmp_path) == (0, "")


@pytest.mark.parametrize(
    ("seen", "profile"),
    [
        (CPU, "cpu"),
        (machine(), "a100"),
        (machine(A100 * 2), "a100x2"),
        (machine(H100), "gpu"),
        (machine(A100.replace("A100-SXM4-80GB", "GeForce RTX 4090").replace(" 8.0,", " 8.9,")), "rtx4090"),
        (machine(torch={"cuda": False, "devices": []}), "gpu"),
        (machine(cuda_hidden=True, torch={"cuda": False, "devices": []}), "cpu"),
    ],
)
def test_the_profile_that_fits_is_found(seen, profile):
    assert preflight.detect(seen) == profile


DEAD = {"cuda": False, "devices": []}


@pytest.mark.parametrize(
    ("profile", "seen", "code", "said"),
    [
        ("cpu", CPU | {"nvidia_traces": ["PCI 0000:01:00.0"]}, 75, "torch sees no CUDA"),
        ("cpu", machine(torch=DEAD), 75, "torch sees no CUDA"),
        ("a100", machine(torch=DEAD), 75, "torch sees no CUDA"),
        ("gpu", machine("No devices were found\n", torch=DEAD), 75, "No devices were found"),
        ("gpu", CPU, 75, "add --gpus all"),
        ("cpu", machine(), 78, "name its profile"),
        ("a100", machine(H100), 78, "one A100"),
        ("rtx4090", machine(), 78, "one RTX 4090"),
        ("a100x2", machine(), 78, "two A100"),
        ("a100x2", machine(A100 * 2, shm_mb=64), 78, "--shm-size"),
        ("a100", machine(A100.replace("580.159.04", "470.57")), 78, "525"),
        ("a100", machine(A100.replace("81559, 0", "81559, 60000")), 75, "busy"),
        ("a100", machine(A100.replace(", 0\n", ", 3\n")), 75, "uncorrected"),
        ("a100", machine(selftest={"error": "selftest.py exits 1"}), 75, "exits 1"),
        ("a100x2", machine(A100 * 2, all_reduce={"all_reduce": "rank 1: 3 of 9 sums are wrong"}), 75, "sums are wrong"),
        ("a100x2", machine(A100 * 2, all_reduce={"error": "did not answer within 300 s"}), 75, "did not answer"),
        ("a100", machine(versions={"torch": "2.4.1", "triton": "3.1.0"}), 78, "requires ==3.0.0"),
        ("a100", machine(versions={"torch": "2.4.1"}), 78, "pip install 'triton==3.0.0'"),
        ("cpu", CPU | {"python": "3.9.2"}, 78, "3.10"),
        ("cpu", CPU | {"versions": {}}, 78, "torch is not installed"),
        ("cpu", CPU | {"torch": {"error": "OSError: libfoo"}}, 78, "libfoo"),
        ("cpu", CPU | {"disk_free_mb": 10}, 75, "make room"),
        ("cpu", CPU | {"lock_drift": ["docker/lock-cpu.txt: edited by hand"]}, 78, "edited by hand"),
    ],
)
def test_an_unfit_machine_has_its_code_and_its_line(profile, seen, code, said, tmp_path):
    got, text = outcome(profile, seen, tmp_path)
    assert got == code, text
    assert said in text
    assert "\n" not in text


def test_a_device_that_computes_wrongly_is_infrastructure(tmp_path):
    report = {"devices": {"cuda:0": {"matmul": "3 of 9 products are wrong", "triton_add": ""}}, "flash_attn": ""}
    assert outcome("a100", machine(selftest=report), tmp_path)[0] == 75


def test_the_all_reduce_probe_adds_and_reports_a_rank_that_cannot():
    assert facts.probe("allreduce.py", "2", "gloo") == {"all_reduce": ""}
    assert "pigeon" in facts.probe("allreduce.py", "2", "pigeon")["all_reduce"]


def test_a_flash_attn_of_another_torch_is_named_by_its_symbol(tmp_path):
    report = {"devices": {}, "flash_attn": "ImportError: undefined symbol: _ZN3c104cuda9SetDeviceEi"}
    code, text = outcome("a100", machine(selftest=report), tmp_path)
    assert code == 78
    assert "_ZN3c104cuda9SetDeviceEi" in text


def test_a_hidden_gpu_proves_nothing_and_stops_nothing(tmp_path):
    seen = machine(cuda_hidden=True, torch=DEAD)
    findings = preflight.check(preflight.choose(BOOK, "cpu", seen), seen, tmp_path)
    assert preflight.code(findings) == 0
    assert any("nothing here proves it" in f.detail for f in findings)


def test_a_configuration_error_outranks_an_ill_machine(tmp_path):
    assert outcome("a100", machine(disk_free_mb=1, versions={}), tmp_path)[0] == 78


def test_artifacts_that_cannot_be_written_are_78(tmp_path):
    (tmp_path / "artifacts").write_text("a file where the folder should be")
    code, text = outcome("cpu", CPU, tmp_path / "artifacts")
    assert code == 78
    assert "not writable" in text


def test_what_a_need_says_is_what_the_runbook_allows():
    step = next(s for s in BOOK.steps if s.id == "m7c_ddp")
    two = machine(A100 * 2)
    assert preflight.unmet("gpus>=2", two) == ""
    for seen, profile in ((machine(H100), "gpu"), (two, "a100x2")):
        reasons = [reason for need in step.needs if (reason := preflight.unmet(need, seen))]
        assert any(pattern_matches(step, profile, reason) for reason in reasons)


def test_a_tool_that_a_step_needs_is_looked_for_on_the_path():
    step = next(s for s in BOOK.steps if s.id == "sanitizer")
    here = machine(H100)
    assert preflight.unmet("tool:bash", here) == ""
    reason = preflight.unmet("tool:no-such-tool", here)
    assert reason == "needs no-such-tool, and it is not on PATH"
    assert pattern_matches(step, "gpu", reason.replace("no-such-tool", "compute-sanitizer"))
    assert not pattern_matches(step, "a100", preflight.unmet("cuda", CPU))


def pattern_matches(step, profile, reason):
    return any(re.search(pattern, reason) for pattern in step.allowed(profile))


def test_drift_names_package_and_pin(tmp_path):
    path = tmp_path / "requirements.txt"
    path.write_text(
        "# pins\npytest==1.0.0  # old\nnot-installed-here==1.0\ntorch>=2.4\nnumpy==0.1; python_version < '3'\n"
    )
    assert [line.split(",")[1] for line in facts.drift(path)] == [" pinned ==1.0.0"]


@pytest.mark.parametrize(("name", "dirty"), [("conftest.py", True), ("pytest.ini", True), ("notes.txt", False)])
def test_a_new_file_that_changes_what_tests_do_is_an_uncommitted_change(tmp_path, name, dirty):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    assert not facts.gather(tmp_path)["dirty"]
    (tmp_path / name).write_text("")
    assert facts.gather(tmp_path)["dirty"] is dirty


def test_env_json_names_no_place_and_no_person(tmp_path):
    seen = facts.gather(tmp_path, offline=True)
    text = repr(seen)
    assert str(Path.home()) not in text
    assert str(tmp_path) not in text
    assert seen["git_sha"] == "unknown"
    assert seen["network"] is False
