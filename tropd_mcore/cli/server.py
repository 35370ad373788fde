"""An SGLang server for the length of one subcommand."""

from __future__ import annotations

from itertools import chain, count
from pathlib import Path
from typing import Literal

from tropd_mcore.config.fields import Dtype
from tropd_mcore.config.schema import PlatformConfig, ServerConfig
from tropd_mcore.rollout.served_tokenizer import tokenizer_for_server
from tropd_mcore.serving.process import ServerSpec
from tropd_mcore.serving.record import is_in_use
from tropd_mcore.serving.supervisor import SupervisedServer


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
) -> SupervisedServer:
    """Return a context manager that starts the server of `config` (or uses its `url`) and stops what it started.

    `key` is the section that `config` comes from and `model_key` the one of `model`, for messages, which begin with
    `title` (`key` unless given); `dtype` is used where `config` names none. The output goes to <logs>/<name>.log, or to
    <logs>/<name>-2.log and so on where another live process has a server of that name: a command leaves the servers of
    a running job and of other commands alone. Raises ServerError on entry.
    """
    local = config.url is None
    name = free_name(logs, name) if local else name
    spec = ServerSpec(
        key=key,
        model_key=model_key,
        model_path=model,
        config=config,
        device=device(platform),
        run_dir=logs,
        name=name,
        title=title,
        dtype=dtype,
        tokenizer_path=tokenizer_for_server(model, logs, name) if local else None,
    )
    return SupervisedServer(spec)


def free_name(logs: Path, name: str) -> str:
    """Return `name`, or the first of `name-2`, `name-3`, ... whose record in `logs` is of no other live process."""
    names = chain([name], (f"{name}-{number}" for number in count(2)))
    return next(each for each in names if not is_in_use(logs / f"{each}.server.json"))


def device(platform: PlatformConfig) -> Literal["cpu", "cuda"]:
    """Return what `platform.kind` means on this machine."""
    if platform.kind != "auto":
        return platform.kind
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
