"""Launches of one run directory over real, tiny model folders, up to their first step."""

from __future__ import annotations

import json
import logging
import shutil
from collections import defaultdict
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from tests.glue.contexts import config_of, context_of
from tests.tiny_models import write_tiny_model
from tropd_mcore.config.schema import Config
from tropd_mcore.errors import ConfigError
from tropd_mcore.mcore.checkpoint_info import INFO_FILE, step_folder
from tropd_mcore.mcore.parallel import Layout
from tropd_mcore.records.run_dir import RunDir
from tropd_mcore.train.components import JobContext
from tropd_mcore.train.inputs import read_inputs
from tropd_mcore.train.replayed_run import check_replayed
from tropd_mcore.train.start import Start, accept, compare_contents, make_start, open_launch

SOURCES: dict[str, str] = defaultdict(lambda: "test")
DAY = date(2024, 2, 29)
"""That of every launch."""


def write_models(root: Path) -> Path:
    """A student and a teacher under `root`."""
    for seed, name in enumerate(("student", "teacher")):
        write_tiny_model(root / name, num_hidden_layers=1, seed=seed)
    return root


def copy_inputs(models: Path, root: Path) -> None:
    """The files that a run over `root` reads: the models, three prompts, three responses."""
    for name in ("student", "teacher"):
        shutil.copytree(models / name, root / name)
    for name in ("prompts", "responses"):
        lines = [json.dumps({"id": f"p{index}", name: "text"}) for index in range(3)]
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def compared(context: JobContext) -> Start:
    """The start of a launch, after comparing its configuration and contents with the records. Collective."""
    opened = open_launch(context)
    inputs = compare_contents(context, opened, read_inputs(context))
    check_replayed(context.config, inputs)
    return make_start(context, opened, inputs, SOURCES)


@dataclass
class Runs:
    """Launches of one run directory over real model folders."""

    root: Path
    layout: Layout
    caplog: pytest.LogCaptureFixture

    @property
    def run_dir(self) -> RunDir:
        return RunDir(self.root / "run")

    def config(self, **sections: Any) -> Config:
        merged = {
            "student": {"path": self.root / "student"},
            "teacher": {"path": self.root / "teacher"},
            "data": {"prompts": self.root / "prompts.jsonl"},
        }
        for name, section in sections.items():
            merged[name] = section if name == "objective" else merged.get(name, {}) | section
        run_dir = merged.get("run", {}).pop("dir", self.run_dir.root)
        return config_of(run_dir, self.root / "student", **merged)

    def compare(self, **sections: Any) -> tuple[Any, Start]:
        """A launch up to its first step, which may be refused."""
        context = context_of(self.config(**sections), self.layout)
        return context, compared(context)

    def launch(self, **sections: Any) -> list[str]:
        """A launch that is accepted. Returns the lines that it printed about the run directory."""
        self.caplog.clear()
        with self.caplog.at_level(logging.WARNING):
            context, start = self.compare(**sections)
            accept(context, start, DAY)
        return [message.removeprefix(f"{context.run_dir.root}: ") for message in self.caplog.messages]

    def refuse(self, **sections: Any) -> list[str]:
        """The lines of a launch that is refused. Asserts that both records are unchanged."""
        before = self.records()
        with pytest.raises(ConfigError) as caught:
            self.compare(**sections)
        assert self.records() == before
        return caught.value.problems

    def records(self) -> list[bytes]:
        return [path.read_bytes() for path in (self.run_dir.config, self.run_dir.inputs) if path.exists()]

    def sampled(self) -> Runs:
        """Create the rollouts of the first step."""
        self.run_dir.rollouts(0).parent.mkdir(parents=True, exist_ok=True)
        self.run_dir.rollouts(0).touch()
        return self

    def checkpoint(self, step: int = 2) -> Path:
        folder = step_folder(self.run_dir.checkpoints, step)
        folder.mkdir(parents=True)
        (folder / INFO_FILE).write_text("{}")
        return folder


def edit(path: Path) -> None:
    """Another content of the same length."""
    content = path.read_bytes()
    path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])


def append(path: Path) -> None:
    path.write_text(path.read_text() + '{"id": "p9"}\n')


def swap_two_tokens(folder: Path) -> None:
    """The same words as before, with the ids of two of them swapped."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary: dict[str, int] = content["model"]["vocab"]
    first, second = sorted(vocabulary, key=lambda token: vocabulary[token])[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(content))
