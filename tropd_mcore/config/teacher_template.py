"""How the entries of `teachers` get the keys that they do not set: from the section `teacher`.

This module sees the values of a configuration before they are validated (`schema`). Invariant: after validation every
entry of `teachers` has all of its keys, so no other module reads `teacher` for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from tropd_mcore.config.server_section import filled

OF_A_SERVER = ("server", "servers", "check_every", "on_failure")
"""Keys of a teacher that only kind `sglang` reads."""
IN_THE_JOB = ("pipeline_layers", "offload")
"""Keys of a teacher that only kind `megatron` reads."""


def with_teacher(values: object) -> object:
    """Return the values of a configuration in which each entry of `teachers` has the keys of `teacher` that it lacks.

    Keys of a server are filled in one by one, as those of an entry of `servers` are. An entry of another kind than
    `teacher` gets no key that only the other kind reads, and an entry with its own `server` gets no `servers`. Anything
    that is not a mapping stays as it is, for the validator to refuse.
    """
    if not isinstance(values, Mapping) or not isinstance(values.get("teachers"), Mapping):
        return values
    template = _values(values.get("teacher"))
    if not isinstance(template, Mapping):
        return values
    entries = {name: {} if entry is None else _values(entry) for name, entry in values["teachers"].items()}
    return {
        **values,
        "teachers": {
            name: _entry(entry, template) if isinstance(entry, Mapping) else entry for name, entry in entries.items()
        },
    }


def _values(section: object) -> object:
    return section.model_dump(exclude_unset=True) if isinstance(section, BaseModel) else section


def _entry(entry: Mapping[str, Any], template: Mapping[str, Any]) -> dict[str, Any]:
    kind = entry.get("kind", template.get("kind", "megatron"))
    without = OF_A_SERVER if kind == "megatron" else IN_THE_JOB
    if "server" in entry and "servers" not in entry:
        without = (*without, "servers")
    found = {**{key: value for key, value in template.items() if key not in without}, **entry}
    server, shared = entry.get("server"), template.get("server")
    if kind != "megatron" and isinstance(server, Mapping) and isinstance(_values(shared), Mapping):
        found["server"] = filled(server, _values(shared))  # type: ignore[arg-type]
    return found
