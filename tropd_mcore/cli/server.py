"""An SGLang server for the duration of one subcommand."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

from tropd_mcore.cli.server_settings import memory_of_gpus, sizes, whole_machine
from tropd_mcore.config.fields import Dtype
from tropd_mcore.config.schema import PlatformConfig, ServerConfig
from tropd_mcore.rollout.served_tokenizer import server_spec
from tropd_mcore.serving.record import free_name
from tropd_mcore.serving.supervisor import SupervisedServer

log = logging.getLogger(__name__)


def open_server(
    name: str,
    *,
    key: str,
    model_key: str,
    model: Path,
    dtype: Dtype,
    config: ServerConfig,
    platform: PlatformConfig,
    logs: Path,
    title: str | None = None,
    given: Collection[str] = (),
) -> SupervisedServer:
    """Return a context manager that starts the server of `config` (or uses its `url`) and stops what it started.

    The arguments are those of `server_spec`. On GPUs a started server takes the whole machine; `given` are the keys of
    `config` that say otherwise (`server_settings`). If another live process has a server of that name, this one is
    called `<name>-2` and so on, so a command never touches the servers of a running job or of other commands. Raises
    ServerError on entry.
    """
    from tropd_mcore.mcore.platform import meant  # imports torch

    device = meant(platform.kind)
    if config.url is None:
        name = free_name(logs, name)
        if device == "cuda":
            config = whole_machine(config, model, memory_of_gpus(), given)
            log.info("%s: %s", title or key, sizes(config))
    spec = server_spec(
        name,
        key=key,
        model_key=model_key,
        model=model,
        dtype=dtype,
        config=config,
        device=device,
        logs=logs,
        title=title,
    )
    return SupervisedServer(spec)
