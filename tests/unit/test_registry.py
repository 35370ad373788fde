"""From the configuration to the loss: every key reaches the objective that it belongs to."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from tests.objective_batch import Batch
from tropd_mcore.config.objectives import KINDS as CLASSES_OF_KINDS
from tropd_mcore.config.objectives import ObjectiveConfig
from tropd_mcore.config.objectives.base import PolicyGradientConfig
from tropd_mcore.config.objectives.candidates import RethinkingObjective
from tropd_mcore.config.objectives.rewards import (
    EntropyOpdObjective,
    ExopdObjective,
    IwOpdObjective,
    PowerOpdObjective,
    ReopoldObjective,
    TopdObjective,
    VopdObjective,
)
from tropd_mcore.config.objectives.trust_region import (
    GuidanceConfig,
    OpdObjective,
    OutlierConfig,
    TropdObjective,
    TrustConfig,
)
from tropd_mcore.config.objectives.verified import KdrlObjective, RladObjective
from tropd_mcore.config.reference import reference
from tropd_mcore.kernel.token_losses import TokenLosses
from tropd_mcore.objectives import catalogue
from tropd_mcore.objectives.candidates import rethinking
from tropd_mcore.objectives.catalogue import CHOICES
from tropd_mcore.objectives.parts.policy_gradient import PolicyGradient
from tropd_mcore.objectives.registry import bind_objective
from tropd_mcore.objectives.rewards import entropy_opd, exopd, iw_opd, power_opd, reopold, topd, vopd
from tropd_mcore.objectives.trust_region import tropd
from tropd_mcore.objectives.verified import kdrl, rlad

KEYS: dict[str, Any] = {
    "ratio": "ppo_clip",
    "clip_low": 0.11,
    "clip_high": 0.37,
    "dual_clip": 1.7,
    "mismatch": "icepop",
    "tis_cap": 1.5,
    "icepop_low": 0.7,
    "icepop_high": 1.6,
    "mask_below": -0.1,
    "advantage_clip": 2.0,
}
POLICY_CONFIG = PolicyGradientConfig(**KEYS, mini_batches=3, epochs=2)
POLICY = PolicyGradient(**KEYS)


def batch() -> Batch:
    return Batch(moved=0.5)


def test_every_key_of_the_policy_gradient_reaches_the_loss() -> None:
    assert POLICY_CONFIG.constants == POLICY


def test_the_defaults_of_the_policy_gradient_are_those_of_the_configuration() -> None:
    assert PolicyGradientConfig().constants == PolicyGradient()


def test_the_keys_of_tropd_reach_the_objective() -> None:
    config = TropdObjective(
        trust=TrustConfig(mode="threshold", threshold=-0.3),
        outlier=OutlierConfig(mode="fkl_scalar", weight=0.6, topk=5, norm="tail", clip_tau=-0.9),
        guidance=GuidanceConfig(beta=0.2, loss="topk_fkl"),
        policy_gradient=POLICY_CONFIG,
    )
    expected = tropd(
        batch().inputs(),
        trust_mode="threshold",
        trust_threshold=-0.3,
        outlier_mode="fkl_scalar",
        outlier_weight=0.6,
        outlier_norm="tail",
        clip_tau=-0.9,
        beta=0.2,
        prefix_loss="topk_fkl",
        policy=POLICY,
    )
    assert torch.equal(bind_objective(config)(batch().inputs()).loss_sum, expected.loss_sum)


@pytest.mark.parametrize(
    ("config", "progress", "expected"),
    [
        (ReopoldObjective(floor=-0.3), 0.9, partial(reopold, floor=-0.3, train="all")),
        (ReopoldObjective(stages=2, switch_at=0.6), 0.59, partial(reopold, floor=-0.847297860387, train="above_floor")),
        (ReopoldObjective(stages=2, switch_at=0.6), 0.6, partial(reopold, floor=-0.847297860387, train="selected")),
        (EntropyOpdObjective(), 0.0, partial(entropy_opd, denominator="selected")),
        (EntropyOpdObjective(denominator="all"), 0.0, partial(entropy_opd, denominator="all")),
        (ExopdObjective(scale=1.7), 0.0, partial(exopd, scale=1.7)),
        (TopdObjective(mixing=0.3), 0.0, partial(topd, mixing=0.3)),
        (VopdObjective(), 0.0, vopd),
        (IwOpdObjective(), 0.0, iw_opd),
        (PowerOpdObjective(power=0.3), 0.0, partial(power_opd, power=0.3)),
        (KdrlObjective(beta_start=0.4, beta_end=0.2), 0.0, partial(kdrl, beta=0.4)),
        (KdrlObjective(beta_start=0.4, beta_end=0.2), 0.75, partial(kdrl, beta=0.25)),
        (RladObjective(anchor=0.3, reference_weight=0.2), 0.0, partial(rlad, anchor=0.3, reference_weight=0.2)),
        (RethinkingObjective(support="xor"), 0.0, partial(rethinking, support="xor")),
    ],
    ids=lambda value: getattr(value, "kind", None),
)
def test_the_keys_of_a_reward_reach_the_objective(
    config: ObjectiveConfig, progress: float, expected: Callable[..., TokenLosses]
) -> None:
    config = config.model_copy(update={"policy_gradient": POLICY_CONFIG})
    ours = bind_objective(config, progress)(batch().inputs())
    theirs = expected(batch().inputs(), policy=POLICY)
    torch.testing.assert_close(ours.loss_sum, theirs.loss_sum, rtol=1e-11, atol=0)
    assert int(ours.token_count) == int(theirs.token_count)
    torch.testing.assert_close(ours.columns["loss"], theirs.columns["loss"], rtol=1e-11, atol=1e-12)


def test_opd_is_tropd_with_the_gate_open_and_no_guidance() -> None:
    open_gate = TropdObjective(
        trust=TrustConfig(mode="none"), guidance=GuidanceConfig(enabled=False), policy_gradient=POLICY_CONFIG
    )
    plain = bind_objective(OpdObjective(policy_gradient=POLICY_CONFIG))(batch().inputs())
    assert torch.equal(plain.loss_sum, bind_objective(open_gate)(batch().inputs()).loss_sum)


def test_without_guidance_there_is_no_loss_on_prefix_tokens() -> None:
    rows = batch()
    objective = bind_objective(TropdObjective(guidance=GuidanceConfig(enabled=False, loss="nll", beta=1.0)))
    assert not rows.gradient(objective(rows.inputs()).loss_sum)[rows.off_T].any()


@pytest.mark.parametrize(
    ("config", "topk", "student_topk"),
    [
        (TropdObjective(outlier=OutlierConfig(topk=7)), 7, 0),
        (OpdObjective(topk=9), 9, 0),
        (VopdObjective(topk=9, student_topk=5), 9, 5),
        (RethinkingObjective(topk=3, student_topk=5), 3, 5),
    ],
    ids=lambda value: getattr(value, "kind", None),
)
def test_the_numbers_of_candidates_come_from_the_section_of_the_kind(
    config: ObjectiveConfig, topk: int, student_topk: int
) -> None:
    assert (config.teacher_topk, config.student_candidates) == (topk, student_topk)


def test_every_kind_of_the_configuration_has_a_loss_function_and_constants_of_its_name() -> None:
    for kind, section in CLASSES_OF_KINDS.items():
        family = importlib.import_module(f"tropd_mcore.objectives.{section.__module__.rpartition('.')[2]}")
        assert kind == "custom" or (callable(getattr(family, kind)) and callable(getattr(catalogue, kind)))


@pytest.mark.parametrize(
    "kind",
    [
        kind
        for kind in CLASSES_OF_KINDS.values()
        if kind.__module__.endswith(("rewards", "verified", "candidates")) or kind in (TropdObjective, OpdObjective)
    ],
)
def test_every_objective_with_its_defaults_has_a_finite_loss_at_any_progress(kind: type) -> None:
    for progress in (0.0, 0.5, 0.999):
        assert bind_objective(kind(), progress)(batch().inputs()).loss_sum.isfinite()


WORDS_OF_KEYS = {
    "trust.mode": "trust_mode", "outlier.mode": "outlier_mode", "outlier.norm": "outlier_norm",
    "guidance.loss": "prefix_loss", "policy_gradient.ratio": "ratio", "policy_gradient.mismatch": "mismatch",
}  # fmt: skip
"""Keys whose last part is not the constant's name."""


def test_the_library_allows_the_same_option_words_as_the_configuration() -> None:
    """The library refuses a word by CHOICES, the configuration by its own list. `train` is no key: stages sets it."""
    words: dict[str, set[str]] = {}
    for key in reference():
        path = key.dotted.removeprefix("objective.")
        name = WORDS_OF_KEYS.get(path, path)
        if key.dotted.startswith("objective.") and name in CHOICES:
            words.setdefault(name, set()).update(key.accepts.split(" | "))
    assert words | {"train": set(CHOICES["train"])} == {name: set(known) for name, known in CHOICES.items()}
