"""A stand-in for a teacher server, for the identity check: its description of itself and its scores of a text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.glue.stubs import make_config
from tropd_mcore.config.schema import Config
from tropd_mcore.errors import ServerDied
from tropd_mcore.serving.wire import ScoringRequest, ServerInfo, WeightChecksums

URL = "http://elsewhere:1"


@dataclass
class Served:
    """A server and its client in one. It scores with `logp` and describes itself as the test sets it."""

    logp: np.ndarray
    label: str = "default"
    model_path: str = "somewhere"
    model_type: str = "qwen3"
    dtype: str = "float32"
    quantization: str | None = None
    device: str = "cpu"
    tensor_parallel: int = 1
    checksum: str | None = "aaaaaaaaaaaaaaaa"
    url: str = URL
    faults: list[Exception | None] = field(default_factory=list)
    """Errors that `info` raises, one after the other."""
    asked: list[str] = field(default_factory=list)
    restarted: Callable[[], None] | None = None
    """Attributes that a restart changes."""
    after_restart: Callable[[], None] | None = None
    spec: Any = field(default_factory=lambda: SimpleNamespace(key="teacher.server"))
    is_kept_elsewhere: bool = False

    @property
    def client(self) -> Served:
        return self

    def info(self) -> ServerInfo:
        self.asked.append("info")
        fault = self.faults.pop(0) if self.faults else None
        if fault is not None:
            raise fault
        return ServerInfo(
            version="0.5.23",
            weight_version=self.label,
            tensor_parallel=self.tensor_parallel,
            longest_input=500,
            longest_sequence=505,
            model_path=self.model_path,
            model_type=self.model_type,
            dtype=self.dtype,
            quantization=self.quantization,
            device=self.device,
        )

    def weights_checksum(self, *, may_refuse: bool = False) -> WeightChecksums | None:
        assert may_refuse, "a teacher need not take weights"
        self.asked.append("checksum")
        return WeightChecksums(self.checksum, {}) if self.checksum is not None else None

    def score(self, requests: list[ScoringRequest]) -> list[Any]:
        self.asked.append("score")
        (request,) = requests
        assert request.first == 1
        return [SimpleNamespace(logp_N=self.logp[: len(request.token_ids) - 1])]

    def recover(self, died: ServerDied) -> None:
        self.asked.append("recover")
        if self.restarted is None:
            raise died
        self.restarted()
        if self.after_restart is not None:
            self.after_restart()


def config_of(folders: dict[str, Path], run_dir: Path, **changes: Any) -> Config:
    sections: dict[str, Any] = {
        "student": {"path": folders["student"]},
        "teacher": {"kind": "sglang", "path": folders["teacher"], "check_every": 3, "server": {"url": URL}},
    }
    for name, section in changes.items():
        sections[name] = sections.get(name, {}) | section
    return make_config(run_dir, **sections)
