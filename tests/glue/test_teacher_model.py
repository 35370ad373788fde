"""How the frozen models of a job are built: each with the keys of its own section."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.glue.contexts import config_of, context_of
from tests.glue.stubs import one_rank
from tests.tiny_models import write_tiny_model
from tropd_mcore.config.plan import plan
from tropd_mcore.train import components


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keywords of each model that is built."""
    calls: list[dict[str, Any]] = []

    def build(*_: object, **keywords: Any) -> dict[str, Any]:
        calls.append(keywords)
        return keywords

    monkeypatch.setattr(components, "build_model", build)
    monkeypatch.setattr(components, "offloaded", lambda model: ("offloaded", model))
    monkeypatch.setattr(components, "load_hf", lambda *_: None)
    return calls


def test_only_the_teacher_is_cut_as_its_key_says(built: list[dict[str, Any]], tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m", num_hidden_layers=1)
    config = config_of(
        tmp_path / "run", folder,
        objective={"kind": "exopd", "topk": 3, "reference": folder},
        teacher={"path": folder, "dtype": "float32", "pipeline_layers": [1]},
    )  # fmt: skip
    with one_rank() as layout:
        context = context_of(config, layout)
        components.teacher_model(context)
        components.reference_model(context)
    assert [call["stage_layers"] for call in built] == [(1,), None]


@pytest.mark.parametrize("offload", [False, True])
def test_only_the_teacher_is_offloaded_and_only_if_its_key_says_so(
    built: list[dict[str, Any]], offload: bool, tmp_path: Path
) -> None:
    folder = write_tiny_model(tmp_path / "m", num_hidden_layers=1)
    config = config_of(
        tmp_path / "run", folder,
        objective={"kind": "exopd", "topk": 3, "reference": folder},
        teacher={"path": folder, "dtype": "float32", "offload": offload},
    )  # fmt: skip
    with one_rank() as layout:
        context = context_of(config, layout)
        teacher, reference = components.teacher_model(context), components.reference_model(context)
    assert isinstance(teacher, tuple) is offload and not isinstance(reference, tuple)


def test_the_plan_tells_the_teachers_stages_and_where_its_weights_are(tmp_path: Path) -> None:
    given = {"path": tmp_path, "pipeline_layers": [2, 1], "offload": True}
    assert "sharded like the student, stages of 2, 1 layers, weights in host memory between scorings" in plan(
        config_of(tmp_path / "run", tmp_path, teacher=given)
    )
    assert "host memory" not in plan(config_of(tmp_path / "run", tmp_path))
