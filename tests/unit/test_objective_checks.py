"""Degenerate settings of reward objectives and keys without effect give one line each. Other settings give none."""

from __future__ import annotations

from typing import Any

import pytest

from tropd_mcore.config.objective_checks import objective_problems
from tropd_mcore.config.objectives import KINDS as CLASSES_OF_KINDS
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


@pytest.mark.parametrize(
    "objective", [section for kind, section in CLASSES_OF_KINDS.items() if kind not in ("custom", "sdpo", "opsd")]
)
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
        ("vopd", {"student_topk": 1}, {}, "the baseline of vopd is always 0"),
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
def test_a_degenerate_objective_setting_gives_one_line(
    kind: str, objective: dict[str, Any], sections: dict[str, Any], expected: str
) -> None:
    (problem,) = problems_of(kind, objective, **sections)
    assert expected in problem and "\n" not in problem


@pytest.mark.parametrize(
    ("kind", "objective", "sections"),
    [
        ("opd", {"policy_gradient": {"epochs": 2, "ratio": "importance"}}, {}),
        ("rethinking", {"student_topk": 1}, {}),
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


TRUST_ABOVE = {"trust": {"mode": "threshold", "threshold": -0.5}}
PPO = {"ratio": "ppo_clip", "clip_low": 0.1, "clip_high": 0.3, "dual_clip": None}


@pytest.mark.parametrize(
    ("kind", "objective", "expected"),
    [
        ("opd", {"policy_gradient": {"clip_low": 0.1}}, "policy_gradient.clip_low=0.1 has no effect with objective"),
        ("opd", {"policy_gradient": {"dual_clip": None}}, "policy_gradient.dual_clip=None has no effect"),
        (
            "eopd",
            {"policy_gradient": {"ratio": "importance", "clip_high": 0.3}},
            "with objective.policy_gradient.ratio",
        ),
        (
            "aopd",
            {"policy_gradient": {"mismatch": "icepop", "tis_cap": 3.0}},
            "with objective.policy_gradient.mismatch",
        ),
        ("opd", {"policy_gradient": {"icepop_high": 2.0}}, "policy_gradient.icepop_high=2.0 has no effect"),
        ("opd", {"policy_gradient": {"mask_below": -0.1}}, "policy_gradient.mask_below=-0.1 has no effect"),
        ("tropd", {"trust": {"mode": "soft"}, "outlier": {"mode": "clip"}}, "trust.mode=soft has no effect with obj"),
        ("tropd_aopd", {"trust": {"mode": "none"}, "outlier": {"mode": "mask"}}, "trust.mode=none has no effect"),
        ("tropd", {"trust": {"threshold": -0.5}}, "trust.threshold=-0.5 has no effect with objective.trust.mode=berno"),
        ("tropd", {"trust": {"threshold": -0.5}, "outlier": {"mode": "clip"}}, "with objective.outlier.mode=clip"),
        ("tropd", {**TRUST_ABOVE, "outlier": {"clip_tau": -0.5}}, "outlier.clip_tau=-0.5 has no effect"),
        ("tropd", {"outlier": {"mode": "mask", "weight": 0.5}}, "outlier.weight=0.5 has no effect"),
        ("tropd", {"guidance": {"loss": "none", "beta": 0.1}}, "guidance.beta=0.1 has no effect"),
        ("tropd", {"guidance": {"schedule": "constant", "total_steps": 9}}, "guidance.total_steps=9 has no effect"),
        ("reopold", {"switch_at": 0.3}, "objective.switch_at=0.3 has no effect with objective.stages=1"),
        ("rlad", {"reference": "base"}, "objective.reference=base has no effect with objective.reference_weight=0"),
        ("gkd", {"beta": 0.1}, "objective.beta=0.1 has no effect with objective.divergence=fkl"),
        ("gkd", {"full_vocabulary": True, "norm": "renorm"}, "objective.norm=renorm has no effect"),
    ],
)
def test_a_changed_key_without_effect_gives_one_line(kind: str, objective: dict[str, Any], expected: str) -> None:
    (problem,) = problems_of(kind, objective)
    assert expected in problem and "\n" not in problem


@pytest.mark.parametrize(
    ("kind", "objective"),
    [
        ("opd", {"policy_gradient": PPO}),
        ("aopd", {"policy_gradient": {"mismatch": "tis", "tis_cap": 3.0}}),
        ("tropd", TRUST_ABOVE),
        ("tropd", {"outlier": {"mode": "clip", "weight": 0.5, "clip_tau": -0.5}}),
        ("tropd", {"outlier": {"mode": "mask", "clip_tau": -0.5}}),
        ("reopold", {"stages": 2, "switch_at": 0.3, "entropy_fraction": 0.4}),
        ("rlad", {"reference": "base", "reference_weight": 0.1}),
        ("gkd", {"divergence": "jsd", "beta": 0.1, "full_vocabulary": True}),
        ("custom", {"function": "package.module:function", "policy_gradient": {"tis_cap": 3.0}}),
    ],
)
def test_a_changed_key_with_an_effect_gives_no_line(kind: str, objective: dict[str, Any]) -> None:
    assert problems_of(kind, objective) == []
