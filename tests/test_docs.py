"""What is written runs: the code blocks of README and docs/, and the examples in docstrings."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import matplotlib
import pytest
import torch

import xformerlib as xf
from xformerlib import plot

matplotlib.use("Agg")
from matplotlib import pyplot

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(?P<indent> *)```python[^\n]*\n(?P<code>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Block(NamedTuple):
    line: int  # of the first line of code, counted from 1
    code: str


def blocks(page: Path) -> list[Block]:
    """The Python blocks of a page, those indented in a list or a tab included."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(text.count("\n", 0, match.start("code")) + 1, textwrap.dedent(match["code"]))
        for match in FENCE.finditer(text)
    ]


def run_doctest(test: doctest.DocTest) -> None:
    report: list[str] = []
    doctest.DocTestRunner(optionflags=FLAGS).run(test, out=report.append)
    assert not report, "".join(report)


def run_block(page: Path, block: Block, names: dict[str, Any]) -> None:
    """Run one block in the namespace of its page; tracebacks show the line in the page."""
    if block.code.lstrip().startswith(">>>"):
        test = doctest.DocTestParser().get_doctest(block.code, {}, page.name, str(page), block.line - 1)
        test.globs = names
        report: list[str] = []
        doctest.DocTestRunner(optionflags=FLAGS).run(test, out=report.append, clear_globs=False)
        assert not report, "".join(report)
    else:
        exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_on_the_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        try:
            run_block(page, block, names)
        except Exception as error:
            raise AssertionError(f"the block at {page.relative_to(ROOT)}:{block.line} failed: {error!r}") from error
    pyplot.close("all")


def modules() -> Iterator[ModuleType]:
    yield xf
    for info in pkgutil.walk_packages(xf.__path__, f"{xf.__name__}."):
        yield importlib.import_module(info.name)


def ambient_names() -> dict[str, Any]:
    """What an example may use without saying so: torch, xf, plot, and every public name of xf, domains, masks and positions."""
    names: dict[str, Any] = {"torch": torch, "xf": xf, "plot": plot}
    for module in (xf, *(getattr(xf, part) for part in ("domains", "masks", "positions"))):
        names |= {name: value for name, value in vars(module).items() if not name.startswith("_")}
    return names


def docstring_examples() -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    return [test for module in modules() for test in finder.find(module, module.__name__, extraglobs=ambient_names())]


@pytest.mark.parametrize("example", docstring_examples(), ids=lambda example: example.name)
def test_example_in_docstring_runs(example: doctest.DocTest) -> None:
    run_doctest(example)


def is_private(module: ModuleType) -> bool:
    return any(part.startswith("_") for part in module.__name__.split("."))


def public_names() -> list[tuple[str, Any]]:
    """Every public function and class, where it is defined and where a package's ``__init__`` gives it out."""
    return [
        (f"{module.__name__}.{name}", value)
        for module in modules()
        if not is_private(module)
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__.startswith(module.__name__)
    ]


@pytest.mark.parametrize(("name", "value"), public_names(), ids=lambda value: value if isinstance(value, str) else "")
def test_public_name_is_documented(name: str, value: Any) -> None:
    # vars, because inspect.getdoc would give the docstring of a base class; a dataclass makes one up from its signature.
    written = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    missing = not written or written.startswith(f"{value.__name__}(")
    assert not missing, f"{name} has no docstring"


def test_api_pages_show_every_public_name() -> None:
    shown = set()
    for page in (ROOT / "docs" / "api").glob("*.md"):
        for path in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            module, _, name = path.rpartition(".")
            shown.add(id(getattr(importlib.import_module(module), name)))
    # What modules share among themselves is not for users, who reach it through xformerlib itself.
    inner = tuple(f"{xf.__name__}.{part}." for part in ("kernels", "attention", "blocks"))
    assert not [name for name, value in public_names() if id(value) not in shown and not name.startswith(inner)]
