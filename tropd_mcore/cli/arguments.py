"""Arguments that several subcommands share."""

from __future__ import annotations

import argparse

from pydantic import ValidationError

from tropd_mcore.config.schema import ServerConfig
from tropd_mcore.errors import ConfigError


def add_config_arguments(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Add CONFIG and its dotted overrides."""
    parser.add_argument("config", nargs="?" if optional else None, metavar="CONFIG", help="YAML file")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="dotted overrides, for example optimizer.learning_rate=1e-5",
    )


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, found {text!r}")
    return int(text)


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the keys of a server section that a command without a configuration needs (see `server_config`)."""
    group = parser.add_argument_group("server", "an SGLang server is started for the call, or one that runs is used")
    group.add_argument("--url", help="base URL of a server that already serves the model")
    group.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the weights (bfloat16)")
    group.add_argument("--tensor-parallel", type=positive, default=1, metavar="N", help="ranks of the server (1)")
    group.add_argument("--max-total-tokens", type=positive, metavar="N", help="size of its KV cache, tokens")
    group.add_argument("--mem-fraction", type=float, metavar="F", help="share of GPU memory it may take")
    group.add_argument("--platform", choices=("auto", "cpu", "cuda"), default="auto", help="where it runs (auto)")


def server_config(options: argparse.Namespace) -> ServerConfig:
    """Return the server section that the arguments of `add_server_arguments` describe. Raises ConfigError."""
    values = {
        "url": options.url,
        "dtype": options.dtype,
        "tensor_parallel": options.tensor_parallel,
        "max_total_tokens": options.max_total_tokens,
        "mem_fraction": options.mem_fraction,
    }
    try:
        return ServerConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError([f"--{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]) from error
