"""The name of a run: drawn at the first accepted launch, kept by every later one, carried by the checkpoints."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.glue.contexts import config_of, context_of
from tests.glue.stubs import one_rank
from tests.tiny_models import write_tiny_model
from tropd_mcore.errors import DataError
from tropd_mcore.mcore.checkpoint_info import step_folder
from tropd_mcore.mcore.parallel import Layout
from tropd_mcore.records.run_dir import RunDir
from tropd_mcore.train import trainer
from tropd_mcore.train.inputs import read_inputs
from tropd_mcore.train.start import Start, accept, compare_contents, make_start, open_launch


@pytest.fixture
def layout() -> Iterator[Layout]:
    with one_rank() as layout:
        yield layout


def started(context: Any) -> Start:
    opened = open_launch(context)
    inputs = compare_contents(context, opened, read_inputs(context))
    return make_start(context, opened, inputs, defaultdict(lambda: "test"))


def test_the_run_name_is_drawn_once_and_stored_only_by_an_accepted_launch(layout: Layout, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m", num_hidden_layers=1)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"id": "a", "prompt": "add"}) + "\n")
    context = context_of(config_of(tmp_path / "run", folder, data={"prompts": prompts}), layout)
    context.run_dir.root.mkdir()
    first = started(context)
    assert context.run_dir.recorded_id() is None
    assert started(context).run != first.run
    accept(context, first, date(2024, 2, 29))
    assert context.run_dir.recorded_id() == first.run == started(context).run
    assert len(first.run) == 12


def test_a_recorded_run_name_is_never_replaced(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    for name in ("first", "second"):
        run_dir.record_id(name)
    assert run_dir.recorded_id() == "first"
    run_dir.run_id.write_text("\n")
    assert run_dir.recorded_id() is None


def test_a_run_name_that_cannot_be_written_gives_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot write"):
        RunDir(tmp_path / "file").record_id("a-run")


def test_a_checkpoint_without_its_json_is_skipped_with_a_warning(
    layout: Layout, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_tiny_model(tmp_path / "m", num_hidden_layers=1)
    context = context_of(config_of(tmp_path / "run", folder), layout)
    step_folder(context.run_dir.checkpoints, 3).mkdir(parents=True)
    (context.run_dir.checkpoints / "step_000002.damaged").mkdir()
    caplog.set_level(logging.WARNING)
    assert open_launch(context).checkpoint is None
    (line,) = [line for line in caplog.messages if "tropd.json" in line]
    assert "step_000003" in line


def test_checkpoints_are_written_with_the_name_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(trainer, "save", lambda *_, **settings: given.update(settings))
    run_dir = RunDir(tmp_path)
    run_dir.record_id("a-run")
    with one_rank() as layout:
        config = config_of(tmp_path, tmp_path, run={"checkpoint_every": 1})
        parts: Any = SimpleNamespace(
            config=config,
            layout=layout,
            run_dir=run_dir,
            student=None,
            optimizer=None,
            scheduler=None,
            average=None,
            teacher_check=None,
            sampler_bounds=None,
            phases=None,
        )
        trainer.Trainer(parts, first_step=0, last_step=2).keep(0)
    assert given["run"] == "a-run"
