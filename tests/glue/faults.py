"""Faults that a test plants in the product, in this process and in its rank processes.

A fault replaces one text of one module's source by another. Planting compiles the changed source and swaps the code of
the existing functions. So every module that imported one of them by name runs the fault too. A text that is not in the
source exactly once is an error, and so is a text outside all functions. Files on disk do not change.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from tests.ranks import run_on_ranks

PACKAGE = "tropd_mcore"
PLANTED: list[Fault] = []
"""The faults planted in this process now, in order."""


@dataclass(frozen=True)
class Fault:
    """`right` becomes `wrong` in the module `tropd_mcore.<module>`."""

    module: str
    right: str
    wrong: str


@contextmanager
def planted(*faults: Fault) -> Iterator[None]:
    """Within the block, the product has these faults."""
    with ExitStack() as undo:
        for fault in faults:
            undo.enter_context(_one(fault))
        yield


def on_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """`run_on_ranks` with the faults of this process planted on every rank."""
    return run_on_ranks(_with_faults, world_size, tuple(PLANTED), function, args)


def _with_faults(faults: tuple[Fault, ...], function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    with planted(*faults):
        return function(*args)


@contextmanager
def _one(fault: Fault) -> Iterator[None]:
    module = importlib.import_module(f"{PACKAGE}.{fault.module}")
    assert module.__file__ is not None
    source = Path(module.__file__).read_text(encoding="utf-8")
    count = source.count(fault.right)
    assert count == 1, f"{module.__name__} has {count} times {fault.right!r}"
    right = _codes(source, module.__file__)
    wrong = _codes(source.replace(fault.right, fault.wrong), module.__file__)
    functions = _functions(module)
    changed = [name for name, code in wrong.items() if name in functions and _body(code) != _body(right[name])]
    assert changed, f"{fault.right!r} is in no function of {module.__name__}"
    saved = {name: functions[name].__code__ for name in changed}
    for name in changed:
        functions[name].__code__ = wrong[name]
    PLANTED.append(fault)
    try:
        yield
    finally:
        PLANTED.remove(fault)
        for name, code in saved.items():
            functions[name].__code__ = code


def _codes(source: str, path: str) -> dict[str, CodeType]:
    """{qualified name: code} of the functions at the top level of the source and of its classes."""
    found: dict[str, CodeType] = {}

    def walk(code: CodeType) -> None:
        for constant in code.co_consts:
            if isinstance(constant, CodeType) and "<" not in constant.co_qualname:
                found[constant.co_qualname] = constant
                walk(constant)

    walk(compile(source, path, "exec", dont_inherit=True))
    return found


def _body(code: CodeType) -> tuple[Any, ...]:
    """The content of a code object, independent of its line numbers."""
    constants = tuple(_body(each) if isinstance(each, CodeType) else (type(each), each) for each in code.co_consts)
    return code.co_code, constants, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars


def _functions(module: ModuleType) -> dict[str, FunctionType]:
    """{qualified name: function} of what is defined in the module, without its decorators."""
    found: dict[str, FunctionType] = {}

    def collect(values: dict[str, Any]) -> None:
        for value in list(values.values()):
            if isinstance(value, type) and value.__module__ == module.__name__:
                collect(dict(vars(value)))
            elif (function := _undecorated(value)) is not None and function.__code__.co_filename == module.__file__:
                found[function.__code__.co_qualname] = function

    collect(vars(module))
    return found


def _undecorated(value: Any) -> FunctionType | None:
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, functools.cached_property):
        value = value.func
    value = inspect.unwrap(getattr(value, "__func__", value)) if callable(value) else value
    return value if isinstance(value, FunctionType) else None
