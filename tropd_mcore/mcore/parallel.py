"""The parallel layout of one job: its sizes, its process groups, and the place of this rank in them.

This module does not build models or schedules. Invariants: tensor * pipeline * context * data = WORLD_SIZE. Every group
is a real group, never None. Outside `mcore/` groups come from `Layout.groups`, never from Megatron's global state.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.distributed import ProcessGroup

from tropd_mcore.config.checks import layout_problems
from tropd_mcore.config.schema import ParallelConfig, RunConfig
from tropd_mcore.errors import ConfigError
from tropd_mcore.mcore.platform import Platform

logger = logging.getLogger(__name__)

COLLECTIVE_TIMEOUT = timedelta(hours=2)
"""Default of the longest wait in one collective. The other ranks wait in one while rank 0 samples or a checkpoint is
written."""
COLLECTIVE_GRACE = timedelta(minutes=30)
"""Time by which the default exceeds run.stall_timeout_s at least. The stall watch then names the missing rank before
the collective times out."""


@dataclass(frozen=True)
class RankEnvironment:
    """What the launcher gave this process. torch.distributed reads MASTER_ADDR and MASTER_PORT itself."""

    rank: int
    world_size: int
    local_rank: int
    master: str = "127.0.0.1"
    """Address or name of the first node (MASTER_ADDR)"""

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] | None = None) -> RankEnvironment:
        """Read RANK, WORLD_SIZE and LOCAL_RANK as set by torchrun. Raises ConfigError that names the missing ones."""
        environ = os.environ if environ is None else environ
        values: dict[str, int] = {}
        problems: list[str] = []
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            text = environ.get(name, "")
            if text.isdecimal():
                values[name] = int(text)
            else:
                problems.append(f"environment: {name} is {text!r}, expected a number; launch the job with torchrun")
        if problems:
            raise ConfigError(problems)
        master = environ.get("MASTER_ADDR", "") or cls.master
        return cls(values["RANK"], values["WORLD_SIZE"], values["LOCAL_RANK"], master)


@dataclass(frozen=True)
class Groups:
    """Process groups that this rank is a member of."""

    tp: ProcessGroup
    """Ranks that hold the vocabulary shards and heads of the same layers."""
    pp: ProcessGroup
    """Stages of one pipeline."""
    dp: ProcessGroup
    """Replicas, which process different packs."""
    cp: ProcessGroup
    """Ranks that share one pack."""
    dp_cp: ProcessGroup
    """All ranks with the same parameters. Gradients are summed over this group."""
    world: ProcessGroup
    control: ProcessGroup
    """All ranks, on gloo, for host objects."""


@dataclass(frozen=True)
class Layout:
    """This rank's place in the job. The `*_size` fields are the same on all ranks."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    cp_rank: int
    cp_size: int
    vpp_size: int
    """Model chunks per stage; 1 = not interleaved."""
    sequence_parallel: bool
    groups: Groups
    owns_world: bool
    """Whether `destroy` also ends torch.distributed, because `initialize` started it."""

    @property
    def is_first_stage(self) -> bool:
        """Holds the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Holds the output layer: loss and scores exist here only."""
        return self.pp_rank == self.pp_size - 1


def collective_timeout(run: RunConfig) -> timedelta:
    """Return the longest wait in one collective (run.collective_timeout_s or its default)."""
    if run.collective_timeout_s is not None:
        return timedelta(seconds=run.collective_timeout_s)
    return max(COLLECTIVE_TIMEOUT, timedelta(seconds=run.stall_timeout_s) + COLLECTIVE_GRACE)


def initialize(
    parallel: ParallelConfig,
    platform: Platform,
    seed: int,
    environment: RankEnvironment,
    *,
    timeout: timedelta = COLLECTIVE_TIMEOUT,
) -> Layout:
    """Activate the platform, join the job, create the groups and seed the model's random states.

    `timeout` is the longest wait in one collective.

    If torch.distributed is already initialised, it is used as it is; its ranks must match `environment`. An earlier
    layout of this process is replaced. Raises ConfigError if the sizes do not fit the world size.
    """
    if problems := layout_problems(parallel, environment.world_size):
        raise ConfigError(problems)
    platform.activate()
    owns_world = not dist.is_initialized()
    if owns_world:
        dist.init_process_group(
            platform.backend,
            rank=environment.rank,
            world_size=environment.world_size,
            timeout=timeout,
        )
    assert (dist.get_rank(), dist.get_world_size()) == (environment.rank, environment.world_size)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        context_parallel_size=parallel.context,
        distributed_timeout_minutes=math.ceil(timeout.total_seconds() / 60),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    layout = _layout(parallel, owns_world, timeout)
    logger.info("parallel: %s ranks, %s", layout.world_size, parallel)
    return layout


def _layout(parallel: ParallelConfig, owns_world: bool, timeout: timedelta) -> Layout:
    world = dist.group.WORLD
    assert world is not None
    groups = Groups(
        tp=parallel_state.get_tensor_model_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        dp=parallel_state.get_data_parallel_group(),
        cp=parallel_state.get_context_parallel_group(),
        dp_cp=parallel_state.get_data_parallel_group(with_context_parallel=True),
        world=world,
        control=dist.new_group(backend="gloo", timeout=timeout),
    )
    return Layout(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=groups.tp.rank(),
        tp_size=groups.tp.size(),
        pp_rank=groups.pp.rank(),
        pp_size=groups.pp.size(),
        dp_rank=groups.dp.rank(),
        dp_size=groups.dp.size(),
        cp_rank=groups.cp.rank(),
        cp_size=groups.cp.size(),
        vpp_size=parallel.virtual_pipeline or 1,
        sequence_parallel=parallel.sequence_parallel,
        groups=groups,
        owns_world=owns_world,
    )


def destroy(layout: Layout) -> None:
    """Destroy Megatron's groups, and also torch.distributed if `initialize` started it."""
    parallel_state.destroy_model_parallel()
    if layout.owns_world:
        dist.destroy_process_group()
