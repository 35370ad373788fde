"""Every key of the configuration with the values that it accepts, its default and its meaning, as text.

This module does not show the values of a run (`plan.resolved_yaml`). Invariant: everything is read from the schema, so
it cannot differ from what the loader accepts.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tropd_mcore.config.explain import LISTED_ELSEWHERE, meant, of_template
from tropd_mcore.config.loader import RENAMED_KEYS
from tropd_mcore.config.phases import without_phase
from tropd_mcore.config.schema import Config
from tropd_mcore.errors import ConfigError

Schema = Mapping[str, Any]
WIDTH = 100
_BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
_NO_DEFAULT = object()


@dataclass(frozen=True)
class Key:
    """One key, in the form that it has in some kinds of its section."""

    dotted: str
    kinds: tuple[str, ...]
    """Kinds of the section that have the key in this form; empty if the section has no kinds"""
    accepts: str
    """Type and range, or the values"""
    default: str
    meaning: str
    """With unit, effect and source"""

    def text(self) -> str:
        """Return a paragraph."""
        kinds = f"  ({self.dotted.partition('.')[0]}.kind: {', '.join(self.kinds)})" if self.kinds else ""
        facts = f"{self.accepts}; {self.default}"
        body = [
            *textwrap.wrap(facts, WIDTH - 4, break_on_hyphens=False),
            *textwrap.wrap(self.meaning, WIDTH - 4, break_on_hyphens=False),
        ]
        return "\n".join([f"{self.dotted}{kinds}", *(f"    {line}" for line in body)]) + "\n"


def reference() -> list[Key]:
    """Return all keys in the order of the schema. A key that is the same in several kinds is listed once."""
    schema = Config.model_json_schema()
    merged: dict[tuple[str, str, str, str], list[str]] = {}
    for key in _keys(schema, schema["$defs"], "", (), {}):
        merged.setdefault((key.dotted, key.accepts, key.default, key.meaning), []).extend(key.kinds)
    return [Key(dotted, tuple(kinds), *rest) for (dotted, *rest), kinds in merged.items()]


def explain(asked: str) -> str:
    """Return the text about `asked`, a key or a section; about all keys if it is empty.

    Raises ConfigError if there is no such key.
    """
    keys, asked = reference(), without_phase(asked.partition("=")[0])
    asked = of_template(".".join(part for part in asked.split(".") if not part.isdecimal()))  # without places in lists
    found = [key for key in keys if not asked or key.dotted == asked or key.dotted.startswith(f"{asked}.")]
    if not found:
        near = meant(asked, asked.split("."), RENAMED_KEYS)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError([f"--explain {asked}: no such key{hint}"])
    if asked:
        return "\n".join(key.text() for key in found)
    sections = {key.dotted.partition(".")[0]: None for key in found}
    head = f"{len(found)} keys; --explain SECTION or --explain SECTION.KEY prints fewer: {', '.join(sections)}"
    pages = ["\n".join(textwrap.wrap(head, WIDTH)) + "\n"]
    for section in sections:
        pages += [f"== {section} ==\n", *(key.text() for key in found if key.dotted.partition(".")[0] == section)]
    return "\n".join(pages)


def _keys(schema: Schema, models: Schema, prefix: str, kinds: tuple[str, ...], defaults: Schema) -> Iterator[Key]:
    """The keys below `prefix`. `defaults` come from the section above and override the defaults of the class."""
    required = schema.get("required", ())
    for name, field in schema["properties"].items():
        dotted = f"{prefix}{name}"
        sections = list(_sections(field, models)) if dotted not in LISTED_ELSEWHERE else []
        if (not sections or field.get("type") == "array") and "const" not in field:
            yield Key(
                dotted,
                kinds,
                _accepts(field, models),
                "required"
                if name in required
                else f"default {_shown(defaults.get(name, field.get('default', _NO_DEFAULT)))}",
                " ".join(field.get("description", "").split()),
            )
        for section in sections:
            kind = section["properties"].get("kind", {}).get("const")
            above = field.get("default")
            below = above if isinstance(above, dict) and not kind else {}
            yield from _keys(section, models, f"{dotted}.", (*kinds, kind) if kind else kinds, below)


def _sections(field: Schema, models: Schema) -> Iterator[Schema]:
    """The section classes that a field may hold, or the entries of its list: one, or one per kind."""
    for option in (
        field,
        *([field["items"]] if "items" in field else []),
        *field.get("oneOf", ()),
        *field.get("anyOf", ()),
    ):
        if (name := str(option.get("$ref", "")).rpartition("/")[2]) and "properties" in models[name]:
            yield models[name]


def _accepts(field: Schema, models: Schema) -> str:
    if "oneOf" in field:
        return "mapping"
    if "$ref" in field:
        return _accepts(models[field["$ref"].rpartition("/")[2]], models)
    if "anyOf" in field:
        return " or ".join(_accepts(option, models) for option in field["anyOf"])
    if "enum" in field or "const" in field:
        return " | ".join(str(value) for value in field.get("enum", [field.get("const")]))
    kind = field.get("format") or field.get("type", "anything")
    if kind == "array":
        items = field.get("items") or {"type": "anything"}
        size = f" of {field['minItems']}" if field.get("minItems") == field.get("maxItems") is not None else ""
        return f"list{size}" if "prefixItems" in field else f"list of {_accepts(items, models)}"
    if kind == "object":
        return "mapping"
    bounds = [f"{sign} {field[name]}" for name, sign in _BOUNDS.items() if name in field]
    return " ".join([str(kind), ", ".join(bounds)]).strip()


def _shown(value: object) -> str:
    if value is _NO_DEFAULT:
        return "empty"
    return value if isinstance(value, str) and value.isprintable() else json.dumps(value, ensure_ascii=False)
