"""The direction of imports, and how little `import hpcml` loads.

Every import statement counts, those within functions and for type checking too, and so does
`import_module("a.literal")`: a dependency is one wherever it is written.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hpcml"

# Each part imports only from rows above its own, and from itself.
LAYERS = (
    ("errors",),
    ("account", "backend", "pictures"),
    ("memory", "kernels"),
    ("rng",),
    ("autograd", "comm"),
    ("collectives",),
    ("nn",),
    ("optim",),
    ("parallel",),
    ("trace",),
    ("models", "data"),
    ("train",),
    ("bench",),
    ("cli",),
    ("__main__",),
)
ROW = {part: row for row, parts in enumerate(LAYERS) for part in parts}

# Names everything else: the package's front, which imports on first use only.
FRONT = "hpcml"

# Libraries that only these modules may import.
HOMES = {
    "mpi4py": ("hpcml.comm", "hpcml.cli.doctor.probe", "hpcml.bench.mpi_peer"),
    "numba": ("hpcml.kernels", "hpcml.backend", "hpcml.cli.doctor.probe"),
    "torch": ("hpcml.bench",),
}
# Libraries that must not be loaded by loading a module: slow, or not there on every machine.
NOT_ON_LOADING = ("mpi4py", "cupy", "cupyx", "torch")
# Except by these, which are nothing but the other side of a comparison.
PEERS = ("hpcml.bench.torch_conv", "hpcml.bench.torch_peer", "hpcml.bench.torch_pipeline")


def imports(path: Path, module: str) -> Iterator[tuple[int, str, bool]]:
    """Line, full name and whether loading the module imports it, for each import in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def walk(node: ast.AST, loading: bool) -> Iterator[tuple[int, str, bool]]:
        for child in ast.iter_child_nodes(node):
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                inside = True
            match child:
                case ast.Import(names=names):
                    yield from ((child.lineno, name.name, loading) for name in names)
                case ast.ImportFrom(module=source, names=names, level=level):
                    base = ".".join(package.split(".")[: len(package.split(".")) - level + 1])
                    source = f"{base}.{source or ''}".rstrip(".") if level else source
                    yield from ((child.lineno, f"{source}.{name.name}", loading) for name in names)
                case ast.Call(func=function, args=[ast.Constant(value=str(name)), *_]):
                    if ast.unparse(function).endswith(("import_module", "__import__")):
                        yield child.lineno, name, loading
            yield from walk(child, loading and not inside)

    yield from walk(tree, True)


def within(module: str, homes: tuple[str, ...]) -> bool:
    return any(module == home or module.startswith(f"{home}.") for home in homes)


def violations(package: Path) -> list[str]:
    """What is wrong with the imports of the package `hpcml` in this folder, a line each."""
    found = []
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if module == FRONT:
            continue
        part = module.split(".")[1]
        if part not in ROW:
            found.append(f"{module}: '{part}' is in no layer: add it to the table")
            continue
        for line, name, loading in imports(path, module):
            where = f"{module}:{line}"
            top, _, below = name.partition(".")
            if top == FRONT:
                other = below.split(".")[0]
                named = (other and not other.startswith("__")) or other == "__main__"
                if named and other != part and ROW.get(other, len(LAYERS)) >= ROW[part]:
                    found.append(f"{where}: {part} must not import {other}")
                continue
            if top in HOMES and not within(module, HOMES[top]):
                found.append(f"{where}: {top} is imported in {', '.join(HOMES[top])} only")
            if top in NOT_ON_LOADING and loading and module not in PEERS:
                found.append(f"{where}: {top} must be imported within the function that needs it")
    return found


def test_every_import_points_down():
    assert violations(PACKAGE) == []


def test_the_whole_package_is_walked():
    modules = dict.fromkeys(PACKAGE.rglob("*.py"), "hpcml.a.b")
    found = {name for path, module in modules.items() for _, name, _ in imports(path, module)}
    assert {"mpi4py.MPI", "numba", "hpcml.errors.UserError"} <= found


WRONG = {
    "autograd/tape.py": ("from hpcml.comm import Mesh", "autograd must not import comm"),
    "nn/layer.py": ("def f():\n    from hpcml import parallel", "nn must not import parallel"),
    "comm/mesh.py": ("if TYPE_CHECKING:\n    import hpcml.nn.module", "comm must not import nn"),
    "kernels/cpu/rows.py": ("from ...train import step", "kernels must not import train"),
    "rng.py": ("import importlib\nimportlib.import_module('hpcml.cli')", "rng must not import cli"),
    "train/loop.py": ("def f():\n    import mpi4py.MPI", "mpi4py is imported in hpcml.comm"),
    "models/gpt.py": (
        "def f():\n    from torch import nn",
        "torch is imported in hpcml.bench only",
    ),
    "comm/world.py": ("from mpi4py import MPI", "mpi4py must be imported within the function"),
    "backend.py": ("try:\n    import cupy\nexcept ImportError:\n    pass", "cupy must be imported"),
    "utils/misc.py": ("import os", "'utils' is in no layer"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_import_is_found(tmp_path, name):
    """The check itself, on a package with one wrong line."""
    text, complaint = WRONG[name]
    path = tmp_path / "hpcml" / name
    path.parent.mkdir(parents=True)
    path.write_text(text)
    found = violations(tmp_path / "hpcml")
    assert len(found) == 1
    assert complaint in found[0]


def test_right_imports_are_let_pass(tmp_path):
    path = tmp_path / "hpcml" / "comm" / "world.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import numpy\nfrom hpcml.errors import UserError\nfrom .axis import Axis\n"
        "def f():\n    from mpi4py import MPI\n    import cupy\n"
    )
    assert violations(tmp_path / "hpcml") == []


def loaded_after(statements: str) -> set[str]:
    """Top-level modules that a new Python has loaded after these statements."""
    code = f"{statements}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_slow():
    slow = {"numba", "llvmlite", "mpi4py", "torch", "cupy", "scipy", "rich", "safetensors"}
    loaded = loaded_after("import hpcml")
    assert "hpcml" in loaded
    assert not loaded & slow


def test_importing_every_module_loads_neither_mpi_nor_what_is_optional():
    names = []
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        if parts[-1] not in ("__init__", "__main__"):
            names.append(".".join(parts))
    loaded = loaded_after("\n".join(f"import {name}" for name in sorted({*names} - {*PEERS})))
    assert "numba" in loaded
    assert not loaded & {"mpi4py", "torch", "cupy"}
