"""Checks of the servers that a job starts: which GPUs they get, and that their share of the memory is given.

Other keys of a server section are checked in `checks`. Invariant: each check returns its problems, one line each, with
the keys to change; nothing is raised.
"""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

from tropd_mcore.config.derived import started_servers
from tropd_mcore.config.schema import Config, ServerConfig

MORE_GPUS = ("--pp", "--pipeline-parallel", "--dp", "--data-parallel")
"""Prefixes of server arguments with which a server takes a multiple of `tensor_parallel` GPUs."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Names of this machine's own addresses in a url."""


def _host(url: str) -> str | None:
    """The host of a url; None if it is malformed, which another check reports."""
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def gpus_of(server: ServerConfig) -> tuple[int, ...]:
    """Return the GPUs of a server to start, counted among those that the launch sees."""
    return server.gpus if server.gpus is not None else tuple(range(server.tensor_parallel))


def server_problems(config: Config) -> Iterator[str]:
    """Yield the problems of the GPUs and the memory of servers to start, as far as the configuration shows them."""
    server = config.rollout.server
    if server.weights == "shared" and server.url is not None and _host(server.url) not in LOOPBACK:
        yield (
            f"rollout.server.weights=shared, but rollout.server.url={server.url} may be another machine; use "
            "broadcast, or name the server by 127.0.0.1"
        )
    if config.teacher.server.weights is not None:
        yield "teacher.server.weights: a teacher gets no weights from the trainer; remove it"
    for key, server in started_servers(config).items():
        yield from _gpus(key, server, config.platform.kind)
        if server.release_memory and config.platform.kind == "cpu":
            yield f"{key}.release_memory gives GPU memory back, and platform.kind=cpu; remove it"
        if server.release_memory and key != "rollout.server":
            yield f"{key}.release_memory: only rollout.server gives its memory back; remove it"
    if config.platform.kind == "cuda":
        for _, problem in budget_problems(config):
            yield problem


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
    shared = set.intersection(*(set(gpus_of(server)) for server in started.values())) if len(started) > 1 else set()
    if shared and any(server.max_total_tokens is None for server in started.values()):
        first, second = started
        yield (
            second,
            f"{first} and {second} would both start on GPU {min(shared)}; give them different ones ({first}.gpus, "
            f"{second}.gpus), or set max_total_tokens for both",
        )
