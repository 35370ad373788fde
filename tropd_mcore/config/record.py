"""Reads the resolved configuration of an earlier launch and compares it with that of this launch, by dotted key.

This module does not decide whether a change is allowed (`train.resume_rules`). Invariants: a key that the earlier
launch did not know counts as its default, so a run directory of an older version shows no changes. Another source of
the same value is no change.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from pydantic import ValidationError

from tropd_mcore.config.explain import explain_validation_error, unknown_keys
from tropd_mcore.config.loader import RENAMED_KEYS, leaves
from tropd_mcore.config.schema import Config
from tropd_mcore.config.yaml_reader import parse_yaml
from tropd_mcore.errors import ConfigError


class Nothing(Enum):
    """The value of a key that a configuration lacks, because the key belongs to another variant or an absent
    section."""

    NOTHING = "none"


NOTHING = Nothing.NOTHING
LONGEST_VALUE = 120
"""Number of characters of a value that are shown."""


@dataclass(frozen=True)
class Recorded:
    """The contents of a resolved file."""

    values: Mapping[str, Any]
    """{dotted key: value}, defaults filled in"""
    unknown: tuple[str, ...] = ()
    """Keys of the file that this version does not have"""
    config: Config | None = field(default=None, compare=False)
    """The configuration, without those keys"""


@dataclass(frozen=True)
class Change:
    """One key whose value differs from the recorded one. `NOTHING` stands for an absent key."""

    key: str
    old: Any = field(default=NOTHING)
    new: Any = field(default=NOTHING)

    def __str__(self) -> str:
        return f"{self.key}: {show(self.old)} -> {show(self.new)}"


def read_record(text: str, name: str) -> Recorded:
    """Read a file that `plan.resolved_yaml` wrote. `name` is the file in messages.

    Raises ConfigError, one line, if the file is damaged or holds a configuration that no launch can have had.
    """
    document = parse_yaml(text, name)
    problems = list(document.problems)
    tree = document.value
    if not problems and (not isinstance(tree, dict) or not tree):
        found_there = repr(tree) if tree else "nothing"
        problems = [f"{name}: expected the sections of a configuration, found {found_there}"]
    unknown: list[str] = []
    if not problems:
        try:
            config = Config.model_validate(tree)
            return Recorded(leaves(config), config=config)
        except ValidationError as error:
            unknown = unknown_keys(error)
            problems = explain_validation_error(error, {}, name, RENAMED_KEYS)
    if unknown and len(unknown) == len(problems):
        for key in unknown:
            value = _remove(tree, key)
            if key in RENAMED_KEYS:
                _put(tree, RENAMED_KEYS[key], value)
        found = read_record(json.dumps(tree), name)
        unknown = [key for key in unknown if key not in RENAMED_KEYS]
        return replace(found, unknown=(*unknown, *found.unknown))
    raise ConfigError(
        [
            f"{problems[0]} (the record of the launch before is damaged or was edited: restore it, or remove it, and "
            "this launch is taken as the first, compared with none)"
        ]
    )


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """Return the keys whose values differ, in the order of `after`, then those that only `before` has.

    If a section has another `kind`, the change of the kind stands for all keys that only one of the two kinds has. If
    only one of the two has a teacher, the change of its path stands for all of its keys.
    """
    found = []
    for key in [*after, *(key for key in before if key not in after)]:
        old, new = before.get(key, NOTHING), after.get(key, NOTHING)
        # Compared as text: Python says False == 0, but a chat template tells them apart.
        if repr(old) != repr(new) and not _is_told_elsewhere(key, old, new, before, after):
            found.append(Change(key, old, new))
    return found


def show(value: Any) -> str:
    """A value on one line. Words are shown as they are, an absent value as `none`."""
    if value is NOTHING or value is None:
        return "none"
    text = value if isinstance(value, str) and value and value.isprintable() else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def _is_told_elsewhere(key: str, old: Any, new: Any, before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    teacher = re.match(r"teachers\.[^.]+\.", key)
    if teacher is not None and (f"{teacher[0]}path" in before) != (f"{teacher[0]}path" in after):
        return key != f"{teacher[0]}path"
    kind = _kind_of(key, before) or _kind_of(key, after) or ""
    if key != kind and NOTHING in (old, new) and kind in before and before[kind] != after.get(kind, NOTHING):
        return True
    # An absent optional section is a single key without a value.
    absent, others = (new, after) if old is None else (old, before)
    return None in (old, new) and absent is NOTHING and any(other.startswith(f"{key}.") for other in others)


def _kind_of(key: str, values: Mapping[str, Any]) -> str | None:
    """Return the key of the kind of the innermost section around `key` that has kinds."""
    parts = key.split(".")
    kinds = (f"{'.'.join(parts[:end])}.kind" for end in range(len(parts) - 1, 0, -1))
    return next((kind for kind in kinds if kind in values), None)


def _remove(tree: dict[str, Any], dotted: str) -> Any:
    """Remove a key and return its value."""
    *sections, leaf = dotted.split(".")
    return _inside(tree, sections).pop(leaf)


def _put(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, leaf = dotted.split(".")
    _inside(tree, sections)[leaf] = value


def _inside(tree: Any, sections: list[str]) -> Any:
    """Return the section with these keys; in a list, the key is the place of an entry."""
    for section in sections:
        tree = tree[int(section)] if isinstance(tree, list) else tree[section]
    return tree
