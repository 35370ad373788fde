"""Checks of the router section against itself and against the servers that stand behind the router.

Invariant: each problem is one line with the keys to change; nothing is raised.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from tropd_mcore.config.derived import rollout_servers
from tropd_mcore.config.router_section import OF_A_ROUTERS_START, RouterConfig
from tropd_mcore.config.schema import Config

KEY = "rollout.router"

MANAGED_ROUTER_ARGS = {
    "--host": "the loopback address of the started router",
    "--port": "a free port that the OS chooses",
    "--prometheus-host": "the loopback address of the started router",
    "--worker-urls": "rollout.servers",
    "--policy": "rollout.router.policy",
    "--api-key": "the key of the servers",
    "--tenant-api-key": "the key of the servers",
    "--control-plane-api-keys": "the key of the servers",
    "--jwt-issuer": "the key of the servers",
    "--request-timeout-secs": "rollout.server.request_timeout_s",
    "--worker-startup-timeout-secs": "rollout.router.start_timeout_s",
    "--worker-startup-check-interval": "rollout.router.start_timeout_s",
    "--disable-retries": "rollout.server.max_retries: the job repeats requests itself and counts that",
    "--retry-max-retries": "rollout.server.max_retries: the job repeats requests itself and counts that",
    "--disable-health-check": "rollout.server.hang_timeout_s: the job watches its servers itself",
    "--health-check-endpoint": "rollout.server.hang_timeout_s: the job watches its servers itself",
    "--remove-unhealthy-workers": "rollout.server.hang_timeout_s: the job watches its servers itself",
    "--worker-auto-recovery": "rollout.server.hang_timeout_s: the job watches its servers itself",
    "--disable-tokenizer-autoload": "requests of tokens alone: the router needs no tokenizer",
    "--model-path": "requests of tokens alone: the router needs no tokenizer",
    "--tokenizer-path": "requests of tokens alone: the router needs no tokenizer",
    "--service-discovery": "rollout.servers",
    "--discovery-provider": "rollout.servers",
    "--discovery-file": "rollout.servers",
    "--pd-disaggregation": "servers that both read prompts and sample",
    "--epd-disaggregation": "servers that both read prompts and sample",
    "--prefill": "servers that both read prompts and sample",
    "--decode": "servers that both read prompts and sample",
    "--enable-igw": "one model, the student",
    "--enable-rl": "the job: it asks the servers directly for everything but samples",
    "--enable-mesh": "one router: a mesh listens on all interfaces and asks for no key",
    "--enable-trace": "the job: a router reports to no other host",
    "--otlp-traces-endpoint": "the job: a router reports to no other host",
    "--health-check-port": "the port of the router: it answers /health there",
    "--log-dir": "the log of the router in <run.dir>/logs",
    "--tls-cert-path": "the loopback address of the started router",
    "--tls-key-path": "the loopback address of the started router",
    "--upstream-http2": "HTTP/1.1, which SGLang speaks",
    "--backend": "SGLang",
}
"""Arguments of the router that must not be in extra_args -> the key or value that sets them."""


def router_problems(config: Config) -> Iterator[str]:
    """Yield the problems of rollout.router."""
    router = config.rollout.router
    if router is None:
        return
    if not config.rollout.servers:
        yield f"{KEY}: a router stands before the servers of rollout.servers, found none; name them, or remove {KEY}"
    yield from _url(router)
    yield from _reach(config, router)
    yield from _keys(config, router)
    for argument in router.extra_args:
        flag = argument.partition("=")[0]
        managed = _managed(flag)
        if managed is not None:
            yield f"{KEY}.extra_args: {flag} is set by {MANAGED_ROUTER_ARGS[managed]}; remove it there"


def _url(router: RouterConfig) -> Iterator[str]:
    if router.url is None:
        if router.api_key_env is not None:
            yield (
                f"{KEY}.api_key_env={router.api_key_env}: a router that the job starts has the key of its servers; "
                f"remove it, or set {KEY}.url"
            )
        return
    if not re.match(r"https?://[^/]+", router.url):
        yield f"{KEY}.url: expected http://host:port or https://host, found {router.url!r}"
    given = [name for name in OF_A_ROUTERS_START if getattr(router, name) != RouterConfig.model_fields[name].default]
    if given:
        yield f"{KEY}.url names a running router, so {KEY}.{{{','.join(given)}}} would have no effect; remove one"


def _reach(config: Config, router: RouterConfig) -> Iterator[str]:
    """Yield the servers that the router cannot know or reach."""
    for key, server in rollout_servers(config).items():
        if server.url is not None:
            if router.url is not None and server.url.rstrip("/") == router.url.rstrip("/"):
                yield f"{key}.url is that of {KEY}.url; expected the server's own, to which its weights are sent"
        elif router.url is not None:
            yield (
                f"{KEY}.url names a running router, which cannot know {key}, which the job starts on a free port; give "
                f"every server of rollout.servers a url, or remove {KEY}.url"
            )


def _keys(config: Config, router: RouterConfig) -> Iterator[str]:
    """Yield the first two keys that differ: a router passes the caller's key on, so there can be only one."""
    named = {
        f"{key}.api_key_env": server.api_key_env
        for key, server in rollout_servers(config).items()
        if server.url is not None and server.api_key_env is not None
    }
    if router.url is not None and router.api_key_env is not None:
        named[f"{KEY}.api_key_env"] = router.api_key_env
    for key, variable in named.items():
        first, expected = next(iter(named.items()))
        if variable != expected:
            yield (
                f"{first} = {expected} and {key} = {variable}: a router passes the caller's key on to the server that "
                "it chooses, so all servers behind it need one key; start them with the same key and name one variable"
            )
            return


def _managed(flag: str) -> str | None:
    """The managed argument that `flag` is, or that the router would take it for, because it accepts beginnings."""
    bare = f"--{flag.removeprefix('--no-')}" if flag.startswith("--no-") else flag
    if not bare.startswith("--") or bare == "--":
        return None
    if bare in MANAGED_ROUTER_ARGS:
        return bare
    return next((name for name in MANAGED_ROUTER_ARGS if name.startswith(bare)), None)
