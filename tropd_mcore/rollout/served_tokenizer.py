"""Builds the `ServerSpec` of a model, and compares a server's tokenizer with the one that made the prompts.

Sampling itself does not depend on the server's tokenizer: requests hold ids, and texts from a server are not read. But
a server with another tokenizer may stop at other tokens, and it is not the server of this model. Invariant: a server
that we start reads the tokenizer as we do. The tokenizer of a server that runs elsewhere is compared, or a warning says
why that is impossible.
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
from tropd_mcore.serving.process import LOOPBACK, ServerSpec
from tropd_mcore.serving.supervisor import SupervisedServer

log = logging.getLogger(__name__)


def tokenizer_for_server(folder: Path, logs: Path, name: str) -> Path | None:
    """Write corrected tokenizer files for the server `name` under `logs` and return their folder; None if not needed.

    Raises DataError if the tokenizer of the model in `folder` cannot be read.
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
    longest: int | None = None,
    host: str = LOOPBACK,
) -> ServerSpec:
    """Return the specification of a server for the model in the folder `model`, with the tokenizer as we read it.

    `key` is the configuration section of `config` and `model_key` the key of `model`; both are for messages. `title` is
    the prefix of messages (default: `key`). `dtype` is used if `config` sets none. The server's output goes to
    <logs>/<name>.log. `here`: this process starts the server, unless `config.url` names a running one. `longest` is the
    number of tokens of the longest request. A started server listens on `host`. Raises DataError like
    `tokenizer_for_server`.
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
        longest=longest,
        host=host,
    )


def check_served_tokenizer(server: SupervisedServer, folder: Path) -> None:
    """Compare how `server` and the tokenizer in `folder` tokenize the probe texts.

    Raises GateError with the first difference, and ServerDied if the server is gone.
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
