"""Configurations and contexts of jobs over real, tiny model folders, for the tests of a job's inputs and components."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.glue.stubs import make_config
from tropd_mcore.config.derived import model_paths
from tropd_mcore.config.schema import Config
from tropd_mcore.records.run_dir import RunDir
from tropd_mcore.train.components import JobContext
from tropd_mcore.train.loaded_inputs import LoadedInputs
from tropd_mcore.train.start_checks import INPUT_CHECKS, State, run_checks
from tropd_mcore.weights.architecture import Architecture, read_architecture

SDPO = {"kind": "sdpo", "student_topk": 5, "topk": 3}


def config_of(run_dir: Path, folder: Path, **sections: Any) -> Config:
    """A configuration. Student and teacher are `folder` unless `sections` say otherwise."""
    for name in ("student", "teacher"):
        sections[name] = {"path": folder} | sections.get(name, {})
    return make_config(run_dir, **sections)


def context_of(config: Config, layout: Any, **changes: Architecture) -> JobContext:
    """`changes` replace values from the folders, by the first word of the key."""
    models = {
        key: changes.get(key.partition(".")[0], read_architecture(path)) for key, path in model_paths(config).items()
    }
    return JobContext(config, SimpleNamespace(name="cpu", device="cpu"), layout, RunDir(config.run.dir), models)


def read_loaded_inputs(context: JobContext) -> LoadedInputs:
    """The loaded inputs of a start, without the checks of the launch and of the run directory. Collective."""
    state = State.of(context)
    left_out = ("launch", "run.dir", "weights", "tokenizer", "vocabulary")
    run_checks([check for check in INPUT_CHECKS if check.name not in left_out], state, context)
    return state.loaded_inputs()
