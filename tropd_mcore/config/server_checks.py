"""Checks of the server sections: addresses, arguments, and the GPUs and the memory of servers that the job starts.

Invariant: each check returns its problems, one line each, with the keys to change; nothing is raised.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

from tropd_mcore.config.derived import is_rollout, rollout_servers, server_name, started_servers, teacher_servers
from tropd_mcore.config.schema import Config
from tropd_mcore.config.server_section import OF_A_START, ServerConfig
from tropd_mcore.config.teachers import teachers_of

MORE_GPUS = ("--pp", "--pipeline-parallel", "--dp", "--data-parallel")
"""Prefixes of server arguments with which a server takes a multiple of `tensor_parallel` GPUs."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Names of this machine's own addresses in a url."""


MANAGED_SERVER_ARGS = {
    "--model-path": "student.path or teacher.path",
    "--model": "student.path or teacher.path",
    "--host": "the loopback address of the started server",
    "--port": "server.port",
    "--device": "platform.kind",
    "--tokenizer-path": "the tokenizer of the model",
    "--dtype": "server.dtype",
    "--tp": "server.tensor_parallel",
    "--tp-size": "server.tensor_parallel",
    "--tensor-parallel-size": "server.tensor_parallel",
    "--max-total-tokens": "server.max_total_tokens",
    "--mem-fraction-static": "server.mem_fraction",
    "--base-gpu-id": "server.gpus",
    "--enable-memory-saver": "server.release_memory",
    "--api-key": "server.api_key_env",
    "--admin-api-key": "the random key of the started server",
    "--load-format": "the weights of the model's folder",
    "--nnodes": "servers of one machine each (server.node)",
    "--node-rank": "servers of one machine each (server.node)",
    "--dist-init-addr": "servers of one machine each (server.node)",
    "--disaggregation-mode": "servers that both read prompts and sample",
    "--tokenizer-worker-num": "one tokenizer process: SGLang takes no key with several",
    "--grpc-port": "HTTP alone: SGLang's gRPC asks for no key",
    "--smg-grpc-mode": "HTTP alone: SGLang's gRPC asks for no key",
    "--grpc-mode": "HTTP alone: SGLang's gRPC asks for no key",
}
"""Arguments of the SGLang server that must not be in extra_args -> the key or value that sets them."""

ONE_REPLICA = ("--dp", "--dp-size", "--data-parallel-size", "--enable-dp-attention", "--enable-dp-lm-head")
"""Arguments with which a server has several replicas of the weights. SGLang 0.5.23 takes new weights for one only."""


def _host(url: str) -> str | None:
    """The host of a url; None if it is malformed, which another check reports."""
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def gpus_of(server: ServerConfig) -> tuple[int, ...]:
    """Return the GPUs of a server to start, counted among those that the launch sees."""
    return server.gpus if server.gpus is not None else tuple(range(server.tensor_parallel))


def cache_problems(config: Config) -> Iterator[str]:
    """Yield the rollout servers whose KV cache is smaller than one request."""
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    for key, server in rollout_servers(config).items():
        if server.max_total_tokens is not None and server.max_total_tokens < longest:
            yield (
                f"{key}.max_total_tokens = {server.max_total_tokens} holds less than one request of "
                f"data.max_prompt_tokens + rollout.max_new_tokens = {longest} tokens; raise it or lower those"
            )


def rollout_server_problems(config: Config) -> Iterator[str]:
    """Yield the problems of the sections of rollout servers."""
    for key, server in rollout_servers(config).items():
        yield from _server(key, server)
        for argument in server.extra_args:
            if argument.partition("=")[0] in ONE_REPLICA:
                yield (
                    f"{key}.extra_args: {argument} makes replicas inside of one server, and SGLang takes new weights "
                    "for one replica only; name one server per replica in rollout.servers"
                )


def teacher_server_problems(config: Config) -> Iterator[str]:
    """Yield the problems of the sections of the teachers' servers."""
    for teacher in teachers_of(config):
        key = teacher.key
        if teacher.served:
            for section, server in teacher.servers.items():
                yield from _server(section, server)
        elif teacher.config.servers:
            yield f"{key}.servers: {key}.kind=megatron uses no server; remove them, or set {key}.kind=sglang"


def shared_problems(config: Config) -> Iterator[str]:
    """Yield what two servers cannot share, and what those of one model must have in common."""
    servers = rollout_servers(config)
    templates = {"rollout": config.rollout.server}
    for teacher in teachers_of(config):
        if teacher.served:
            servers |= teacher.servers
            templates[teacher.key] = teacher.config.server
    yield from _shared("port", {key: (server.node, server.port) for key, server in servers.items() if server.port})
    yield from _shared("url", {key: server.url.rstrip("/") for key, server in servers.items() if server.url})
    logs: dict[str, str] = {}
    for key in servers:
        if (other := logs.setdefault(server_name(key), key)) != key:
            yield f"{other} and {key} would both write logs/{server_name(key)}.log; give one of them another name"
    for section, template in templates.items():
        for key, server in servers.items():
            if re.fullmatch(rf"{section}\.servers?(\.\d+)?", key) and server.dtype != template.dtype:
                yield (
                    f"{key}.dtype = {server.dtype} differs from {section}.server.dtype = {template.dtype}; expected "
                    f"one dtype for all of them: set {section}.server.dtype"
                )


def _shared(name: str, values: Mapping[str, object]) -> Iterator[str]:
    """Yield a problem for each value that two servers have."""
    first: dict[object, str] = {}
    for key, value in values.items():
        if value in first:
            shown = value[1] if isinstance(value, tuple) else value
            advice = "give them different ones or none" if name == "port" else "expected one server each"
            yield f"{first[value]}.{name} and {key}.{name} are both {shown}; {advice}"
        first.setdefault(value, key)


def _server(key: str, server: ServerConfig) -> Iterator[str]:
    if server.url is not None:
        if not re.match(r"https?://[^/]+", server.url):
            yield f"{key}.url: expected http://host:port or https://host, found {server.url!r}"
        given = [name for name in OF_A_START if getattr(server, name) != ServerConfig.model_fields[name].default]
        if given:
            no_effect = " and ".join(f"{key}.{name}" for name in given)
            yield f"{key}.url names a running server, so {no_effect} would have no effect; remove the url or the rest"
    default = ServerConfig.model_fields["hang_timeout_s"].default  # a short request_timeout_s may be below the default
    if server.hang_timeout_s > server.request_timeout_s and server.hang_timeout_s != default:
        yield (
            f"{key}.hang_timeout_s = {server.hang_timeout_s:g} is above {key}.request_timeout_s = "
            f"{server.request_timeout_s:g}, which would end first; lower it or raise that"
        )
    for argument in server.extra_args:
        flag = argument.partition("=")[0]
        if flag in MANAGED_SERVER_ARGS:
            yield f"{key}.extra_args: {flag} is set by {MANAGED_SERVER_ARGS[flag]}; remove it there"


def server_problems(config: Config) -> Iterator[str]:
    """Yield the problems of the GPUs and the memory of servers to start, as far as the configuration shows them."""
    for key, server in rollout_servers(config).items():
        if server.weights == "shared" and server.url is not None and _host(server.url) not in LOOPBACK:
            yield (
                f"{key}.weights=shared, but {key}.url={server.url} may be another machine; use broadcast, or name the "
                "server by 127.0.0.1"
            )
        if server.weights == "shared" and server.node > 0:
            yield f"{key}.weights=shared, but {key}.node={server.node} is another machine; use broadcast"
        yield from _weights_folder(key, server)
    for key, server in teacher_servers(config).items():
        for name in ("weights", "weights_folder"):
            if getattr(server, name) is not None:
                yield f"{key}.{name}: a teacher gets no weights from the trainer; remove it"
    for key, server in started_servers(config).items():
        yield from _gpus(key, server, config.platform.kind)
        if server.release_memory and config.platform.kind == "cpu":
            yield f"{key}.release_memory gives GPU memory back, and platform.kind=cpu; remove it"
        if server.release_memory and not is_rollout(key):
            yield f"{key}.release_memory: only a rollout server gives its memory back; remove it"
    if config.platform.kind == "cuda":
        for _, problem in budget_problems(config):
            yield problem


def _weights_folder(key: str, server: ServerConfig) -> Iterator[str]:
    folder = server.weights_folder
    if server.weights == "disk" and folder is None:
        yield f"{key}.weights=disk needs a folder that both machines see; set {key}.weights_folder"
    if server.weights != "disk" and folder is not None:
        yield f"{key}.weights_folder has no effect with {key}.weights={server.weights or 'null'}; remove it or set disk"
    if folder is not None and not folder.is_absolute():
        yield f"{key}.weights_folder = {folder}; expected an absolute path, which is the same on both machines"


def _gpus(key: str, server: ServerConfig, platform: str) -> Iterator[str]:
    if server.gpus is None:
        return
    given = f"{key}.gpus = {list(server.gpus)}"
    if platform == "cpu":
        yield f"{given} has no effect with platform.kind=cpu; remove it"
    if len(set(server.gpus)) < len(server.gpus):
        yield f"{given} names a GPU twice; expected different numbers"
    multiple = any(argument.startswith(MORE_GPUS) for argument in server.extra_args)
    fits = len(server.gpus) % server.tensor_parallel == 0 if multiple else len(server.gpus) == server.tensor_parallel
    if not server.gpus or not fits:
        expected = f"{'a multiple of ' if multiple else ''}{server.tensor_parallel} ({key}.tensor_parallel)"
        yield f"{given} names {len(server.gpus)} GPUs; expected {expected}"


def budget_problems(config: Config) -> Iterator[tuple[str, str]]:
    """Yield (section, problem) where a server to start on a GPU has no size, in a job that runs on GPUs.

    A server beside the trainer takes what it finds free. Two servers on one GPU need a number of tokens: the share of
    one would depend on what the other has taken.
    """
    started = started_servers(config)
    for key, server in started.items():
        if server.max_total_tokens is None and server.mem_fraction is None:
            yield (
                key,
                f"{key}: a server beside the trainer needs its size, found neither max_total_tokens nor mem_fraction; "
                f"set {key}.max_total_tokens (KV cache in tokens), or {key}.mem_fraction (share of the free memory)",
            )
    first: dict[tuple[int, int], str] = {}
    for key, server in started.items():
        for gpu in gpus_of(server):
            other = first.setdefault((server.node, gpu), key)
            sized = server.max_total_tokens is not None and started[other].max_total_tokens is not None
            if other != key and not sized:
                yield (
                    key,
                    f"{other} and {key} would both start on GPU {gpu}; give them different ones ({other}.gpus, "
                    f"{key}.gpus), or set max_total_tokens for both",
                )
                break
