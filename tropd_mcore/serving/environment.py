"""The one place of `serving` that reads the launcher's environment: API keys, and what a started server inherits.

Not for settings: those are in the configuration.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from tropd_mcore.errors import ServerError

_DISTRIBUTED_PREFIXES = ("TORCHELASTIC_", "ROLE_", "GROUP_")
_DISTRIBUTED_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_CHANGES_LOG_PROBS = "SGLANG_RETURN_ORIGINAL_LOGPROB"


def read_api_key(variable: str | None, *, key: str) -> str | None:
    """Return the API key held by the environment variable `variable`; None where none is configured.

    Raises ServerError where the variable that `key` names is unset or empty.
    """
    if variable is None:
        return None
    secret = os.environ.get(variable, "")
    if not secret:
        raise ServerError(f"{key}={variable}: this environment variable is unset or empty; export it in the launcher")
    return secret


def server_environment(
    device: str, *, tensor_parallel: int, cpu_threads: int, extra: Mapping[str, str]
) -> dict[str, str]:
    """Return the environment of a started server: ours, without what torchrun told this rank.

    `extra` wins over everything. On a CPU each of the `tensor_parallel` ranks gets `cpu_threads` threads.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in _DISTRIBUTED_NAMES
        and not name.startswith(_DISTRIBUTED_PREFIXES)
        # sampled log-probs must be those of the distribution that was sampled, temperature included
        and name != _CHANGES_LOG_PROBS
    }
    if device == "cpu":
        inherited |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": str(cpu_threads)}
        if tensor_parallel > 1:
            inherited["SGLANG_CPU_OMP_THREADS_BIND"] = _cpu_groups(tensor_parallel, cpu_threads)
    return inherited | dict(extra)


def _cpu_groups(groups: int, cpus_per_group: int) -> str:
    """CPU ids of each rank, as SGLang wants them: `0,1|2,3`. CPUs are shared where there are too few."""
    usable = sorted(os.sched_getaffinity(0))
    picked = [usable[index % len(usable)] for index in range(groups * cpus_per_group)]
    per_rank = [picked[start : start + cpus_per_group] for start in range(0, len(picked), cpus_per_group)]
    return "|".join(",".join(map(str, cpus)) for cpus in per_rank)
