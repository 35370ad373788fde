"""An SGLang server for the length of one subcommand."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tropd_mcore.config.fields import Dtype
from tropd_mcore.config.schema import PlatformConfig, ServerConfig
from tropd_mcore.rollout.served_tokenizer import tokenizer_for_server
from tropd_mcore.serving.process import ServerSpec
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
) -> SupervisedServer:
    """Return a context manager that starts the server of `config` (or uses its `url`) and stops what it started.

    `key` is the section that `config` comes from and `model_key` the one of `model`, for messages; `dtype` is used
    where `config` names none; the output goes to <logs>/<name>.log. Raises ServerError on entry.
    """
    local = config.url is None
    spec = ServerSpec(
        key=key,
        model_key=model_key,
        model_path=model,
        config=config,
        device=device(platform),
        run_dir=logs,
        name=name,
        dtype=dtype,
        tokenizer_path=tokenizer_for_server(model, logs, name) if local else None,
    )
    return SupervisedServer(spec)


def device(platform: PlatformConfig) -> Literal["cpu", "cuda"]:
    """Return what `platform.kind` means on this machine."""
    if platform.kind != "auto":
        return platform.kind
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
