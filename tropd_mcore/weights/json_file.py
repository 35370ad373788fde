"""Reads a JSON object from a model folder strictly: a repeated key is an error. (Other readers take its last value.)

This module does not read the configuration of a run. Invariant: every JSON reader finds the same values in the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tropd_mcore.errors import ModelError
from tropd_mcore.file_kinds import in_the_way
from tropd_mcore.files import shown


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object in `path`. Raises ModelError if the file cannot be read, is no JSON object or repeats a key."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            both = " and ".join(repr(value) for key, value in pairs if key == twice)
            raise ModelError(f"{path}: {twice} appears {keys.count(twice)} times ({both}); remove the wrong one")
        return values

    if (other := in_the_way(path)) is not None:
        raise ModelError(f"{shown(path)}: cannot be read: expected a JSON object; {other}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{shown(path)}: not valid JSON ({error}); correct it or download the file again") from error
    except OSError as error:
        raise ModelError(f"{shown(path)}: cannot be read ({error.strerror})") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found
