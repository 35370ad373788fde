"""Empty modules in the place of packages that another stack imports and that the tested path does not use.

For rank processes that run another stack's code. A stub has every name; each is a class that, called as a decorator,
returns what it decorates. Invariant: a stub that the tested path did use would give nonsense, not a number.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typing_extensions

BRIDGE_STUBS = (
    "megatron.bridge.data.builders",
    "megatron.bridge.models",
    "megatron.bridge.peft",
    "datasets",
    "modelopt",
    "torch.utils.tensorboard",
)
"""what Megatron-Bridge's training loop imports and does not use here"""


class _Name(type):
    """The class of every stubbed name: attributes of it are stubs as well."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls


def _new(cls: type, *args: Any, **options: Any) -> Any:
    if len(args) == 1 and callable(args[0]) and not options:
        return args[0]
    return lambda decorated: decorated


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Name(name, (), {"__new__": _new})
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: Iterable[str]) -> None:
        self._names = tuple(names)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if any(fullname == name or fullname.startswith(f"{name}.") for name in self._names):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__path__ = []


def first_on_path(folders: list[Path], stubs: Iterable[str] = ()) -> None:
    """Let this process import from `folders` first, and the packages `stubs` as empty modules.

    A process can do this for one stack only. The stacks are written for Python 3.12: two names of its `typing` are
    taken from typing_extensions where they are older or missing.
    """
    wanted = [str(folder) for folder in folders]
    if sys.path[: len(wanted)] == wanted:
        return
    assert "megatron.core" not in sys.modules, "another megatron-core was imported already"
    sys.path[:0] = wanted
    sys.meta_path.insert(0, _Finder(stubs))
    for name in ("override", "TypedDict"):
        if sys.version_info < (3, 12):
            setattr(typing, name, getattr(typing_extensions, name))


def add_bridge(source: Path) -> None:
    """Make megatron.bridge importable from a checkout, without what its `__init__` imports: models and conversion."""
    import megatron

    if "megatron.bridge" not in sys.modules:
        package = _Module("megatron.bridge")
        package.__path__ = [str(source / "src" / "megatron" / "bridge")]
        sys.modules["megatron.bridge"] = megatron.bridge = package
