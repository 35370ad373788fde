"""Settings of one command's servers: those of the configuration, those of `--server`, and on GPUs the whole machine.

A job shares its GPUs with its servers. `tropd prefixes` and `tropd eval` share them with nobody, so sizes that a job
needs would only leave GPUs idle. This module starts nothing (`server`). Invariant: what `--server` says is kept.
"""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from pydantic import ValidationError

from tropd_mcore.config.derived import of_first_node
from tropd_mcore.config.schema import ServerConfig
from tropd_mcore.config.server_section import OF_A_START
from tropd_mcore.config.yaml_reader import parse_yaml
from tropd_mcore.errors import ConfigError

OF_A_JOB = ("gpus", "max_total_tokens", "mem_fraction", "threads", "max_concurrency")
"""Keys whose values keep room for a trainer. On a machine of its own a server has their defaults."""
ROOM = 0.5
"""Largest share of a GPU's memory that weights may take; the KV cache needs the rest."""


def add_server_argument(parser: argparse.ArgumentParser) -> None:
    """Declare `--server`."""
    parser.add_argument(
        "--server",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a key of the server section for this call (tensor_parallel=2); may be repeated. On GPUs the server takes "
        "the whole machine by default",
    )


def all_changed(servers: Sequence[ServerConfig], given: Sequence[str]) -> list[ServerConfig]:
    """Return the servers with the values of `--server`; one of them if it names a running server or a port.

    Raises ConfigError with every problem of them.
    """
    alone = names(given) & {"url", "port"}
    return [changed(server, given) for server in (servers[:1] if alone else servers)]


def started_here(servers: Iterable[ServerConfig]) -> list[ServerConfig]:
    """Return the settings of servers of a job for servers that a command starts on this machine, at least one.

    Those on other nodes and at a url are left out; ports and dtypes are the command's own.
    """
    servers = list(servers)
    mine = of_first_node(servers) or servers[:1]
    return [server.model_copy(update={"url": None, "port": None, "dtype": None, "node": 0}) for server in mine]


def changed(server: ServerConfig, given: Sequence[str]) -> ServerConfig:
    """Return `server` with the values of `--server`. Raises ConfigError with every problem of them."""
    values: dict[str, object] = {}
    problems: list[str] = []
    for text in given:
        key, equals, value = (part.strip() for part in text.partition("="))
        document = parse_yaml(value, f"--server {key}")
        if not equals or not key:
            problems.append(f"--server {text}: expected KEY=VALUE")
        elif key not in ServerConfig.model_fields:
            close = difflib.get_close_matches(key, ServerConfig.model_fields, n=1)
            hint = f"did you mean {close[0]}?" if close else f"a server has {', '.join(ServerConfig.model_fields)}"
            problems.append(f"--server {key}: unknown key; {hint}")
        elif document.problems:
            problems += document.problems
        else:
            values[key] = document.value if value else None
    found = server
    try:
        found = ServerConfig.model_validate({**server.model_dump(), **values})
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            expected = detail["msg"].replace("Input should be ", "expected ").partition(", unable to parse")[0]
            problems.append(f"--server {detail['loc'][0]}: {expected}, found {detail['input']!r}")
    starts = [key for key in OF_A_START if key in values]
    if found.url is not None and starts:
        problems.append(f"--server {', '.join(starts)}: says how a server is started, but {found.url} runs; remove one")
    if problems:
        raise ConfigError(problems)
    return found


def names(given: Sequence[str]) -> set[str]:
    """Return the keys that `--server` sets."""
    return {text.partition("=")[0].strip() for text in given}


def whole_machine(server: ServerConfig, model: Path, gpus: Sequence[int], given: Collection[str]) -> list[ServerConfig]:
    """Return the servers for a machine of their own with `gpus`, the memory of each in bytes. Keys in `given` are kept.

    Each gets as few GPUs as its weights need, because several servers answer more requests per second than one with
    more tensor ranks. There are as many as fit on the machine.
    """
    changes: dict[str, object] = {
        name: ServerConfig.model_fields[name].default for name in OF_A_JOB if name not in given
    }
    if "tensor_parallel" not in given:
        changes["tensor_parallel"] = _tensor_parallel(model, gpus)
    found = server.model_copy(update=changes)
    several = any(
        argument.startswith(("--dp", "--data-parallel", "--pp", "--pipeline")) for argument in found.extra_args
    )
    free, each = found.gpus or tuple(range(len(gpus))), found.tensor_parallel
    if len(free) // each < 2 or several:
        return [found]
    return [
        found.model_copy(update={"gpus": free[start : start + each], "port": found.port if start == 0 else None})
        for start in range(0, len(free) - each + 1, each)
    ]


def sizes(servers: Sequence[ServerConfig]) -> str:
    """Return what the servers take, for a log line."""
    first = servers[0]
    named = sorted(gpu for server in servers for gpu in server.gpus or ())
    gpus = f"GPU {', '.join(map(str, named))}" if named else "every GPU"
    more = " ".join(first.extra_args)
    return (
        f"{len(servers)} servers take {gpus}: tensor_parallel={first.tensor_parallel}, max_concurrency="
        f"{first.max_concurrency} each{f', {more}' if more else ''}; --server KEY=VALUE changes that"
    )


def _tensor_parallel(model: Path, gpus: Sequence[int]) -> int:
    """The smallest number of GPUs that divides the attention heads and has room for the weights; else the largest."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    heads = config.get("num_attention_heads")
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    fitting = [count for count in range(1, len(gpus) + 1) if not isinstance(heads, int) or heads % count == 0]
    return next((count for count in fitting if size <= count * ROOM * min(gpus)), fitting[-1])


def memory_of_gpus() -> list[int]:
    """Return the memory in bytes of each GPU that torch sees."""
    import torch

    return [int(torch.cuda.get_device_properties(index).total_memory) for index in range(torch.cuda.device_count())]
