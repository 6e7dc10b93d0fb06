"""Who imports whom inside the package, and what importing the package costs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "xformerlib"

# Each layer may import the layers above it in this list; the parts of one layer do not import each other.
LAYERS = [
    {"_names", "_arguments"},
    {"_config"},
    {"_recorded"},
    {"_autograd", "_projection"},
    {"domains"},
    {"masks", "positions", "_dropout"},
    {"kernels", "_cache", "_inputs", "_sublayers"},
    {"_planned", "_options"},
    {"_compiled"},
    {"_portable"},
    {"attention", "_along_edges"},
    {"blocks", "_explain", "_pooling"},
    {"time_series", "vision", "graph"},
]
LEVEL = {part: level for level, layer in enumerate(LAYERS) for part in layer}
FRONT_ENDS = LAYERS[-1]
LEAVES = {"interop", "plot"}  # may import everything, and are imported by nobody
REQUIRED = {"torch", "einops", "jaxtyping"}
TRITON = {"_triton_kernels.py"}  # imported only where a kernel runs on CUDA, and there torch has brought Triton along

FILES = sorted(path for path in PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """The part of the package that a file belongs to; "" for the package's own ``__init__``."""
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if name == "__init__" else name


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(path: Path) -> Iterator[tuple[int, str, bool]]:
    """Line, absolute dotted name, and whether it runs when the file is imported, of each import that ever runs."""
    package = path.relative_to(ROOT).parts[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unused = {id(node) for test in ast.walk(tree) if is_type_checking(test) for node in ast.walk(test)}
    inside = {id(node) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.Lambda) for node in ast.walk(f)}
    for node in ast.walk(tree):
        if id(node) in unused:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, id(node) not in inside
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}", id(node) not in inside


def test_every_part_has_its_place() -> None:
    parts = {part_of(path) for path in FILES} - {""}
    assert parts <= LEVEL.keys() | LEAVES


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_parts_import_only_what_is_below_them(path: Path) -> None:
    part = part_of(path)
    for line, name, _ in imports(path):
        root, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if root != PACKAGE.name or target == part:
            continue
        where = f"{path.relative_to(ROOT)}:{line} imports {name}"
        assert target not in LEAVES, f"{where}, which nobody may import"
        if part not in LEAVES and part != "":
            assert target in LEVEL, f"{where}: import it from the module that defines it"
            assert LEVEL[target] < LEVEL[part], f"{where}, which is not below {part}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_core_imports_only_what_it_requires(path: Path) -> None:
    part = part_of(path)
    if part in LEAVES:
        return
    for line, name, when_imported in imports(path):
        root = name.partition(".")[0]
        if part in FRONT_ENDS and not when_imported:
            continue  # a front end may ask for its extra where it is used
        if root == "triton" and path.name in TRITON:
            continue
        allowed = root in REQUIRED or root in sys.stdlib_module_names or root in (PACKAGE.name, "__future__")
        assert allowed, f"{path.relative_to(ROOT)}:{line} imports {name}"


MODULES = """
import json, sys
import torch, einops, jaxtyping
before = set(sys.modules)
__import__(sys.argv[1])
print(json.dumps(sorted(set(sys.modules) - before)))
"""
COMPILER = {"torch._dynamo", "torch._inductor", "sympy"}  # the parts of torch that are slow to load


@pytest.mark.parametrize("name", ["xformerlib", "xformerlib.vision", "xformerlib.graph", "xformerlib.time_series"])
def test_importing_the_package_costs_little_beyond_torch(name: str) -> None:
    command = [sys.executable, "-c", MODULES, name]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    new = set(json.loads(run.stdout))
    others = {module for module in new if module.partition(".")[0] != PACKAGE.name}
    # The extras would show here as new packages (matplotlib, timm, ...).
    assert {module.partition(".")[0] for module in others} <= {"torch", *sys.stdlib_module_names}
    assert not new & COMPILER
    assert len(others) < 20 and len(new) < 150  # torch alone brings more than a thousand
