"""A test may replace a public name of mlx_qwen35 where that is defined, and no other.

`guard` makes monkeypatch and unittest.mock refuse the others; `assigned` finds what a test file sets without them.
"""

import ast
import contextlib
import functools
import importlib
import inspect
import os
import pkgutil
import symtable
import sys
import textwrap
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import pytest

PACKAGE = "mlx_qwen35"
UNGUARDED = ("tests/dispatches/",)  # launches are counted inside the model


def objection(target: object, name: str) -> str | None:
    """Why attribute `name` of `target` (a module, class, function or object) may not be replaced; None where it may."""
    owner = target if isinstance(target, ModuleType) or hasattr(target, "__qualname__") else type(target)
    path = owner.__name__ if isinstance(owner, ModuleType) else f"{owner.__module__}.{owner.__qualname__}"
    if path.split(".")[0] != PACKAGE:
        return None
    if any(part.startswith("_") and not part.startswith("__") for part in (*path.split("."), name)):
        return f"{path}.{name} is private: assert what it brings about"
    if isinstance(owner, ModuleType) and name not in _defined(owner):
        return f"{path} does not define {name}: replace it where it is defined"
    return None


@functools.cache
def _defined(module: ModuleType) -> frozenset[str]:
    """The names that the module's own text binds, other than by an import."""
    symbols = symtable.symtable(inspect.getsource(module), module.__name__, "exec").get_symbols()
    return frozenset(symbol.get_name() for symbol in symbols if symbol.is_assigned() and not symbol.is_imported())


# --- patches of monkeypatch and unittest.mock -------------------------------------------------------------------------


class PatchRefused(AssertionError):
    """A test replaces what it may not."""


def guard() -> None:
    """From now on monkeypatch and unittest.mock.patch raise PatchRefused where there is an objection."""
    for way in ("setattr", "delattr", "setitem", "delitem"):
        _check_first(pytest.MonkeyPatch, way, lambda patch, target, *rest, **_: _check(target, *rest[:1]))
    _check_first(mock.patch, "object", lambda target, name, *_, **__: _check(target, name))
    _check_first(mock.patch, "multiple", lambda target, **names: _check(target, *names))
    _check_first(mock, "patch", lambda target, *_, **__: _check(target))


def _check_first(owner: Any, way: str, check: Any) -> None:
    plain = getattr(owner, way)

    @functools.wraps(plain)
    def checked(*given: Any, **named: Any) -> Any:
        __tracebackhide__ = True
        check(*given, **named)
        return plain(*given, **named)

    setattr(owner, way, checked)


def _check(target: object, *names: object) -> None:
    __tracebackhide__ = True
    if any(name in os.environ.get("PYTEST_CURRENT_TEST", "") for name in UNGUARDED):
        return
    if isinstance(target, str) and not (names and isinstance(names[0], str)):  # a dotted path, the name included
        path, _, name = target.rpartition(".")
        target, names = pkgutil.resolve_name(path), (name,)
    elif type(target) is dict and "__spec__" in target:  # the names of a module
        target = sys.modules[target["__name__"]]
    for name in names:
        if isinstance(name, str) and (reason := objection(target, name)):
            raise PatchRefused(reason)


# --- attributes that a file sets itself -------------------------------------------------------------------------------


def assigned(source: str) -> Iterator[tuple[int, str]]:
    """The line and the objection for each attribute that the text of a test file sets and may not.

    Seen are assignments, del and setattr on what the file imports, also in the programs that it holds as strings.
    """
    tree = ast.parse(source)
    imported = dict(_imported(tree))
    for node in _nodes(tree):
        for target, name in _set(node):
            owner = _value(target, imported)
            if owner is not None and (reason := objection(owner, name)):
                yield node.lineno, reason
        for program in _programs(node):
            yield from ((node.lineno + line - 1, reason) for line, reason in assigned(program))


def _nodes(node: ast.AST) -> Iterator[ast.AST]:
    """The node and all below it, but not the parts of an f-string."""
    yield node
    if not isinstance(node, ast.JoinedStr):
        for child in ast.iter_child_nodes(node):
            yield from _nodes(child)


def _imported(tree: ast.AST) -> Iterator[tuple[str, object]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(f"{PACKAGE}."):
            for alias in node.names:
                yield alias.asname or alias.name, _found(f"{node.module}:{alias.name}", f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if f"{alias.name}.".startswith(f"{PACKAGE}."):
                    module = importlib.import_module(alias.name)
                    yield (alias.asname, module) if alias.asname else (PACKAGE, sys.modules[PACKAGE])


def _found(name: str, module: str) -> object:
    """The attribute of a module, or the module in a package."""
    try:
        return pkgutil.resolve_name(name)
    except AttributeError:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if f"{error.name}.".startswith(f"{PACKAGE}."):
            raise
        return None  # of a package that is not installed here: the tests that need it are skipped


def _set(node: ast.AST) -> Iterator[tuple[ast.expr, str]]:
    """The expression and the name of each attribute that a statement sets or deletes."""
    if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
        yield node.value, node.attr
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("setattr", "delattr"):
        name = node.args[1]
        if isinstance(name, ast.Constant):
            yield node.args[0], name.value


def _value(expression: ast.expr, imported: dict[str, object]) -> object | None:
    if isinstance(expression, ast.Name):
        return imported.get(expression.id)
    if isinstance(expression, ast.Attribute):
        return getattr(_value(expression.value, imported), expression.attr, None)
    return None


def _programs(node: ast.AST) -> Iterator[str]:
    """The string, where it is a program that imports the package."""
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else "None" for part in node.values]
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        parts = [node.value]
    else:
        return
    program = textwrap.dedent("".join(parts))
    if "\n" in program and "import" in program and PACKAGE in program:
        with contextlib.suppress(SyntaxError):
            ast.parse(program)
            yield program
