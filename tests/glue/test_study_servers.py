"""The servers that the cells of a study share: which are started, when again, and how commands reach them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.glue.stubs import make_config
from tests.tiny_models import write_tiny_model
from tropd_mcore.config.derived import rollout_servers
from tropd_mcore.config.loader import load
from tropd_mcore.config.schema import Config
from tropd_mcore.errors import ServerDied
from tropd_mcore.study import server as server_module
from tropd_mcore.study.cell import _overrides
from tropd_mcore.study.server import KEY_VARIABLE, StudyServers


class Process:
    """A server that only records what is done to it."""

    made: list[Process]

    def __init__(self, spec: Any) -> None:
        self.spec, self.api_key = spec, spec.api_key
        self.url = f"http://127.0.0.1:{31000 + len(self.made)}"
        self.did: list[str] = []
        self.lives = True
        self.made.append(self)

    def start(self) -> None:
        self.did.append("start")

    def wait_ready(self) -> None:
        self.did.append("ready")

    def restart(self) -> None:
        self.did.append("restart")

    def stop(self) -> None:
        self.did.append("stop")

    def alive(self) -> bool:
        return self.lives


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Process]:
    Process.made = []
    monkeypatch.setattr(server_module, "ServerProcess", Process)
    return Process.made


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("student"))


MakeConfig = Callable[..., Config]


@pytest.fixture
def config_of(student: Path) -> MakeConfig:
    def make(*servers: dict[str, Any], **template: Any) -> Config:
        return make_config(student={"path": student}, rollout={"server": template, "servers": list(servers)})

    return make


def test_the_servers_of_a_machine_are_started_once_with_one_key(
    made: list[Process], tmp_path: Path, config_of: MakeConfig
) -> None:
    config = config_of({}, {"node": 1}, {"threads": 2})
    with StudyServers(tmp_path) as servers:
        reach = servers.running(config)
        assert servers.running(config) == reach and servers.lives()
    assert [process.did for process in made] == [["start", "ready", "stop"]] * 2
    assert [process.spec.config.threads for process in made] == [None, 2], "that of another node is left out"
    assert reach.urls == [process.url for process in made]
    assert {process.api_key for process in made} == {reach.environment[KEY_VARIABLE]} and made[0].api_key


def test_they_are_started_again_when_one_died_or_a_cell_has_other_settings(
    made: list[Process], tmp_path: Path, config_of: MakeConfig
) -> None:
    with StudyServers(tmp_path) as servers:
        servers.running(config_of({}, {}))
        made[1].lives = False
        assert not servers.lives()
        servers.running(config_of({}, {}))
        assert [process.did[-1] for process in made] == ["stop", "stop", "ready", "ready"]
        servers.running(config_of({}, {}, max_total_tokens=4096))
        assert len(made) == 6


def test_every_server_gets_the_weights_of_an_evaluation_also_one_that_died(
    made: list[Process], tmp_path: Path, config_of: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[Process, Path]] = []

    def publish(_self: StudyServers, process: Any, folder: Path) -> None:
        sent.append((process, folder))
        if len(sent) == 2:
            raise ServerDied("gone")

    monkeypatch.setattr(StudyServers, "_publish", publish)
    with StudyServers(tmp_path) as servers:
        servers.holding(tmp_path, config_of({}, {}))
    assert [process for process, _ in sent] == [made[0], made[1], made[1]]
    assert "restart" in made[1].did and "restart" not in made[0].did


@pytest.mark.parametrize("entries", [[], [{}, {"max_retries": 3, "threads": 2, "port": 31999}]])
def test_a_run_reads_the_overrides_as_running_servers(
    made: list[Process], student: Path, tmp_path: Path, entries: list[dict[str, Any]]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "run: {dir: nowhere, steps: 4}\nteacher: {path: teacher}\ndata: {prompts: prompts.jsonl}\n"
        f"student: {{path: {student}}}\nobjective: {{kind: opd}}\n"
        f"rollout: {{server: {{max_retries: 7, threads: 1}}, servers: {json.dumps(entries)}}}\n"
    )
    config, _ = load(path, [])
    with StudyServers(tmp_path) as servers:
        found, _ = load(path, _overrides(servers.running(config)))
    running = list(rollout_servers(found).values())
    assert [server.url for server in running] == [process.url for process in made]
    assert [server.max_retries for server in running] == [7, 3][: len(running)]
    assert all(server.api_key_env == KEY_VARIABLE and server.threads is server.port is None for server in running)
