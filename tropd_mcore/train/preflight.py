"""The cheap checks of a launch: they run in one process before heavy imports, ranks, servers or models.

Checks that read a tokenizer, weights or the data are in `train.start_checks`, which the job runs and `tropd doctor`
repeats. Invariants: nothing heavy is imported (no torch, transformers, megatron or sglang), and nothing is written. All
problems are reported at once, one line each with its key. The job, `tropd train` and `tropd doctor` run the same list
(`CHEAP_CHECKS`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from tropd_mcore.config.checks import layout_problems
from tropd_mcore.config.derived import is_served, model_paths, reads_responses, started_servers
from tropd_mcore.config.schema import Config
from tropd_mcore.config.teachers import stage_layers
from tropd_mcore.errors import ModelError
from tropd_mcore.train.preflight_files import (
    data_files,
    held_out_files,
    model_folders,
    prompt_lines,
    run_directory,
    starting_points,
    weights_folders,
)
from tropd_mcore.train.preflight_machine import api_keys, devices, packages, ports, visible_gpus
from tropd_mcore.train.preflight_types import Fault
from tropd_mcore.weights.architecture import cut_problems, frozen_cut_problems, read_architecture


@dataclass(frozen=True)
class Launch:
    """Input of the cheap checks."""

    config: Config
    world_size: int | None = None
    """Number of ranks on all machines; None = not known yet."""
    nodes: int | None = None
    """Number of machines; None = not known."""
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)

    @property
    def ranks_here(self) -> int | None:
        """Number of ranks that this machine starts; None if not known."""
        if self.world_size is None or self.nodes is None:
            return None
        return -(-self.world_size // self.nodes)


@dataclass(frozen=True)
class CheapCheck:
    """One cheap check."""

    name: str
    """Name that `tropd doctor` prints if nothing is wrong."""
    find: Callable[[Launch], Iterator[Fault]]
    tell: Callable[[Launch], str]
    """Text that `tropd doctor` prints after that name."""


def cheap(
    config: Config,
    *,
    world_size: int | None,
    nodes: int | None = None,
    environ: Mapping[str, str] | None = None,
) -> list[str]:
    """Return the problems that would end a launch of `config`, one line each. Takes less than a second.

    `world_size` is the number of ranks on all `nodes` machines; None if not known. `environ` is the launcher's
    environment (None = the environment of this process).
    """
    launch = Launch(config, world_size, nodes, os.environ if environ is None else environ)
    return [fault.text for check in CHEAP_CHECKS for fault in check.find(launch) if fault.level != "warning"]


def _layout(launch: Launch) -> Iterator[Fault]:
    if launch.world_size is not None:
        for problem in layout_problems(launch.config.parallel, launch.world_size):
            yield Fault("parallel", problem)


def _models_in_the_job(launch: Launch) -> dict[str, Path]:
    """Return {configuration key: folder} of the models that are sharded over the ranks and have a config.json."""
    paths = model_paths(launch.config).items()
    return {key: path for key, path in paths if not is_served(launch.config, key) and (path / "config.json").is_file()}


def _cuts(launch: Launch) -> Iterator[Fault]:
    """Check that every model in the job divides over tensor ranks and pipeline stages."""
    config = launch.config
    for key, folder in _models_in_the_job(launch).items():
        try:
            arch = read_architecture(folder)
        except ModelError:  # reported by the checks that read models
            continue
        if key == "student.path" or config.objective.self_teaching is not None:
            problems = cut_problems(arch, config.parallel, config.parallel.virtual_pipeline)
        else:
            problems = frozen_cut_problems(arch, config.parallel, stage_layers(config, key))
        for problem in problems:
            change = "change parallel.tensor or parallel.pipeline"
            if problem.startswith("teacher.pipeline_layers"):
                layers = f"{key.removesuffix('path')}pipeline_layers"
                problem, change = problem.replace("teacher.pipeline_layers", layers, 1), f"change {layers}"
            yield Fault(key, f"{key}={folder}: {problem}; {change}")


def _cuts_seen(launch: Launch) -> str:
    seen = ", ".join(_models_in_the_job(launch))
    if not seen:
        return "not looked at: no model in the job has a config.json"
    return f"layers and heads of {seen} divide over stages and tensor ranks"


def _models(launch: Launch) -> str:
    return ", ".join(f"{key}={path}" for key, path in model_paths(launch.config).items())


def _data(launch: Launch) -> str:
    config = launch.config
    responses = f", {config.data.teacher_responses}" if reads_responses(config) else ""
    return f"{config.data.prompts}{responses}"


def _data_faults(launch: Launch) -> Iterator[Fault]:
    return chain(data_files(launch.config), held_out_files(launch.config), prompt_lines(launch.config))


def _ports(launch: Launch) -> str:
    named = [f"{key} {server.port}" for key, server in started_servers(launch.config).items() if server.port]
    return f"free: {', '.join(named)}" if named else "chosen by the OS"


def _devices(launch: Launch) -> str:
    gpus = visible_gpus(launch.environ)
    ranks = f"{launch.ranks_here} ranks here, " if launch.ranks_here is not None else ""
    seen = "an unknown number of" if gpus is None else gpus
    return f"{ranks}platform.kind={launch.config.platform.kind}, {seen} GPUs visible"


CHEAP_CHECKS: tuple[CheapCheck, ...] = (
    CheapCheck("parallel", _layout, lambda launch: f"{launch.world_size or 'any fitting number of'} ranks"),
    CheapCheck("model folders", lambda launch: model_folders(launch.config), _models),
    CheapCheck("cuts of the models", _cuts, _cuts_seen),
    CheapCheck("data files", _data_faults, _data),
    CheapCheck(
        "run.dir",
        lambda launch: chain(run_directory(launch.config), weights_folders(launch.config)),
        lambda launch: "can be written",
    ),
    CheapCheck(
        "beginning",
        lambda launch: starting_points(launch.config),
        lambda launch: str(launch.config.run.init_from or launch.config.run.replay or "from student.path"),
    ),
    CheapCheck(
        "packages",
        lambda launch: packages(launch.config, launch.environ),
        lambda launch: "all that this configuration imports are installed",
    ),
    CheapCheck(
        "API keys", lambda launch: api_keys(launch.config, launch.environ), lambda launch: "every named variable is set"
    ),
    CheapCheck("ports", lambda launch: ports(launch.config), _ports),
    CheapCheck("devices", lambda launch: devices(launch.config, launch.ranks_here, launch.environ), _devices),
)
"""All cheap checks, in the order of their lines."""
