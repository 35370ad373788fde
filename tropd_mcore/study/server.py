"""Rollout servers for all cells of a student's folder, in place of those for training and for evaluation of each cell.

This module does not sample. A job publishes its own weights to the servers; for an evaluation they are published here,
and `tropd eval` compares what a server computes with the folder. Invariant: servers that died are started again. Only
the drawn random numbers differ from those of fresh servers, because every update of the weights drops the cache.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tropd_mcore.config.derived import of_first_node, rollout_servers
from tropd_mcore.config.schema import Config, ServerConfig
from tropd_mcore.config.server_section import OF_A_START
from tropd_mcore.errors import ServerDied
from tropd_mcore.mcore.platform import meant
from tropd_mcore.rollout.publisher import WeightPublisher
from tropd_mcore.rollout.served_tokenizer import server_spec
from tropd_mcore.serving.process import ServerProcess
from tropd_mcore.serving.record import free_name
from tropd_mcore.weights.hf_folder import HfReader

log = logging.getLogger(__name__)

KEY_VARIABLE = "TROPD_STUDY_KEY"
"""Variable in which the commands of a cell find the servers' key."""
CHANGED = ("url", "api_key_env", *OF_A_START)
"""Keys in which a section that names a running server differs from the one that starts it."""


@dataclass(frozen=True)
class Reach:
    """How a command reaches the servers."""

    servers: tuple[ServerConfig, ...]
    """With the url of each, and without what says how one is started"""
    environment: dict[str, str]

    @property
    def urls(self) -> list[str]:
        return [server.url for server in self.servers if server.url is not None]


class StudyServers:
    """The servers that the cells share. As a context manager, it stops them at the end."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._processes: list[ServerProcess] = []
        self._made_for: tuple[str, str] | None = None
        self._updates = 0

    def running(self, config: Config) -> Reach:
        """Return how to reach the servers for the student of `config`, with any weights.

        They are started if there are none, if the last cell's student or server settings were others, or if one died.
        Raises ServerError.
        """
        wanted = _of_this_machine(config)
        meant_for = str(config.student.path), json.dumps([server.model_dump(mode="json") for server in wanted])
        if self._processes and (self._made_for != meant_for or not self.lives()):
            self.stop()
        if not self._processes:
            self._start(config, wanted)
            self._made_for = meant_for
        return Reach(
            tuple(_at(server, process.url) for server, process in zip(wanted, self._processes, strict=True)),
            {KEY_VARIABLE: self._processes[0].api_key},
        )

    def holding(self, folder: Path, config: Config) -> Reach:
        """Return what `running` does, after the weights in `folder` were sent to the servers."""
        reach = self.running(config)
        for process in self._processes:
            try:
                self._publish(process, folder)
            except ServerDied as died:
                log.warning("%s; starting it again", died)
                process.restart()
                self._publish(process, folder)
        return reach

    def lives(self) -> bool:
        """Return whether the processes of all servers run."""
        return bool(self._processes) and all(process.alive() for process in self._processes)

    def _start(self, config: Config, wanted: Sequence[ServerConfig]) -> None:
        key = secrets.token_urlsafe(32)
        for place, server in enumerate(wanted):
            several = len(wanted) > 1
            title = f"the study's rollout server{f', {place + 1} of {len(wanted)}' if several else ''}"
            spec = server_spec(
                free_name(self._logs, f"study-{place}" if several else "study"),
                key="rollout.server",
                model_key="student.path",
                model=config.student.path,
                dtype=config.student.dtype,
                config=server,
                device=meant(config.platform.kind),
                logs=self._logs,
                title=title,
            )
            self._processes.append(ServerProcess(replace(spec, api_key=key)))
            self._processes[-1].start()
        for process in self._processes:
            process.wait_ready()

    def _publish(self, process: ServerProcess, folder: Path) -> None:
        client = process.client()
        client.resume()  # a command that was killed during an update leaves the server paused
        self._updates += 1
        with HfReader(folder) as reader:
            tensors = {name: reader.tensor(name) for name in reader.names()}
        plan = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
        WeightPublisher(client, plan).publish(iter(tensors.items()), f"study/{self._updates:06d}")

    def stop(self) -> None:
        """Stop the servers, if there are any."""
        processes, self._processes = self._processes, []
        for process in processes:
            process.stop()

    def __enter__(self) -> StudyServers:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()


def _of_this_machine(config: Config) -> list[ServerConfig]:
    """The rollout servers of a cell that belong on one machine: those of its first node."""
    return of_first_node(rollout_servers(config).values()) or [config.rollout.server.model_copy(update={"node": 0})]


def _at(server: ServerConfig, url: str) -> ServerConfig:
    """The settings of the running server."""
    defaults = {name: ServerConfig.model_fields[name].get_default(call_default_factory=True) for name in OF_A_START}
    return server.model_copy(update={**defaults, "url": url, "api_key_env": KEY_VARIABLE})
