"""The ground of the start checks: the configuration, the run directory, and the architecture of each model.

It holds no ranks, processes or servers; `components.JobContext` adds those and is also a ground. Invariant: a ground
can be made on any machine, without a process group.
"""

from __future__ import annotations

from typing import Protocol

from tropd_mcore.config.schema import Config
from tropd_mcore.records.run_dir import RunDir
from tropd_mcore.weights.architecture import Architecture


class Ground(Protocol):
    """The data that a check may read."""

    @property
    def config(self) -> Config: ...

    @property
    def run_dir(self) -> RunDir: ...

    @property
    def models(self) -> dict[str, Architecture]:
        """Architectures by the key of their folder."""

    @property
    def student(self) -> Architecture: ...

    @property
    def teacher(self) -> Architecture: ...


class NamedModels:
    """Gives names to the two models that every run has, once `models` has been read."""

    models: dict[str, Architecture]

    @property
    def student(self) -> Architecture:
        return self.models["student.path"]

    @property
    def teacher(self) -> Architecture:
        return self.models["teacher.path"]
