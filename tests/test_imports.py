"""The shape of the package: imports point one way, one sub-package imports CuPy, the public list is true."""

import ast
import subprocess
import sys
from pathlib import Path

import cupyep

PACKAGE = Path(cupyep.__file__).parent
# A module may import those before it, and its own sub-package.
ORDER = [
    "_version",
    "errors",
    "showing",
    "files",
    "backend",
    "parallel",
    "batch",
    "ops",
    "activations",
    "losses",
    "weights",
    "layers",
    "graph",
    "persistence",
    "data",
    "heads",
    "program",
    "settling",
    "optim",
    "memory",
    "state",
    "energy",
    "phases",
    "structure",
    "signals",
    "network",
    "learning",
    "initialization",
    "diagnostics",
    "models",
    "plugins",
    "export",
    "training",
    "commands",
    "plots",
    "recipes",
    "experiments",
    "cli",
    "__main__",
]


def sources():
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def part_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "cupyep":
                yield from (f"cupyep.{alias.name}" for alias in node.names)
            else:
                yield node.module


def test_imports_only_point_up_the_list():
    seen = set()
    for path in sources():
        part = part_of(path)
        assert part in ORDER, f"{path} has no place in the import order"
        for name in imported(ast.parse(path.read_text())):
            if not name.startswith("cupyep."):
                continue
            other = name.split(".")[1]
            seen.add((part, other))
            assert other == part or ORDER.index(other) < ORDER.index(part), f"{path} imports {name}"
    assert ("network", "phases") in seen, "the walk found no imports: it would pass on anything"


def test_only_the_backend_imports_cupy():
    importers = {
        part_of(path)
        for path in sources()
        for name in imported(ast.parse(path.read_text()))
        if name.split(".")[0] == "cupy"
    }
    assert importers == {"backend"}


def test_only_parallel_imports_mpi():
    importers = {
        part_of(path)
        for path in sources()
        for name in imported(ast.parse(path.read_text()))
        if name.split(".")[0] == "mpi4py"
    }
    assert importers == {"parallel"}


def test_public_list_is_exactly_what_the_package_imports():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    names = {a.asname or a.name for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert names == set(cupyep.__all__)
    assert len(cupyep.__all__) == len(set(cupyep.__all__))


def test_import_loads_no_optional_package():
    code = (
        "import sys, cupyep; "
        "optional = ('cupy', 'torch', 'sklearn', 'matplotlib', 'onnx', 'onnxruntime', 'PIL', 'pooch', "
        "'tensorboardX', 'mpi4py'); "
        "print([m for m in optional if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
