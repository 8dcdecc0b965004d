"""Who may import whom, and who reads the environment: the layering of the tree, stated over its syntax trees."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("nsa", "ci", "scripts", "bench", "tests")
FILES = [*sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py")), ROOT / "noxfile.py"]
NAMES = [str(path.relative_to(ROOT)) for path in FILES]


def tree(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(), name)


def imports(name: str, *, top_level: bool = False) -> set[str]:
    """Dotted names a file imports; `from a import b` counts as a.b. top_level leaves imports inside functions out."""
    found: set[str] = set()
    nodes = _outside_functions(tree(name)) if top_level else ast.walk(tree(name))
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
            assert node.level == 0, f"{name}: relative import"
    return found


def _outside_functions(root: ast.AST):
    for child in ast.iter_child_nodes(root):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        yield child
        yield from _outside_functions(child)


def within(name: str, *packages: str) -> set[str]:
    return {i for i in imports(name) if any(i == p or i.startswith(p + ".") for p in packages)}


def in_folder(*folders: str) -> list[str]:
    return [n for n in NAMES if any(n.startswith(folder + "/") for folder in folders)]


HARNESS = [n for n in in_folder("ci") if not n.startswith("ci/probes/")] + ["noxfile.py"]
LIBRARY = [n for n in in_folder("nsa") if not n.startswith("nsa/tests/")]


# One test a rule, not one a file: the runbook's -k expressions would select a test id that holds a module's name.


def test_the_harness_drives_the_library_from_outside():
    assert not {name: bad for name in HARNESS if (bad := within(name, "nsa", "torch", "triton", "numpy"))}


def test_nothing_imports_tests_and_nothing_but_tests_the_harness():
    for name in NAMES:
        if not name.startswith(("tests/", "nsa/tests/")):
            assert not within(name, "tests", "nsa.tests"), name
        if not name.startswith(("ci/", "tests/")):
            assert not within(name, "ci"), name


def test_kernels_know_neither_ops_nor_configuration():
    above = ("nsa.ops", "nsa.config", "nsa.attention", "nsa.model", "nsa.cache", "nsa.train")
    assert not {name: bad for name in in_folder("nsa/kernels") if (bad := within(name, *above))}


def test_ops_import_kernels_only_when_a_route_asks_for_them():
    for name in in_folder("nsa/ops"):
        eager = imports(name, top_level=True)
        assert not {i for i in eager if i.startswith(("nsa.kernels", "triton", "flash_attn"))}, name
        assert not within(name, "nsa.attention", "nsa.model", "nsa.train", "nsa.cache"), name


def test_operators_are_registered_in_one_place():
    """There autocast ends, results are made what their fakes say, and a gradient is attached."""
    found = {name for name in LIBRARY for node in ast.walk(tree(name)) if _registers(node)}
    assert found == {"nsa/ops/operator.py"}


def _registers(node: ast.AST) -> bool:
    named = ("custom_op", "Library", "register_fake", "register_autograd")
    return isinstance(node, ast.Attribute) and node.attr in named and ast.unparse(node).startswith("torch.library")


def test_layers_point_downwards():
    below = {
        "nsa/config.py": ("nsa.blocks",),
        "nsa/blocks.py": ("nsa.config",),
        "nsa/records.py": (),
        "nsa/routing.py": ("nsa.config", "nsa.kernels", "nsa.ops"),
    }
    for name, allowed in below.items():
        used = {i for i in within(name, "nsa") if not any(i == a or i.startswith(a + ".") for a in allowed)}
        assert not used, name
    for name in ("nsa/config.py", "nsa/blocks.py", "nsa/records.py"):
        assert not within(name, "torch"), name
    for name in LIBRARY:
        if not name.startswith("nsa/train/"):
            assert not within(name, "nsa.train"), name


def test_the_library_needs_torch_alone_at_import():
    optional = {"triton", "flash_attn", "transformers", "datasets", "pydantic", "yaml", "tqdm", "matplotlib", "numpy"}
    for name in LIBRARY:
        if not name.startswith(("nsa/train/", "nsa/kernels/")):  # extras of their own, imported where they are used
            assert not {i for i in imports(name, top_level=True) if i.split(".")[0] in optional}, name


def test_the_environment_is_read_in_its_few_places():
    readers = ("nsa/routing.py", "nsa/train/dist.py", "scripts/train_showcase.py", "ci/", "tests/", "nsa/tests/")
    # These set Triton's and the tokenizers' own variables for the processes that they start.
    readers += ("nsa/kernels/report.py", "nsa/train/workers.py")
    for name in (name for name in NAMES if not name.startswith(readers)):
        for node in ast.walk(tree(name)):
            used = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv")
            assert not used, f"{name}:{getattr(node, 'lineno', '?')} reads the environment; flags have one home"


def test_no_failure_is_swallowed():
    for name in NAMES:
        for node in ast.walk(tree(name)):
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type else "everything"
                broad = node.type is None or caught in ("Exception", "BaseException")
                reraised = any(isinstance(inner, ast.Raise) and inner.exc is None for inner in ast.walk(node))
                assert not broad or reraised, f"{name}:{node.lineno} catches {caught}"


def test_test_modules_import_only_what_every_lane_has():
    helpers = {path.stem for path in (ROOT / "tests").glob("*.py")}
    # tomli is tomllib before Python 3.11, where every lane installs it; pytest brings packaging.
    allowed = {*sys.stdlib_module_names, *helpers, "pytest", "packaging", "torch", "nsa", "ci", "tomli"}
    for name in in_folder("nsa/tests", "tests"):
        foreign = {i.split(".")[0] for i in imports(name, top_level=True)} - allowed
        assert not foreign, (
            f"{name}: import optional packages inside a fixture, so that a lane without them skips by test"
        )


def test_the_syntax_tests_see_what_they_forbid():
    planted = ast.parse("import torch\ndef f():\n    import triton\n")
    names = {a.name for n in _outside_functions(planted) if isinstance(n, ast.Import) for a in n.names}
    assert names == {"torch"}
