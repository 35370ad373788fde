"""All faults of the suite, in the order of the table. Invariant: ids are unique, and every group has a row in CI."""

from __future__ import annotations

import importlib
from pathlib import Path

from tests.faults.verdict import Fault

MODULES = sorted(path.stem for path in Path(__file__).parent.glob("rows_*.py"))
FLEET_MODULES = sorted(path.stem for path in Path(__file__).parent.glob("fleet_*.py"))


def all_faults() -> list[Fault]:
    """Every row but those of `fleet_faults`. Raises ValueError if two have the same id."""
    return _of(MODULES)


def fleet_faults() -> list[Fault]:
    """The rows of several rollout servers. Their ids begin with `fleet`."""
    return _of(FLEET_MODULES)


def _of(modules: list[str]) -> list[Fault]:
    found = [fault for name in modules for fault in importlib.import_module(f"tests.faults.{name}").FAULTS]
    ids = [fault.id for fault in found]
    if len(ids) != len(set(ids)):
        raise ValueError(f"one id twice: {sorted(name for name in ids if ids.count(name) > 1)}")
    return found


def chosen(names: list[str], *, representative: bool = False) -> list[Fault]:
    """The faults with these ids, or whose id starts with one of them. Without names `all_faults`. Raises KeyError."""
    faults = [*all_faults(), *fleet_faults()] if names else all_faults()
    for name in names:
        if not any(fault.id.startswith(name) for fault in faults):
            raise KeyError(f"no fault is called {name!r}; see --list")
    faults = [fault for fault in faults if not names or any(fault.id.startswith(name) for name in names)]
    return [fault for fault in faults if fault.representative] if representative else faults
