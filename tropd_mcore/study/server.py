"""One rollout server for all cells of a student's folder, in place of one for training and one for evaluation per cell.

This module does not sample. A job publishes its own weights to the server; for an evaluation they are published here,
and `tropd eval` compares what the server computes with the folder. Invariant: a server that died is started again. Only
the drawn random numbers differ from those of a fresh server, because every update of the weights drops the cache.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from tropd_mcore.config.schema import Config
from tropd_mcore.errors import ServerDied
from tropd_mcore.mcore.platform import meant
from tropd_mcore.rollout.publisher import WeightPublisher
from tropd_mcore.rollout.served_tokenizer import server_spec
from tropd_mcore.serving.process import ServerProcess
from tropd_mcore.serving.record import free_name
from tropd_mcore.weights.hf_folder import HfReader

log = logging.getLogger(__name__)

KEY_VARIABLE = "TROPD_STUDY_KEY"
"""Variable in which the commands of a cell find the server's key."""


@dataclass(frozen=True)
class Address:
    """How a command reaches the server."""

    url: str
    environment: dict[str, str]


class StudyServer:
    """The server that the cells share. As a context manager, it stops the server at the end."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._process: ServerProcess | None = None
        self._made_for: tuple[str, str] | None = None
        self._updates = 0

    def running(self, config: Config) -> Address:
        """Return the address of a server for the student of `config`, with any weights.

        The server is started if there is none, if the last cell's student or server settings were others, or if it
        died. Raises ServerError.
        """
        meant_for = str(config.student.path), config.rollout.server.model_dump_json()
        if self._process is not None and (self._made_for != meant_for or not self._process.alive()):
            self.stop()
        if self._process is None:
            self._start(config)
            self._made_for = meant_for
        assert self._process is not None
        return Address(self._process.url, {KEY_VARIABLE: self._process.api_key})

    def holding(self, folder: Path, config: Config) -> Address:
        """Return the address as `running` does, after the weights in `folder` were sent to the server."""
        address = self.running(config)
        assert self._process is not None
        try:
            self._publish(folder)
        except ServerDied as died:
            log.warning("%s; starting it again", died)
            self._process.restart()
            self._publish(folder)
        return address

    def lives(self) -> bool:
        """Return whether the server's process runs."""
        return self._process is not None and self._process.alive()

    def _start(self, config: Config) -> None:
        spec = server_spec(
            free_name(self._logs, "study"),
            key="rollout.server",
            model_key="student.path",
            model=config.student.path,
            dtype=config.student.dtype,
            config=config.rollout.server,
            device=meant(config.platform.kind),
            logs=self._logs,
            title="the study's rollout server",
        )
        self._process = ServerProcess(spec)
        self._process.start()
        self._process.wait_ready()

    def _publish(self, folder: Path) -> None:
        assert self._process is not None
        client = self._process.client()
        client.resume()  # a command that was killed during an update leaves the server paused
        self._updates += 1
        with HfReader(folder) as reader:
            tensors = {name: reader.tensor(name) for name in reader.names()}
        plan = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
        WeightPublisher(client, plan).publish(iter(tensors.items()), f"study/{self._updates:06d}")

    def stop(self) -> None:
        """Stop the server, if there is one."""
        if self._process is not None:
            self._process.stop()
            self._process = None

    def __enter__(self) -> StudyServer:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()
