"""Checks a configuration that has some wrong values: every check runs that does not need them.

This module does not decide which values are wrong (`schema`). Invariant: a value that is wrong, or that an unknown key
may mean, is removed. Reading it raises AttributeError, so no check judges a value that nobody gave.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticUndefined

from tropd_mcore.config.schema import Config

Check = Callable[[Config], Iterable[str]]
Wrong = set[tuple[str, ...]]
"""Keys as tuples of their parts. A deeper key is given as section and field only."""


def without(tree: dict[str, Any], wrong: Wrong) -> Config | None:
    """Return the configuration of `tree` without the fields of `wrong`; None if the rest is wrong too."""
    pruned = copy.deepcopy(tree)
    absent: Wrong = set()
    for parts in wrong:
        section = pruned.get(parts[0])
        if len(parts) == 1 or not isinstance(section, dict):
            pruned.pop(parts[0], None)
            absent.add(parts[:1])
        else:
            section.pop(parts[1], None)
            absent.add(parts[:2])
    for name, field in Config.model_fields.items():
        if field.is_required() and not isinstance(pruned.get(name), dict):
            pruned[name] = {}
            absent.add((name,))
        if isinstance(pruned.get(name), dict):
            absent |= _fill_required(name, field.annotation, pruned[name])
    try:
        config = Config.model_validate(pruned)
    except ValidationError:
        return None
    _take_away(config, absent)
    return config


def _fill_required(name: str, kind: Any, section: dict[str, Any]) -> Wrong:
    """Give each missing required field a dummy value (all required fields are paths) and return these fields."""
    fields = getattr(kind, "model_fields", {})
    missing = {key for key, field in fields.items() if field.default is PydanticUndefined and field.is_required()}
    missing -= section.keys()
    section.update(dict.fromkeys(missing, "unknown"))
    return {(name, key) for key in missing}


def _take_away(config: Config, absent: Wrong) -> None:
    """Remove values from a frozen configuration. Sections are copied first, because defaults are shared."""
    values = config.__dict__
    absent = {parts if isinstance(values.get(parts[0]), BaseModel) else parts[:1] for parts in absent}
    for parts in absent:
        if len(parts) == 2 and parts[0] in values:
            section = values[parts[0]].model_copy()
            section.__dict__.pop(parts[1], None)
            values[parts[0]] = section
    for parts in absent:
        if len(parts) == 1:
            values.pop(parts[0], None)


def problems_without(checks: Iterable[Check], config: Config) -> Iterator[str]:
    """Yield the problems that `checks` find in a configuration with missing values. Each check runs as far as it
    can."""
    for check in checks:
        try:
            yield from check(config)
        except AttributeError:
            continue  # it needs a value that is wrong
