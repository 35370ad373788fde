"""Degenerate settings of the objectives with a reward: one line each, and none for what only looks degenerate."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from tropd_mcore.config.advantage_objectives import AdvantageObjective
from tropd_mcore.config.objective_checks import objective_problems
from tropd_mcore.config.schema import Config

BASE: dict[str, Any] = {
    "run": {"dir": "run"},
    "student": {"path": "student"},
    "teacher": {"path": "teacher"},
    "data": {"prompts": "prompts.jsonl", "teacher_responses": "responses.jsonl"},
    "verifier": {"kind": "exact_match"},
}


def problems_of(kind: str, objective: dict[str, Any] | None = None, **sections: dict[str, Any]) -> list[str]:
    config = Config.model_validate(BASE | {"objective": {"kind": kind, **(objective or {})}} | sections)
    return list(objective_problems(config))


@pytest.mark.parametrize("objective", get_args(AdvantageObjective))
def test_the_defaults_of_every_kind_have_no_problem(objective: Any) -> None:
    assert problems_of(objective.model_fields["kind"].default) == []


@pytest.mark.parametrize(
    ("kind", "objective", "sections", "expected"),
    [
        ("opd", {"policy_gradient": {"epochs": 2}}, {}, "mini_batches * epochs = 1 * 2 = 2 updates"),
        ("tropd", {"policy_gradient": {"mini_batches": 3}}, {}, "set ratio=ppo_clip or importance, or make one update"),
        ("rlad", {"policy_gradient": {"ratio": "none"}}, {}, "ratio=none leaves objective.kind=rlad without the ratio"),
        ("kdrl", {"policy_gradient": {"advantage_clip": 2.0}}, {}, "advantage_clip clamps a log-ratio"),
        ("rlad", {"policy_gradient": {"ratio": "ppo_clip", "advantage_clip": 2.0}}, {}, "advantage_clip clamps"),
        ("topd", {"policy_gradient": {"advantage_clip": 2.0}}, {}, "advantage_clip clamps a log-ratio"),
        ("power_opd", {"policy_gradient": {"advantage_clip": 2.0}}, {}, "advantage_clip clamps a log-ratio"),
        ("rethinking", {"policy_gradient": {"mismatch": "tis"}}, {}, "mismatch=tis weighs sampled tokens"),
        (
            "rethinking",
            {"support": "union", "policy_gradient": {"ratio": "ppo_clip", "epochs": 2}},
            {},
            "objective.support=union with 2 updates",
        ),
        ("vopd", {"own_topk": 1}, {}, "the baseline of vopd is always 0"),
        ("tropd", {"outlier": {"topk": 1, "norm": "renorm"}}, {}, "the forward KL is always 0"),
        (
            "tropd",
            {
                "trust": {"mode": "none"},
                "outlier": {"topk": 1, "norm": "renorm"},
                "guidance": {"loss": "topk_fkl"},
            },
            {},
            "the forward KL is always 0",
        ),
        ("kdrl", {}, {"verifier": {"kind": "none"}}, "objective.kind=kdrl learns from a verifier"),
        ("rlad", {}, {"verifier": {"kind": "none"}}, "objective.kind=rlad learns from a verifier"),
        ("kdrl", {}, {"rollout": {"samples_per_prompt": 1}}, "compares the samples of a prompt"),
        ("rlad", {}, {"rollout": {"samples_per_prompt": 1}}, "compares the samples of a prompt"),
        ("topd", {}, {"rollout": {"samples_per_prompt": 1}}, "compares the samples of a prompt"),
        ("entropy_opd", {}, {"loss": {"aggregation": "sequence_mean"}}, "loss.aggregation=sequence_mean divides by"),
        ("reopold", {"stages": 2}, {"loss": {"aggregation": "sequence_mean"}}, "set loss.aggregation=token_mean"),
    ],
)
def test_a_degenerate_setting_gives_one_line(
    kind: str, objective: dict[str, Any], sections: dict[str, Any], expected: str
) -> None:
    (problem,) = problems_of(kind, objective, **sections)
    assert expected in problem and "\n" not in problem


@pytest.mark.parametrize(
    ("kind", "objective", "sections"),
    [
        ("opd", {"policy_gradient": {"epochs": 2, "ratio": "importance"}}, {}),
        ("rethinking", {"own_topk": 1}, {}),
        ("rethinking", {"support": "intersection", "policy_gradient": {"ratio": "ppo_clip", "epochs": 2}}, {}),
        ("rethinking", {"support": "union"}, {}),
        ("tropd", {"trust": {"mode": "none"}, "outlier": {"mode": "fkl_scalar"}}, {}),
        ("tropd", {"outlier": {"mode": "mask", "topk": 1, "norm": "renorm"}}, {}),
        ("tropd", {"outlier": {"topk": 1, "norm": "teacher_renorm"}}, {}),
        ("topd", {"normalise": False}, {"rollout": {"samples_per_prompt": 1}}),
        ("entropy_opd", {"denominator": "all"}, {"loss": {"aggregation": "sequence_mean"}}),
        ("reopold", {}, {"loss": {"aggregation": "sequence_mean"}}),
    ],
)
def test_a_setting_that_is_only_unusual_is_allowed(
    kind: str, objective: dict[str, Any], sections: dict[str, Any]
) -> None:
    assert problems_of(kind, objective, **sections) == []
