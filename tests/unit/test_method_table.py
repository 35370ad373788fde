"""From the configuration to the loss: every key reaches the objective that it belongs to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import pytest
import torch

from tests.objective_batch import Batch
from tropd_mcore.config.advantage_objectives import (
    AdvantageObjective,
    EntropyOpdObjective,
    ExopdObjective,
    IwOpdObjective,
    KdrlObjective,
    PowerOpdObjective,
    ReopoldObjective,
    RethinkingObjective,
    RladObjective,
    TopdObjective,
    VopdObjective,
)
from tropd_mcore.config.derived import own_support_size, support_size
from tropd_mcore.config.divergence_objectives import DivergenceObjective
from tropd_mcore.config.schema import ObjectiveConfig
from tropd_mcore.config.tropd_objectives import (
    GuidanceConfig,
    OpdObjective,
    OutlierConfig,
    PolicyGradientConfig,
    TropdObjective,
    TrustConfig,
)
from tropd_mcore.losses.binding import policy_of
from tropd_mcore.losses.method_table import OBJECTIVES, bind_objective
from tropd_mcore.losses.objectives.candidates import rethinking
from tropd_mcore.losses.objectives.inputs import ObjectiveOutput
from tropd_mcore.losses.objectives.rewards import entropy_opd, exopd, iw_opd, power_opd, reopold, topd, vopd
from tropd_mcore.losses.objectives.tropd import tropd
from tropd_mcore.losses.objectives.verified import kdrl, rlad
from tropd_mcore.losses.policy_gradient import PolicyGradient

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
    assert policy_of(POLICY_CONFIG) == POLICY


def test_the_defaults_of_the_policy_gradient_are_those_of_the_configuration() -> None:
    assert policy_of(PolicyGradientConfig()) == PolicyGradient()


def test_tropd_keys_reach_the_objective() -> None:
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
    config: ObjectiveConfig, progress: float, expected: Callable[..., ObjectiveOutput]
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


def test_guidance_that_is_off_has_no_loss_on_prefix_tokens() -> None:
    rows = batch()
    objective = bind_objective(TropdObjective(guidance=GuidanceConfig(enabled=False, loss="nll", beta=1.0)))
    assert not rows.gradient(objective(rows.inputs()).loss_sum)[rows.off_T].any()


@pytest.mark.parametrize(
    ("config", "topk", "own_topk"),
    [
        (TropdObjective(outlier=OutlierConfig(topk=7)), 7, 0),
        (OpdObjective(topk=9), 9, 0),
        (VopdObjective(topk=9, own_topk=5), 9, 5),
        (RethinkingObjective(topk=3, own_topk=5), 3, 5),
    ],
    ids=lambda value: getattr(value, "kind", None),
)
def test_the_numbers_of_candidates_come_from_the_section_of_the_kind(
    config: ObjectiveConfig, topk: int, own_topk: int
) -> None:
    assert (support_size(config), own_support_size(config)) == (topk, own_topk)


def test_every_kind_of_the_schema_has_an_objective() -> None:
    kinds = [*get_args(AdvantageObjective), *get_args(DivergenceObjective), TropdObjective, OpdObjective]
    assert set(OBJECTIVES) == {kind.model_fields["kind"].default for kind in kinds}


@pytest.mark.parametrize("kind", [*get_args(AdvantageObjective), TropdObjective, OpdObjective])
def test_every_default_has_a_finite_loss_at_any_time(kind: type) -> None:
    for progress in (0.0, 0.5, 0.999):
        assert bind_objective(kind(), progress)(batch().inputs()).loss_sum.isfinite()
