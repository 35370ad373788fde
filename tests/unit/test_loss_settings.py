"""From the section `loss` and the objective to the computation of log-probs: every key has its effect."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tropd_mcore.config.schema import Config
from tropd_mcore.kernel.group import OneRank
from tropd_mcore.kernel.shard import Scaling, VocabShard
from tropd_mcore.mcore.loss_settings import LossSettings

BASE: dict[str, Any] = {
    "run": {"dir": "run"},
    "student": {"path": "student"},
    "teacher": {"path": "teacher"},
    "data": {"prompts": "prompts.jsonl"},
}
GROUP = OneRank()
MODEL: Any = SimpleNamespace(
    shard=VocabShard(3, 10, 9),
    layout=SimpleNamespace(groups=SimpleNamespace(tp=GROUP)),
    platform=SimpleNamespace(device=torch.device("cpu")),
)


def settings(**sections: dict[str, Any]) -> LossSettings:
    return LossSettings.from_config(Config.model_validate(BASE | sections))


def test_the_keys_of_the_loss_section_reach_the_kernel() -> None:
    keys = {"backend": "eager", "chunk_tokens": 7, "overlap_chunks": True, "logit_softcap": 30.0}
    found = settings(loss=keys, rollout={"temperature": 0.6})
    assert found.temperature == 0.6
    kernel = found.kernel(MODEL, temperature=0.8)
    assert kernel.scaling == Scaling(0.8, 30.0)
    assert (kernel.shard, kernel.group, kernel.backend.name) == (MODEL.shard, GROUP, "eager")
    assert (kernel.chunk_tokens, kernel.overlap) == (7, True)


@pytest.mark.parametrize(("tensor", "rows"), [(1, 2048), (2, 2048), (4, 4096), (8, 8192)])
def test_a_narrower_shard_gets_longer_chunks_unless_the_key_says_otherwise(tensor: int, rows: int) -> None:
    assert settings(parallel={"tensor": tensor}).chunk_tokens == rows
    assert settings(parallel={"tensor": tensor}, loss={"chunk_tokens": 7}).chunk_tokens == 7


@pytest.mark.parametrize(
    ("monitor", "objective", "measured"),
    [
        ({}, {}, [0, 10, 20, 24]),
        ({"topk_overlap_every": 1}, {}, list(range(25))),
        ({"topk_overlap_every": 100}, {}, [0, 24]),
        ({"topk_overlap": False}, {}, []),
        ({}, {"kind": "sdpo", "topk": 4, "student_topk": 4}, list(range(25))),
        ({}, {"kind": "sdpo", "topk": 4, "student_topk": 3}, [0, 10, 20, 24]),
        ({"topk_overlap": False}, {"kind": "sdpo", "topk": 4, "student_topk": 4}, []),
    ],
    ids=str,
)
def test_the_overlap_is_measured_at_some_steps_and_at_every_step_if_it_costs_nothing(
    monitor: dict[str, Any], objective: dict[str, Any], measured: list[int]
) -> None:
    given = BASE | {"run": {"dir": "run", "steps": 25}, "monitor": monitor}
    config = Config.model_validate(given | ({"objective": objective} if objective else {}))
    found = LossSettings.from_config(config)
    assert [step for step in range(25) if found.at_step(config, step).topk_overlap] == measured
    others = {replace(found.at_step(config, step), topk_overlap=True) for step in range(25)}
    assert others == {replace(found, topk_overlap=True)}, "nothing else depends on the step"


def test_mode_form_and_overlap_metric_follow_the_configuration() -> None:
    found = settings(loss={"form": "logits", "weight_gradient": "recompute"}, monitor={"topk_overlap": False})
    assert (found.form, found.weight_gradient, found.topk_overlap) == ("logits", "recompute", False)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ({"kind": "gkd", "divergence": "jsd", "beta": 0.2, "full_vocabulary": True}, ("jsd", 0.2)),
        ({"kind": "gkd", "divergence": "rkl", "full_vocabulary": True}, ("rkl", 0.5)),
        ({"kind": "gkd", "divergence": "jsd", "beta": 0.2}, (None, 0.5)),
        ({"kind": "tropd"}, (None, 0.5)),
    ],
)
def test_only_a_divergence_over_the_whole_vocabulary_is_computed_by_the_kernel(
    objective: dict[str, Any], expected: tuple[str | None, float]
) -> None:
    found = settings(objective=objective)
    assert (found.divergence, found.divergence_beta) == expected
