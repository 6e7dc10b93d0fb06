"""Checks the annotations of xformerlib at run time, tensor shapes included, while the tests run.

An import hook puts ``checked`` on every annotated function, method and dataclass of the package. Two things differ from
jaxtyping's own hook: code that ``torch.compile`` traces is left alone, and bad input meets the library's own error first
(the one that users see); the annotation speaks only where the library let the input pass.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import sys
import types
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from typing import Any

import torch
from beartype import BeartypeConf, beartype
from jaxtyping import TypeCheckError, jaxtyped

PACKAGE = "xformerlib"
# Other decorators (Triton's, torch.library's) read the function's source or signature, and need it as it was written.
TRANSPARENT = {"abstractmethod", "cached_property", "classmethod", "property", "setter", "staticmethod"}

# An int is welcome where a float is asked for, as it is to a static checker.
typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(target: Any) -> Any:
    """``target``, a function or a class, with its annotations enforced."""
    if inspect.isclass(target):
        if dataclasses.is_dataclass(target) and "__init__" in vars(target):
            target.__init__ = checked(target.__init__)  # type: ignore[misc]
        return target
    typed = jaxtyped(target, typechecker=typechecker)
    refused = f"checking the parameters of {target.__module__}.{target.__qualname__}."

    @functools.wraps(target)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # where sizes are symbols, or tensors
            return target(*args, **kwargs)
        try:
            return typed(*args, **kwargs)
        except TypeCheckError as error:
            if refused in str(error):
                _raise_own_error(lambda: target(*args, **kwargs))
            raise

    return wrapper


def _raise_own_error(call: Callable[[], Any]) -> None:
    try:
        call()
    except (TypeError, ValueError):
        raise
    except Exception:  # not a refusal: the annotation's message is the better one
        return


class _Decorate(ast.NodeTransformer):
    """Puts ``@checked`` on functions and classes, but not on functions inside functions."""

    def visit_Module(self, node: ast.Module) -> ast.Module:
        first = next((i for i, child in enumerate(node.body) if not _is_head(child)), len(node.body))
        node.body.insert(first, ast.ImportFrom(__name__, [ast.alias("checked", "__checked__")], 0))
        self.generic_visit(node)
        return ast.fix_missing_locations(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        # Right around the constructor that ``dataclass`` makes, so that decorators of the library speak first.
        made = (i for i, one in enumerate(node.decorator_list) if _name(getattr(one, "func", one)) == "dataclass")
        node.decorator_list.insert(next(made, 0), ast.Name("__checked__", ast.Load()))
        self.generic_visit(node)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        annotated = node.returns is not None or any(argument.annotation is not None for argument in arguments)
        if annotated and all(_name(decorator) in TRANSPARENT for decorator in node.decorator_list):
            node.decorator_list.append(ast.Name("__checked__", ast.Load()))
        return node


def _is_head(node: ast.stmt) -> bool:
    docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return docstring or (isinstance(node, ast.ImportFrom) and node.module == "__future__")


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> types.CodeType:
        path = self.get_filename(fullname)  # no cache: a cached file would hold the code without the checks
        return compile(_Decorate().visit(ast.parse(self.get_data(path), path)), path, "exec", dont_inherit=True)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != PACKAGE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def install() -> None:
    """Check the package from its first import on."""
    if PACKAGE in sys.modules:
        raise RuntimeError(f"{PACKAGE} was imported before its type checks were installed")
    sys.meta_path.insert(0, _Finder())
