"""What the checks of a start stand on: the configuration, the run directory, and what config.json says of each model.

Not for ranks, processes or servers (`components.JobContext`, which is one more ground). Invariant: a ground can be
made on any machine, without a process group.
"""

from __future__ import annotations

from typing import Protocol

from tropd_mcore.config.schema import Config
from tropd_mcore.records.run_dir import RunDir
from tropd_mcore.weights.architecture import Architecture


class Ground(Protocol):
    """What a check may look at."""

    @property
    def config(self) -> Config: ...

    @property
    def run_dir(self) -> RunDir: ...

    @property
    def models(self) -> dict[str, Architecture]:
        """By the key of their folder."""

    @property
    def student(self) -> Architecture: ...

    @property
    def teacher(self) -> Architecture: ...


class NamedModels:
    """The two models that every run has, of a ground whose `models` have been read."""

    models: dict[str, Architecture]

    @property
    def student(self) -> Architecture:
        return self.models["student.path"]

    @property
    def teacher(self) -> Architecture:
        return self.models["teacher.path"]
