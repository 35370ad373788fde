"""What a launch and `tropd doctor` say about rollout.router, before anything is started."""

from __future__ import annotations

import venv
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.http_server import serving
from tests.unit.test_fleet_config import loaded
from tropd_mcore.cli.checks_of_config import servers
from tropd_mcore.config.schema import Config
from tropd_mcore.train.preflight_machine import packages, router_problem


def config_with(folder: Path, router: dict[str, Any], *urls: str) -> Config:
    entries = [{"url": url} for url in urls] or [{}, {}]
    return loaded(folder, {"server": {"max_retries": 0}, "servers": entries, "router": router})[0]


def test_a_launch_whose_interpreter_has_no_router_is_refused_with_the_way_to_install_it(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    python = tmp_path / "bare" / "bin" / "python"
    config = config_with(tmp_path, {"python": str(python)})
    (fault,) = [fault for fault in packages(config, {}) if fault.key == "rollout.router"]
    assert fault.text.endswith(f"run `{python} -m pip install smg==1.13.0`, or name another one")


def test_a_launch_that_starts_no_router_needs_none(tmp_path: Path) -> None:
    assert router_problem(config_with(tmp_path, {"url": "http://r"}, "http://a", "http://b")) is None
    replayed, _ = loaded(tmp_path, {"servers": [{}, {}], "router": {"python": "/nothing"}}, "run.replay=/rollouts")
    assert router_problem(replayed) is None
    assert "/nothing: not found" in str(router_problem(config_with(tmp_path, {"python": "/nothing"})))


def test_doctor_compares_a_running_router_with_the_fleet(tmp_path: Path) -> None:
    listed: list[dict[str, object]] = []

    async def workers(_: web.Request) -> web.Response:
        return web.json_response({"workers": listed})

    async def well(_: web.Request) -> web.Response:
        return web.Response()

    def app() -> web.Application:
        made = web.Application()
        made.router.add_get("/workers", workers)
        made.router.add_get("/health", well)
        return made

    with serving(app) as url, serving(app) as server:
        config = config_with(tmp_path, {"url": url}, server)
        (wrong,) = [each for each in servers(config) if each.name == "rollout.router"]
        assert wrong.level == "FAIL" and f"{server} is missing" in wrong.detail
        listed.append({"id": "a", "url": server, "is_healthy": True})
        (right,) = [each for each in servers(config) if each.name == "rollout.router"]
        assert right.level == "ok" and "has exactly the servers of rollout.servers" in right.detail
    (gone,) = [each for each in servers(config) if each.name == "rollout.router"]
    assert gone.level == "FAIL" and "no connection" in gone.detail
