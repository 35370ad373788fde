"""The section `objective`: one module per family, one class per kind.

Every module here except `base` is a family. Its subclasses of `Objective` that have a `kind` are the kinds of the
configuration. They are found by inspecting the modules, so a new family needs a new file and no entry in a table.
Invariant: a kind has one class.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from tropd_mcore.config.objectives.base import Objective


def _kinds() -> dict[str, type[Objective]]:
    """The class of each kind: TrOPD's family first, custom functions last, and within a module in its order."""
    found: dict[str, type[Objective]] = {}
    modules = [info.name for info in pkgutil.iter_modules(__path__)]
    for module in sorted(modules, key=lambda name: (name == "user_function", name != "trust_region", name)):
        family = importlib.import_module(f"{__name__}.{module}")
        for value in vars(family).values():
            own = isinstance(value, type) and issubclass(value, Objective) and value.__module__ == family.__name__
            if own and (kind := value.model_fields.get("kind")) is not None:
                assert kind.default not in found, f"objective.kind={kind.default} has two classes"
                found[kind.default] = value
    return found


KINDS = _kinds()
"""kind -> class of its section"""

if TYPE_CHECKING:
    ObjectiveConfig = Objective
else:
    ObjectiveConfig = Annotated[Union[tuple(KINDS.values())], Field(discriminator="kind")]  # noqa: UP007
