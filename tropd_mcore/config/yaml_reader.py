"""Parses YAML text into plain values, with the line of every key.

The meaning of the values is the `loader`'s task. Invariants: nothing is executed (safe loader). A key given twice is a
problem; the last one never wins silently. Words and numbers are read as in YAML 1.2, so `off` is a word and `5e-6` is a
number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Safe loader with the scalar rules of the YAML 1.2 core schema."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (the base class's contract)


_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        None,
    ),
    ("merge", r"<<", ["<"]),
)
for _tag, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first or list("-+.0123456789")
    )


@dataclass(frozen=True)
class Document:
    """A parsed document: its value, the line (from 1) of each dotted key, and its problems."""

    value: Any
    lines: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def parse_yaml(text: str, name: str) -> Document:
    """Parse one YAML document, called `name` in messages. Syntax errors and duplicate keys become problems."""
    try:
        loader = _Loader(text)  # refuses control characters
    except yaml.reader.ReaderError as error:
        return Document(
            {}, problems=[f"{name}: not valid YAML: character {error.position + 1} is {error.character:#x}"]
        )
    try:
        node = loader.get_single_node()
        if node is None:
            return Document({})
        lines: dict[str, int] = {}
        problems: list[str] = []
        _visit(node, "", name, lines, problems)
        return Document(loader.construct_document(node), lines, problems)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        return Document({}, problems=[f"{name}:{line}: not valid YAML: {error.problem or error.context}"])
    except yaml.YAMLError as error:
        return Document({}, problems=[f"{name}: not valid YAML: {error}"])
    finally:
        loader.dispose()


def _visit(node: yaml.Node, prefix: str, name: str, lines: dict[str, int], problems: list[str]) -> None:
    """Record the line of each key. A key given again is a problem; its first value is kept for the other checks.

    The entries of a list have their places, from 0, as keys.
    """
    if isinstance(node, yaml.SequenceNode):
        for place, entry in enumerate(node.value):
            if isinstance(entry, yaml.MappingNode):
                lines[f"{prefix}{place}"] = entry.start_mark.line + 1
                _visit(entry, f"{prefix}{place}.", name, lines, problems)
        return
    if not isinstance(node, yaml.MappingNode):
        return
    kept = []
    for key, value in node.value:
        dotted = f"{prefix}{key.value}"
        line = key.start_mark.line + 1
        if dotted in lines:
            problems.append(f"{name}:{line}: {dotted}: given twice, first in line {lines[dotted]}; keep one")
        else:
            lines[dotted] = line
            kept.append((key, value))
            _visit(value, f"{dotted}.", name, lines, problems)
    node.value = kept
