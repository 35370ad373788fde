"""Loads single files of a project that is not installed, with stand-ins for modules that they import but do not use.

It is not for installed packages. Invariants: afterwards `sys.modules` has the same entries for the project's names as
before. A stand-in cannot be called (`StandIn`), so no number can come from a replacement.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from tropd_mcore.conformance.peers import PeerMissing

_OPTION = "--peer MODULE:FUNCTION@PATH (tropd conformance) or --peer-root {}=PATH (benchmarks)"


class StandIn(ModuleType):
    """A placeholder module: each attribute is a class that can only be inherited from and subscripted."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []  # makes it a package, so that `import a.b` looks into `sys.modules`

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        full_name = f"{self.__name__}.{name}"

        def refuse(*args: object, **keywords: object) -> None:
            raise RuntimeError(f"{full_name} is a stand-in that the loaded file should not need; it was called")

        members = {"__init__": refuse, "__class_getitem__": classmethod(lambda cls, item: cls)}
        value = type(name, (), members)
        setattr(self, name, value)
        return value


@contextmanager
def in_sys_modules(modules: Mapping[str, ModuleType]) -> Iterator[None]:
    """Within the block, imports find `modules`. Afterwards the previous entries are restored."""
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module


@dataclass
class Checkout:
    """The files of one project, below `root`, each loaded once."""

    peer: str
    """name of the project, for messages"""
    root: Path
    commit: str
    """the commit for which the adapter was written"""
    _loaded: dict[str, ModuleType] = field(default_factory=dict)

    def load(self, module_name: str, *, real: tuple[str, ...] = (), absent: tuple[str, ...] = ()) -> Any:
        """Execute the file of `module_name` ("package.module" is package/module.py) and return its names.

        `real`: modules of the project that it needs, loaded before. `absent`: modules that it only imports. Raises
        PeerMissing if the file is missing, or if it imports a module that is in neither list and not installed.
        """
        if module_name in self._loaded:
            return _Names(self._loaded[module_name], self)
        path = self.root.joinpath(*module_name.split(".")).with_suffix(".py")
        if not path.is_file():
            raise PeerMissing(
                f"{self.peer}: no file {path}; expected a checkout of {self.peer} at {self.root} (the adapter was "
                f"written for commit {self.commit}); change the path in {_OPTION.format(self.peer)}"
            )
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None and spec.loader is not None, "a .py file has a loader"
        module = importlib.util.module_from_spec(spec)
        named = {name: self._loaded[name] for name in real} | {name: StandIn(name) for name in absent}
        with in_sys_modules(_with_parents({**named, module_name: module})):
            try:
                spec.loader.exec_module(module)
            except ImportError as error:
                raise PeerMissing(
                    f"{self.peer}: cannot load {path}: {error}; the adapter was written for commit {self.commit}"
                ) from error
        self._loaded[module_name] = module
        return _Names(module, self)


class _Names:
    """The names of a loaded file. A name may have been removed since the adapter was written."""

    def __init__(self, module: ModuleType, files: Checkout) -> None:
        self._module, self._files = module, files

    def __getattr__(self, name: str) -> Any:
        try:
            return getattr(self._module, name)
        except AttributeError as error:
            files = self._files
            raise PeerMissing(
                f"{files.peer}: expected {name} in {self._module.__file__}, found none; the adapter was written for "
                f"commit {files.commit}"
            ) from error


_CHECKOUTS: dict[tuple[str, Path], Checkout] = {}


def checkout(peer: str, root: Path | None, commit: str) -> Checkout:
    """Return the checkout at `root`, the same object each time. Raises PeerMissing if no path was given."""
    if root is None:
        raise PeerMissing(
            f"{peer}: expected the path of a checkout (the adapter was written for commit {commit}), found none; "
            f"give it as {_OPTION.format(peer)}"
        )
    return _CHECKOUTS.setdefault((peer, root), Checkout(peer, root, commit))


def _with_parents(modules: dict[str, ModuleType]) -> dict[str, ModuleType]:
    """The modules, and stand-ins for their parent packages, each set as an attribute of its parent."""
    complete: dict[str, ModuleType] = {}
    for name in modules:
        parts = name.split(".")
        for length in range(1, len(parts)):
            parent = ".".join(parts[:length])
            complete.setdefault(parent, modules.get(parent) or StandIn(parent))
    complete.update(modules)
    for name, module in complete.items():
        parent, _, child = name.rpartition(".")
        if isinstance(complete.get(parent), StandIn):
            setattr(complete[parent], child, module)
    return complete
