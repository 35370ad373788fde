"""API keys, and the environment that a started server inherits. Nothing else in `serving` reads the environment.

Settings are not read here; they are in the configuration. Invariants: a started server sends requests to itself
without a proxy. Its processes talk to each other on the loopback interface only. Its key is only in its environment.
"""

from __future__ import annotations

import os
import pwd
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tropd_mcore.config.server_checks import LOOPBACK
from tropd_mcore.errors import ServerError
from tropd_mcore.serving.router_launch import KEY_VARIABLE as ROUTER_KEY_VARIABLE
from tropd_mcore.serving.sglang_launch import KEY_VARIABLE

_PROXY_EXCEPTIONS = ("no_proxy", "NO_PROXY")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")
_CHANGES_A_ROUTER = ("RUST_LOG", "RUST_BACKTRACE", "DB_AUTO_MIGRATE")
_SETS_A_ROUTER = ("SMG_", "OTEL_")
"""Prefixes of variables with settings of a router and of its traces; those of ours are arguments."""
_DISTRIBUTED_PREFIXES = ("TORCHELASTIC_", "ROLE_", "GROUP_")
_DISTRIBUTED_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_CHANGES_LOG_PROBS = "SGLANG_RETURN_ORIGINAL_LOGPROB"
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Settings of torch's allocator, which are the trainer's. SGLang's memory saver fails with expandable segments."""
VISIBLE = "CUDA_VISIBLE_DEVICES"
_OF_OUR_PYTHON = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "CONDA_PREFIX")
_LIBRARIES = ("LD_LIBRARY_PATH", "CUDNN_HOME", "CUDA_HOME", "CPLUS_INCLUDE_PATH")
"""Lists of folders. Those inside our site-packages hold libraries of our torch, which another torch must not load."""
_MOST_THREADS = 8
"""Most CPU threads of a rank by default; a GPU server has no work for more."""
_SEVERAL_GROUPS = ("--dp", "--data-parallel", "--enable-dp", "--nnodes", "--dist-init-addr")
"""Prefixes of server arguments that create several process groups, or one group across hosts."""


@dataclass(frozen=True)
class Place:
    """Device, port, folder and key of a server to start."""

    device: str
    port: int
    """Port of its HTTP process"""
    folder: Path
    """Private folder of the server, for sockets and temporary files; other users cannot read it"""
    api_key: str = field(repr=False)
    tensor_parallel: int = 1
    threads: int = 1
    """CPU threads of each of the `tensor_parallel` ranks"""
    extra_args: tuple[str, ...] = ()
    python: Path | None = None
    """Interpreter that runs the server; None = ours"""
    visible_gpus: str | None = None
    """GPUs of the server, as CUDA_VISIBLE_DEVICES names them; None = all that this process sees"""
    sized_in_tokens: bool = False
    """Whether the size of the KV cache is given, so that it does not depend on the free memory of each GPU"""


def read_api_key(variable: str | None, *, key: str) -> str | None:
    """Return the API key in the environment variable `variable`, or None if `variable` is None.

    `key` is the configuration key that names the variable. Raises ServerError if the variable is unset or empty.
    """
    if variable is None:
        return None
    secret = os.environ.get(variable, "")
    if not secret:
        raise ServerError(f"{key}={variable}: this environment variable is unset or empty; export it in the launcher")
    return secret


def server_environment(place: Place, extra: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a started server: ours, without the variables that torchrun set for this rank.

    Entries of `extra` override all others.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in _DISTRIBUTED_NAMES
        and not name.startswith(_DISTRIBUTED_PREFIXES)
        # log-probs of samples must come from the distribution that was sampled, temperature included
        and name != _CHANGES_LOG_PROBS
        and name not in _ALLOCATOR
    }
    if place.python is not None:
        inherited = of_interpreter(place.python, inherited)
    inherited["OMP_NUM_THREADS"] = str(place.threads)
    if place.device == "cpu":
        inherited["SGLANG_USE_CPU_ENGINE"] = "1"
        if place.tensor_parallel > 1:
            inherited["SGLANG_CPU_OMP_THREADS_BIND"] = _cpu_groups(place.tensor_parallel, place.threads)
    else:
        inherited |= _on_gpus(place)
    return inherited | _own_files(inherited, place) | _loopback(inherited, place) | dict(extra)


def router_environment(python: Path | None, api_key: str) -> dict[str, str]:
    """Return the environment of a started router: ours, without what would change its way to the servers, or its log.

    It reaches its servers without a proxy and reports to no other host.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in (*_DISTRIBUTED_NAMES, *_CHANGES_A_ROUTER)
        and not name.startswith((*_DISTRIBUTED_PREFIXES, *_SETS_A_ROUTER))
        and name.lower() not in _PROXIES
    }
    if python is not None:
        inherited = of_interpreter(python, inherited)
    return inherited | {ROUTER_KEY_VARIABLE: api_key}


def threads_per_rank(device: str, tensor_parallel: int) -> int:
    """Return how many CPU threads each rank of a server gets by default.

    On a CPU it is one, because the trainer needs the others. A server on GPUs uses the CPU to schedule and to prepare
    batches, so it does not inherit the single thread of a trainer's rank.
    """
    if device == "cpu":
        return 1
    return max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0)) // tensor_parallel))


def named_gpus(gpus: tuple[int, ...] | None, *, key: str) -> str | None:
    """Return the value of CUDA_VISIBLE_DEVICES for `gpus`, counted among those that this process sees; None for None.

    `key` is the configuration key that names them. Raises ServerError if this process sees fewer.
    """
    if gpus is None:
        return None
    named = os.environ.get(VISIBLE)
    if named is None:
        return ",".join(map(str, gpus))
    seen = [entry.strip() for entry in named.split(",") if entry.strip()]
    if max(gpus) >= len(seen):
        raise ServerError(f"{key}={list(gpus)}: expected numbers below {len(seen)}, because {VISIBLE}={named}")
    return ",".join(seen[index] for index in gpus)


def _on_gpus(place: Place) -> dict[str, str]:
    """Variables of a server on GPUs: which ones, and whether they may have unequal amounts of free memory."""
    found = {} if place.visible_gpus is None else {VISIBLE: place.visible_gpus}
    if place.sized_in_tokens:
        # SGLang refuses GPUs of which one has 10 % less free memory, because the least of them sizes the KV cache
        found["SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"] = "0"
    return found


def of_interpreter(python: Path, inherited: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return an environment for the interpreter `python` of another virtual environment, from ours or `inherited`.

    Its programs (ninja, for kernels that SGLang compiles) come first in PATH. What belongs to our Python is left out.
    """
    found = {name: value for name, value in (inherited or os.environ).items() if name not in _OF_OUR_PYTHON}
    ours = {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
    for name in found.keys() & set(_LIBRARIES):
        entries = [entry for entry in found[name].split(os.pathsep) if not ours & {*Path(entry).parents, Path(entry)}]
        found[name] = os.pathsep.join(entries)
    empty = [name for name in _LIBRARIES if not found.get(name)]
    folders = [str(python.absolute().parent), *filter(None, [found.get("PATH")])]
    return {name: value for name, value in found.items() if name not in empty} | {"PATH": os.pathsep.join(folders)}


def _own_files(inherited: Mapping[str, str], place: Place) -> dict[str, str]:
    """The API key and the folder for sockets. The cache of compiled kernels stays in place for the next launch."""
    cache = Path(tempfile.gettempdir()) / f"torchinductor_{_user()}"
    return {
        KEY_VARIABLE: place.api_key,
        "TMPDIR": str(place.folder),
        "TORCHINDUCTOR_CACHE_DIR": inherited.get("TORCHINDUCTOR_CACHE_DIR", str(cache)),
    }


def _user() -> str:
    """Name of this user. In a container the user id may have no name; then the id itself."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _loopback(inherited: Mapping[str, str], place: Place) -> dict[str, str]:
    """Variables that keep the server's requests to itself off proxies, and its listeners on the loopback interface."""
    # set both spellings alike: most programs read only one of them
    listed = ",".join(inherited.get(name, "") for name in _PROXY_EXCEPTIONS).split(",")
    entries = [*(entry.strip() for entry in listed if entry.strip()), *LOOPBACK]
    found = dict.fromkeys(_PROXY_EXCEPTIONS, ",".join(dict.fromkeys(entries)))
    if any(argument.startswith(_SEVERAL_GROUPS) for argument in place.extra_args):
        return found
    return found | {
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        # the ranks find each other through a file, because torch's TCP store listens on all interfaces
        "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE": f"file://{place.folder}/ranks",
        # SGLang names its shared memory after these two, so they must differ between servers on one host
        "MASTER_ADDR": LOOPBACK[0],
        "MASTER_PORT": str(place.port),
    }


def _cpu_groups(groups: int, cpus_per_group: int) -> str:
    """CPU ids of each rank in SGLang's format: `0,1|2,3`. If there are too few CPUs, ranks share them."""
    usable = sorted(os.sched_getaffinity(0))
    picked = [usable[index % len(usable)] for index in range(groups * cpus_per_group)]
    per_rank = [picked[start : start + cpus_per_group] for start in range(0, len(picked), cpus_per_group)]
    return "|".join(",".join(map(str, cpus)) for cpus in per_rank)
