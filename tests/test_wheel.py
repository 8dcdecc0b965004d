"""The wheel builds, installs, and its library works with torch alone."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PROBE = """
import sys

for name in ("pydantic", "yaml", "tqdm", "tensorboard", "datasets", "transformers", "junitparser", "docker", "nox",
             "pytest", "flash_attn"):
    sys.modules[name] = None  # as if it were not installed
import nsa
assert "torch" not in sys.modules, "import nsa must not import torch"
import torch
for name in nsa.__all__:
    getattr(nsa, name)
model = nsa.Transformer(nsa.ModelConfig(nsa=nsa.NSAConfig(l=4, d=2, l_sel=4, n_sel=3, w=5)))
print(model.generate(torch.zeros(1, 20, dtype=torch.long), 2).shape, nsa.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    return path


def test_wheel_holds_the_library_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "nsa/ops/selected.py" in names
    assert "nsa/tests/test_equiv_small.py" in names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"nsa"}


def test_installed_wheel_works_with_torch_alone(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    script = tmp_path / "probe.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n" + PROBE)
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "torch.Size([1, 22])" in run.stdout
    assert str(tmp_path / "site") in run.stdout
