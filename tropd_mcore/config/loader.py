"""Reads a YAML file and dotted overrides into one frozen `Config`, and records the source of each value.

The checks across sections are in `checks`, which this module calls. Invariants: the environment and argv are never
read. An unknown key is an error. All problems are reported together, each with its place. Relative paths in the file or
in an override are relative to the current directory, not to the file.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tropd_mcore.config.checks import CHECKS, problems_across_sections
from tropd_mcore.config.explain import explain_validation_error, of_teacher, wrong_keys
from tropd_mcore.config.partial import problems_without, without
from tropd_mcore.config.schema import Config
from tropd_mcore.config.switched import drop_other_kinds, kinds_of, take_away
from tropd_mcore.config.yaml_reader import parse_yaml
from tropd_mcore.errors import ConfigError

log = logging.getLogger(__name__)

COMMAND_LINE = "command line"
DEFAULT = "default"

RENAMED_KEYS: dict[str, str] = {"objective.own_topk": "objective.student_topk"}
"""Old dotted key -> the key to use now. An old key is an error; this table lets the message name the new key."""


def load(path: Path | str, overrides: list[str], *, tell: bool = True) -> tuple[Config, dict[str, str]]:
    """Read `path`, apply `a.b=value` overrides in order (values are YAML), validate, and check across sections.

    Returns the config and the source of each leaf key: `<file>:<line>`, `command line` or `default`. If an override
    chooses another kind of a section, the file's keys of the old kind are left out, which is logged if `tell`. If an
    override sets a section to null, the section gets its defaults back. Raises ConfigError with every problem of the
    file, the overrides and the values, and with every problem across sections that can be checked without a wrong
    value.
    """
    name = str(path)
    document = parse_yaml(_read(Path(path)), name)
    problems = list(document.problems)
    tree = document.value if isinstance(document.value, dict) else {}
    if not isinstance(document.value, dict):
        problems.append(f"{name}: expected sections such as `run:`, found {document.value!r}")
    places = {key: f"{name}:{line}" for key, line in document.lines.items()}
    kinds = kinds_of(tree)
    for override in overrides:
        problems += _apply(override, tree, places)
    left_out = drop_other_kinds(tree, kinds, places, COMMAND_LINE)
    take_away(tree, [key for key, place in places.items() if place == COMMAND_LINE])
    _fill_default_kinds(tree)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        problems += explain_validation_error(error, places, name, RENAMED_KEYS)
        rest = without(tree, wrong_keys(error))
        problems += list(problems_without(CHECKS, rest)) if rest is not None else []
        raise ConfigError(problems) from None
    problems += problems_across_sections(config)
    if problems:
        raise ConfigError(problems)
    for line in left_out if tell else ():
        log.info("%s: %s", COMMAND_LINE, line)
    return config, {key: _source(key, places) for key in leaves(config)}


def leaves(config: Config) -> dict[str, Any]:
    """Return {dotted key: value} of every leaf in the order of the schema; paths as strings, tuples as lists.

    The entries of a list of sections (phases, servers) are sections too; the key of each is its place in the list. So
    are those of `teachers`, by name.
    """
    flat: dict[str, Any] = {}

    def visit(prefix: str, values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            if isinstance(value, list) and value and all(isinstance(entry, Mapping) for entry in value):
                visit(f"{prefix}{key}.", {str(place): entry for place, entry in enumerate(value)})
            elif isinstance(value, Mapping):
                visit(f"{prefix}{key}.", value)
            else:
                flat[f"{prefix}{key}"] = value

    visit("", config.model_dump(mode="json"))
    return flat


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError([f"{path}: cannot read the configuration: {reason}"]) from error


def _apply(override: str, tree: dict[str, Any], places: dict[str, str]) -> list[str]:
    """Set one override in `tree` and return its problems."""
    dotted, equals, text = override.partition("=")
    dotted = dotted.strip()
    if not equals or not all(dotted.split(".")):
        return [f"{COMMAND_LINE}: expected section.key=value, found {override!r}"]
    document = parse_yaml(text, f"{COMMAND_LINE}: {dotted}")
    if document.problems:
        return list(document.problems)
    value = None if text.strip() == "" else document.value
    *sections, leaf = dotted.split(".")
    node: Any = tree
    for depth, section in enumerate(sections):
        name: Any = _name_in(node, section)
        if name is None:
            return [_no_entry(dotted, sections[:depth], node, section)]
        child = node[name] if isinstance(node, list) else node.get(name)
        if child is None:
            child = node[name] = {}
        if not isinstance(child, dict | list):
            return [f"{COMMAND_LINE}: {dotted}: {section} holds {child!r}, which has no keys"]
        node = child
    if (last := _name_in(node, leaf)) is None:
        return [_no_entry(dotted, sections, node, leaf)]
    node[last] = value
    for key in [key for key in places if key.startswith(f"{dotted}.")]:
        del places[key]
    places[dotted] = COMMAND_LINE
    return []


def _name_in(node: dict[str, Any] | list[Any], part: str) -> str | int | None:
    """Return the key or the place that `part` names in a section or a list; None if the list has no such place."""
    if isinstance(node, dict):
        return part
    return int(part) if part.isdecimal() and int(part) < len(node) else None


def _no_entry(dotted: str, sections: list[str], node: list[Any], part: str) -> str:
    where = ".".join(sections)
    if not any(isinstance(entry, dict) for entry in node):
        return f"{COMMAND_LINE}: {dotted}: {sections[-1]} holds {node!r}, which has no keys"
    return f"{COMMAND_LINE}: {dotted}: expected a place from 0 to {len(node) - 1} in {where}, found {part!r}"


def _fill_default_kinds(tree: dict[str, Any]) -> None:
    """Add the default `kind` to sections that give keys but no `kind`."""
    for name, field in Config.model_fields.items():
        section = tree.get(name)
        if field.discriminator == "kind" and field.default is not None and isinstance(section, dict):
            kind = getattr(field.default, "kind", None)
            if kind is not None:
                section.setdefault("kind", kind)


def _source(key: str, places: Mapping[str, str]) -> str:
    """The source of the key itself, or of the nearest section that was set as a whole on the command line.

    A key that an entry of `servers` or `teachers` does not set has the source of its template.
    """
    if key in places:
        return places[key]
    template = re.sub(r"\.servers\.\d+\.", ".server.", key)
    if template != key and f"{template.rpartition('.')[0]}s" in places:
        return _source(template, places)
    if (template := of_teacher(key)) != key and template in places:
        return places[template]
    parts = key.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if places.get(".".join(parts[:end])) == COMMAND_LINE:
            return COMMAND_LINE
    return DEFAULT
