"""What a server of a model is started with, and its tokenizer against the one that the prompts were made with.

Not for what is sampled: requests hold ids, and no text that a server makes is read. But a server with another tokenizer
may stop elsewhere, and is not the server of this model. Invariant: a server that we start reads the tokenizer as we do;
one that runs elsewhere is compared, or the log says that it cannot be.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from tropd_mcore.config.fields import Dtype
from tropd_mcore.config.schema import ServerConfig
from tropd_mcore.data.tokenizer import read_tokenizer, write_for_server
from tropd_mcore.data.tokenizer_gate import check_server_tokenizer, server_probe
from tropd_mcore.errors import ServerDied, ServerError
from tropd_mcore.serving.process import ServerSpec
from tropd_mcore.serving.supervisor import SupervisedServer

log = logging.getLogger(__name__)


def tokenizer_for_server(folder: Path, logs: Path, name: str) -> Path | None:
    """Return a folder of corrected tokenizer files under `logs` for the server `name`; None where it needs none.

    Raises DataError where the tokenizer of the model in `folder` cannot be read.
    """
    return write_for_server(read_tokenizer(folder), folder, logs / f"{name}.tokenizer")


def server_spec(
    name: str,
    *,
    key: str,
    model_key: str,
    model: Path,
    dtype: Dtype,
    config: ServerConfig,
    device: Literal["cpu", "cuda"],
    logs: Path,
    title: str | None = None,
    here: bool = True,
) -> ServerSpec:
    """Return what to start for the model in the folder `model`, with the tokenizer as we read it.

    `key` is the section that `config` comes from and `model_key` the one of `model`, for messages, which begin with
    `title` (`key` unless given); `dtype` is used where `config` names none; the output goes to <logs>/<name>.log.
    `here`: this process starts it, unless `config.url` names one that runs. Raises DataError as `tokenizer_for_server`.
    """
    return ServerSpec(
        key=key,
        model_key=model_key,
        model_path=model,
        config=config,
        device=device,
        run_dir=logs,
        name=name,
        title=title,
        dtype=dtype,
        tokenizer_path=tokenizer_for_server(model, logs, name) if here and config.url is None else None,
    )


def check_served_tokenizer(server: SupervisedServer, folder: Path) -> None:
    """Compare the ids that `server` makes of the probe texts with those of the tokenizer in `folder`.

    Raises GateError with the first difference, ServerDied where the server is gone.
    """
    loaded = read_tokenizer(folder)
    try:
        found = server.client.tokenize(server_probe(loaded))
    except ServerDied:
        raise
    except ServerError as error:
        log.warning("%s: its tokenizer is not compared with that of %s: %s", server.spec.key, folder, error)
        return
    check_server_tokenizer(server.spec.key, server.client.url, loaded, found)
