"""Errors about keys of an objective that were changed although another key leaves them without effect.

`Objective.unused` says which keys these are. Invariant: each problem is one line that names both keys; nothing is
raised.
"""

from __future__ import annotations

from collections.abc import Iterator

from tropd_mcore.config.objectives.base import Objective, Unused


def keys_without_effect(objective: Objective) -> Iterator[str]:
    """Yield a line for each key that was changed and has no effect."""
    for unused in objective.unused():
        yield from _changed(unused)


def _changed(unused: Unused) -> Iterator[str]:
    section = unused.section
    for name in unused.names:
        value = getattr(section, name)
        usual = getattr(unused.defaults, name) if unused.defaults else type(section).model_fields[name].default
        if value != usual:
            yield (
                f"{unused.key}.{name}={value} has no effect with {unused.because}; remove the one or change the other"
            )
