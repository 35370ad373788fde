"""All faults that can be planted in a file, in the order of the file, and the draw among those of the packages.

Some code gets no faults, because no test should have to detect them: annotations, docstrings, decorators, log calls,
messages of `raise` and `assert`, f-strings (most are messages, and their positions are not exact before Python 3.12),
`__all__`, and code under `if TYPE_CHECKING`. Invariant: the draw depends only on the sources, the seed and the rules.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator
from pathlib import Path

from tests.mutation.faults import Fault, Source
from tests.mutation.operators import RULES

PACKAGES = ("data", "records", "mcore", "train", "rollout", "teacher", "serving", "monitor", "weights")
"""Folders of `tropd_mcore` that faults are planted in."""
LOGGERS = ("log", "logger", "logging", "warnings")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def draw(root: Path, *, seed: int, count: int) -> list[Fault]:
    """The first `count` of all candidates in an order determined by the seed. A larger count only adds faults."""
    candidates = all_candidates(root)
    random.Random(seed).shuffle(candidates)
    return candidates[:count]


def all_candidates(root: Path) -> list[Fault]:
    """The candidates of all packages below the repository `root`, by file and position."""
    return [fault for package in PACKAGES for path in files_of(root, package) for fault in _read(root, path)]


def files_of(root: Path, package: str) -> list[Path]:
    return sorted((root / "tropd_mcore" / package).rglob("*.py"))


def _read(root: Path, path: Path) -> list[Fault]:
    return candidates(path.relative_to(root).as_posix(), path.read_bytes())


def candidates(file: str, content: bytes) -> list[Fault]:
    """Every fault of one file, by position."""
    source = Source(file, content)
    found = {(fault.start, fault.before, fault.after): fault for fault in _visit(source, source.tree, _Where())}
    return sorted(found.values(), key=lambda fault: (fault.start, fault.operator, fault.before, fault.after))


class _Where:
    """The lines that have to run for a fault at this place to have an effect."""

    def __init__(self, lines: tuple[int, int] = (1, 1), function: Function | None = None) -> None:
        self.lines = lines
        self.function = function

    def at(self, node: ast.AST) -> _Where:
        """The place one level further down."""
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return _Where(_body(node), node)
        if isinstance(node, ast.stmt):
            return _Where(_header(node), self.function)
        return self


def _body(function: Function) -> tuple[int, int]:
    """The lines of a function below its docstring. A default or decorated name has an effect once one of them runs."""
    first = function.body[1] if len(function.body) > 1 and ast.get_docstring(function) is not None else function.body[0]
    assert function.end_lineno is not None
    return first.lineno, function.end_lineno


def _header(statement: ast.stmt) -> tuple[int, int]:
    """The lines of a statement without the statements inside it."""
    body = getattr(statement, "body", None)
    last = body[0].lineno - 1 if body else statement.end_lineno
    assert last is not None
    return statement.lineno, max(statement.lineno, last)


def _visit(source: Source, node: ast.AST, where: _Where) -> Iterator[Fault]:
    where = where.at(node)
    for rule in () if _is_for_readers(node) else RULES:
        for operator, start, end, after in rule(source, node):
            line, column = source.place(start)
            yield Fault(
                file=source.file,
                line=line,
                column=column,
                operator=operator,
                start=start,
                before=source.text(start, end),
                after=after,
                runs=where.lines,
                at_import=where.function is None,
            )
    for child in _children(node):
        yield from _visit(source, child, where)


def _children(node: ast.AST) -> Iterator[ast.AST]:
    """The parts of a node in which faults are planted."""
    if isinstance(node, ast.Expr) and (isinstance(node.value, ast.Constant) or is_log_call(node.value)):
        return
    if isinstance(node, ast.Raise | ast.JoinedStr) or _defines_exports(node):
        return
    for name, value in ast.iter_fields(node):
        if _left_alone(node, name):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not (isinstance(child, ast.Expr) and is_log_call(child.value)):
                yield child


def _left_alone(node: ast.AST, field: str) -> bool:
    """Parts without faults: annotations, decorators, base classes, assert messages, texts for a reader or a shell."""
    if field in ("annotation", "returns", "decorator_list", "bases", "type_params"):
        return True
    if isinstance(node, ast.Assert):
        return field == "msg"
    return _is_for_readers(node) and field in ("test", "body")


def _is_for_readers(node: ast.AST) -> bool:
    """`if TYPE_CHECKING` and `if __name__ == "__main__"`."""
    return isinstance(node, ast.If) and any(
        isinstance(part, ast.Name) and part.id in ("TYPE_CHECKING", "__name__") for part in ast.walk(node.test)
    )


def _defines_exports(node: ast.AST) -> bool:
    targets = node.targets if isinstance(node, ast.Assign) else []
    return any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets)


def is_log_call(node: ast.expr) -> bool:
    """`log.info(...)` and similar calls."""
    function = node.func if isinstance(node, ast.Call) else None
    return isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id in LOGGERS
