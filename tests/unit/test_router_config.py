"""rollout.router in the configuration: each wrong combination gives one line that names the keys to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_fleet_config import loaded, problems
from tropd_mcore.config.plan import plan
from tropd_mcore.config.router_checks import MANAGED_ROUTER_ARGS
from tropd_mcore.errors import ServerError
from tropd_mcore.serving.router import key_of_fleet
from tropd_mcore.train.preflight_machine import api_keys

URLS = [{"url": "http://a:1"}, {"url": "http://b:2"}]


def text_of(folder: Path, rollout: dict[str, Any]) -> str:
    (line,) = problems(folder, rollout)
    return line


@pytest.mark.parametrize(
    "rollout",
    [
        {"servers": [{}, {}], "router": {}},
        {"servers": [{}, *URLS], "router": {"policy": "cache_aware", "extra_args": ["--cache-threshold", "0.5"]}},
        {"servers": URLS, "router": {"url": "https://r"}},
        {"servers": [{**each, "api_key_env": "K"} for each in URLS], "router": {"url": "http://r", "api_key_env": "K"}},
        {"servers": [{**URLS[0], "api_key_env": "K"}, URLS[1], {}], "router": {"extra_args": ["--prometheus-port=9"]}},
    ],
)
def test_a_router_that_knows_and_reaches_its_servers_is_accepted(tmp_path: Path, rollout: dict[str, Any]) -> None:
    config, _ = loaded(tmp_path, rollout)
    assert config.rollout.router is not None


def test_a_router_needs_a_fleet(tmp_path: Path) -> None:
    assert "stands before the servers of rollout.servers, found none" in text_of(tmp_path, {"router": {}})


def test_a_running_router_has_no_keys_of_a_start_and_a_started_one_no_key_of_its_own(tmp_path: Path) -> None:
    given = text_of(
        tmp_path, {"servers": URLS, "router": {"url": "http://r", "policy": "random", "extra_args": ["-x"]}}
    )
    assert "rollout.router.{policy,extra_args} would have no effect" in given
    named = text_of(tmp_path, {"servers": URLS, "router": {"api_key_env": "K"}})
    assert "rollout.router.api_key_env=K: a router that the job starts has the key of its servers" in named
    assert "rollout.router.url: expected http://host:port" in text_of(
        tmp_path, {"servers": URLS, "router": {"url": "r:1"}}
    )


def test_a_router_cannot_know_or_reach_every_server(tmp_path: Path) -> None:
    unknown = text_of(tmp_path, {"servers": [URLS[0], {}], "router": {"url": "http://r"}})
    assert "cannot know rollout.servers.1, which the job starts on a free port" in unknown
    same = text_of(tmp_path, {"servers": URLS, "router": {"url": "http://a:1/"}})
    assert same.startswith("rollout.servers.0.url is that of rollout.router.url")


def test_servers_behind_a_router_have_one_key(tmp_path: Path) -> None:
    servers = [{**URLS[0], "api_key_env": "ONE"}, {**URLS[1], "api_key_env": "TWO"}]
    line = text_of(tmp_path, {"servers": servers, "router": {}})
    assert line.startswith("rollout.servers.0.api_key_env = ONE and rollout.servers.1.api_key_env = TWO: ")
    assert "need one key" in line
    assert "rollout.router.api_key_env = THREE" in text_of(
        tmp_path, {"servers": servers[:1], "router": {"url": "http://r", "api_key_env": "THREE"}}
    )


@pytest.mark.parametrize("argument", [*MANAGED_ROUTER_ARGS, "--po", "--no-worker-auto-recovery", "--api-key=secret"])
def test_an_argument_that_another_key_sets_is_refused_also_by_its_beginning(tmp_path: Path, argument: str) -> None:
    line = text_of(tmp_path, {"servers": [{}, {}], "router": {"extra_args": [argument]}})
    assert line.startswith("rollout.router.extra_args: --") and line.endswith("; remove it there")
    assert "secret" not in line


def test_an_unknown_policy_and_an_unknown_key_are_refused(tmp_path: Path) -> None:
    assert "rollout.router.policy" in text_of(tmp_path, {"servers": [{}, {}], "router": {"policy": "power_of_two"}})
    assert "did you mean" in text_of(tmp_path, {"servers": [{}, {}], "router": {"polcy": "random"}})


def test_a_router_is_given_up_before_the_run(tmp_path: Path) -> None:
    line = text_of(tmp_path, {"servers": [{}, {}], "router": {"start_timeout_s": 1e6}})
    assert "rollout.router.start_timeout_s = 1e+06 must be below run.stall_timeout_s" in line


def test_the_plan_names_the_router(tmp_path: Path) -> None:
    config, _ = loaded(tmp_path, {"servers": [{}, {}], "router": {}})
    assert "behind a router (round_robin)" in str(plan(config))


def test_the_key_of_a_fleet_is_that_of_its_running_servers_and_random_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(rollout: dict[str, Any]) -> str | None:
        config, _ = loaded(tmp_path, rollout)
        assert config.rollout.router is not None
        return key_of_fleet(
            config.rollout.router, {f"rollout.servers.{i}": each for i, each in enumerate(config.rollout.servers)}
        )

    started = {"servers": [{}, {}], "router": {}}
    first, second = key(started), key(started)
    assert first is not None and len(first) >= 43 and first != second
    named = {"servers": [{}, {**URLS[1], "api_key_env": "K_OF_TEST"}], "router": {}}
    with pytest.raises(ServerError, match="rollout.servers.1.api_key_env=K_OF_TEST: .* is unset or empty"):
        key(named)
    monkeypatch.setenv("K_OF_TEST", "word")
    assert key(named) == "word"
    assert key({"servers": URLS, "router": {"url": "http://r"}}) is None


def test_a_launch_without_the_routers_key_is_refused(tmp_path: Path) -> None:
    config, _ = loaded(tmp_path, {"servers": URLS, "router": {"url": "http://r", "api_key_env": "K"}})
    assert [fault.key for fault in api_keys(config, {})] == ["rollout.router.api_key_env"]
    assert list(api_keys(config, {"K": "x"})) == []
