"""Imported by every Python process of a job of the fault suite. It reports its position and waits on request.

The folder is on the job's PYTHONPATH. `TROPD_FAULTS` names a folder that the suite shares with the job:

    point.<rank>     position of the rank, one line, rewritten at each edge of a phase
    wanted.<rank>    JSON {"edge": ..., "nth": 1, "then": "wait" | "go on" | "raise"}, written by the suite
    reached.<rank>   written by the rank when it is there; with `wait`, it continues when `go.<rank>` appears, which it
                     removes. Of several threads at the same edge, only the first one acts

The product is not changed on disk. Further variables: `TROPD_FAULTS_HIDE` names packages that cannot be imported here,
`TROPD_FAULTS_NO_FLOCK` makes flock fail as on a file system without it.
"""

import fcntl
import functools
import importlib.abc
import importlib.machinery
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

WAIT_LIMIT_S = 360.0
"""Longest wait for the suite, which may have died."""


class Points:
    """The points of this process."""

    def __init__(self, folder: str) -> None:
        rank = os.environ.get("RANK", "x")
        self._passed = 0
        """Number of times that the wanted edge was passed."""
        self._lock = threading.Lock()
        self._point = os.open(os.path.join(folder, f"point.{rank}"), os.O_CREAT | os.O_WRONLY, 0o666)
        self._wanted, self._reached, self._go = (
            os.path.join(folder, f"{name}.{rank}") for name in ("wanted", "reached", "go")
        )

    def at(self, edge: str) -> None:
        """Report that this process is at `edge`, and do the requested action."""
        os.pwrite(self._point, f"{edge:<60}\n".encode(), 0)
        wanted = self._taken(edge)
        if wanted is None:
            return
        if wanted["then"] == "raise":
            raise RuntimeError("a fault that the suite planted")
        deadline = time.monotonic() + WAIT_LIMIT_S
        while wanted["then"] == "wait" and time.monotonic() < deadline:
            if os.path.exists(self._go):
                os.unlink(self._go)
                return
            time.sleep(0.02)

    def _taken(self, edge: str) -> dict[str, Any] | None:
        """The order to act at `edge`, if it is time for it. Nobody else gets it then."""
        with self._lock:
            try:
                with open(self._wanted, encoding="utf-8") as stream:
                    wanted: dict[str, Any] = json.load(stream)
            except (FileNotFoundError, ValueError):
                return None
            if wanted["edge"] != edge:
                return None
            self._passed += 1
            if self._passed < wanted["nth"]:
                return None
            self._passed = 0
            os.unlink(self._wanted)
            with open(self._reached, "w", encoding="utf-8") as stream:
                stream.write(edge)
            return wanted


class Wrapping(importlib.abc.MetaPathFinder):
    """Wraps functions of modules on import, so that every importer gets the wrapped ones."""

    def __init__(self, phases: dict[str, str], points: Points) -> None:
        self._points = points
        self._by_module: dict[str, list[tuple[str, str]]] = {}
        for phase, place in phases.items():
            module, _, function = place.partition(":")
            self._by_module.setdefault(module, []).append((phase, function))

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The module's own spec, with a loader that wraps afterwards. None if no function of it is wrapped."""
        if name not in self._by_module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            for phase, function in self._by_module[name]:
                self._wrap(module, phase, function)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def _wrap(self, module: ModuleType, phase: str, function: str) -> None:
        owner: Any = module
        *classes, last = function.split(".")
        for part in classes:
            owner = getattr(owner, part)
        inner: Callable[..., Any] = getattr(owner, last)
        points = self._points

        @functools.wraps(inner)
        def wrapped(*arguments: Any, **named: Any) -> Any:
            points.at(f"before {phase}")
            result = inner(*arguments, **named)
            points.at(f"after {phase}")
            return result

        setattr(owner, last, wrapped)


class Hiding(importlib.abc.MetaPathFinder):
    """Finder for packages that must look as if they were not installed."""

    def __init__(self, names: list[str]) -> None:
        self._names = names

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Refuse hidden packages."""
        if name.partition(".")[0] in self._names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


def _no_flock(*_arguments: object) -> None:
    raise OSError(38, "Function not implemented")


def _prepare(folder: str) -> None:
    if hidden := os.environ.get("TROPD_FAULTS_HIDE"):
        sys.meta_path.insert(0, Hiding(hidden.split(",")))
    if "TROPD_FAULTS_NO_FLOCK" in os.environ:
        fcntl.flock = _no_flock  # type: ignore[assignment]
    phases = Path(folder) / "phases.json"
    if "RANK" in os.environ and phases.exists():
        sys.meta_path.insert(0, Wrapping(json.loads(phases.read_text(encoding="utf-8")), Points(folder)))


if os.environ.get("TROPD_FAULTS"):
    _prepare(os.environ["TROPD_FAULTS"])
