"""SGLang servers for the duration of one subcommand."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from pathlib import Path

from tropd_mcore.cli.server_settings import memory_of_gpus, sizes, whole_machine
from tropd_mcore.config.fields import Dtype
from tropd_mcore.config.schema import PlatformConfig, ServerConfig
from tropd_mcore.rollout.served_tokenizer import server_spec
from tropd_mcore.serving.fleet import ServerFleet
from tropd_mcore.serving.record import free_name
from tropd_mcore.serving.supervisor import SupervisedServer

log = logging.getLogger(__name__)


def open_servers(
    name: str,
    *,
    key: str,
    model_key: str,
    model: Path,
    dtype: Dtype,
    configs: Sequence[ServerConfig],
    platform: PlatformConfig,
    logs: Path,
    title: str | None = None,
    given: Collection[str] = (),
) -> ServerFleet:
    """Return a context manager that starts the servers of `configs` (or uses their `url`) and stops what it started.

    The arguments are those of `server_spec`; `key` is the section that messages about all servers name. On GPUs started
    servers take the whole machine; `given` are the keys of `configs` that say otherwise (`server_settings`). If another
    live process has a server of a name, the one here is called `<name>-2` and so on, so a command never touches the
    servers of a running job or of other commands. Raises ServerError on entry.
    """
    from tropd_mcore.mcore.platform import meant  # imports torch

    device = meant(platform.kind)
    servers = list(configs)
    if device == "cuda" and all(server.url is None for server in servers):
        servers = whole_machine(servers[0], model, memory_of_gpus(), given)
        log.info("%s: %s", title or key, sizes(servers))
    fleet = []
    for place, server in enumerate(servers):
        several = len(servers) > 1
        called = f"{name}-{place}" if several else name
        fleet.append(
            SupervisedServer(
                server_spec(
                    free_name(logs, called) if server.url is None else called,
                    key=key,
                    model_key=model_key,
                    model=model,
                    dtype=dtype,
                    config=server,
                    device=device,
                    logs=logs,
                    title=f"{title or key}, {place + 1} of {len(servers)}" if several else title,
                )
            )
        )
    return ServerFleet(fleet)
