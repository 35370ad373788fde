"""The ground of the start checks: the configuration, the run directory, and the architecture of each model.

It holds no ranks, processes or servers; `components.JobContext` adds those and is also a ground. Invariant: a ground
can be made on any machine, without a process group.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from tropd_mcore.config.derived import is_served
from tropd_mcore.config.schema import Config
from tropd_mcore.config.teachers import by_path_key
from tropd_mcore.errors import ModelError
from tropd_mcore.records.run_dir import RunDir
from tropd_mcore.weights.architecture import Architecture, UnsupportedFamily, read_architecture
from tropd_mcore.weights.served import ServedModel, read_served_model

SERVED_HINT = "a teacher of any model that SGLang serves can run behind a server: set "


class Ground(Protocol):
    """The data that a check may read."""

    @property
    def config(self) -> Config: ...

    @property
    def run_dir(self) -> RunDir: ...

    @property
    def models(self) -> Mapping[str, Architecture | ServedModel]:
        """Architectures, or sizes of a served model, by the key of their folder."""

    @property
    def student(self) -> Architecture: ...


class NamedModels:
    """Gives names to the models of a run, once `models` has been read."""

    models: Mapping[str, Architecture | ServedModel]

    @property
    def student(self) -> Architecture:
        return self.in_job("student.path")

    def in_job(self, key: str) -> Architecture:
        """Return the architecture of a model that the job builds."""
        found = self.models[key]
        assert not isinstance(found, ServedModel), f"{key} is served, so Megatron does not build it"
        return found


def read_model(config: Config, key: str, folder: Path) -> Architecture | ServedModel:
    """Read the config.json of the model of `key`: all of it, or only its sizes if a server alone loads the model.

    Raises ModelError that names the key. The error about an in-process teacher of an unsupported family says that a
    server can have it.
    """
    try:
        return read_served_model(folder) if is_served(config, key) else read_architecture(folder)
    except UnsupportedFamily as error:
        teacher = by_path_key(config).get(key)
        hint = "" if teacher is None else f"; {SERVED_HINT}{teacher.key}.kind=sglang"
        raise ModelError(f"{key}: {error}{hint}") from error
    except ModelError as error:
        raise ModelError(f"{key}: {error}") from error
