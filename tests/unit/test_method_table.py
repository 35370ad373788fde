"""From the configuration to the loss: every key reaches the objective that it belongs to."""

from __future__ import annotations

import pytest
import torch

from tests.unit.test_objectives import Batch
from tropd_mcore.config.derived import support_size
from tropd_mcore.config.schema import (
    GuidanceConfig,
    ObjectiveConfig,
    OpdObjective,
    OutlierConfig,
    PolicyGradientConfig,
    TropdObjective,
    TrustConfig,
)
from tropd_mcore.losses.method_table import OBJECTIVES, bind_objective
from tropd_mcore.losses.objectives import tropd


def test_tropd_keys_reach_the_objective() -> None:
    config = TropdObjective(
        trust=TrustConfig(mode="threshold", threshold=-0.3),
        outlier=OutlierConfig(mode="fkl_scalar", weight=0.6, topk=5, norm="tail", clip_tau=-0.9),
        guidance=GuidanceConfig(beta=0.2, loss="topk_fkl"),
        policy_gradient=PolicyGradientConfig(
            mismatch="icepop", tis_cap=1.5, icepop_low=0.7, icepop_high=1.6, mask_below=-0.1, advantage_clip=2.0
        ),
    )
    expected = tropd(
        Batch().inputs(),
        trust_mode="threshold",
        trust_threshold=-0.3,
        outlier_mode="fkl_scalar",
        outlier_weight=0.6,
        outlier_norm="tail",
        clip_tau=-0.9,
        beta=0.2,
        prefix_loss="topk_fkl",
        mismatch="icepop",
        tis_cap=1.5,
        icepop_low=0.7,
        icepop_high=1.6,
        mask_below=-0.1,
        advantage_clip=2.0,
    )
    assert torch.equal(bind_objective(config)(Batch().inputs()).loss_sum, expected.loss_sum)


def test_opd_is_tropd_with_the_gate_open_and_no_guidance() -> None:
    policy_gradient = PolicyGradientConfig(mismatch="tis", advantage_clip=1.0)
    open_gate = TropdObjective(
        trust=TrustConfig(mode="none"), guidance=GuidanceConfig(enabled=False), policy_gradient=policy_gradient
    )
    plain = bind_objective(OpdObjective(policy_gradient=policy_gradient))(Batch().inputs())
    assert torch.equal(plain.loss_sum, bind_objective(open_gate)(Batch().inputs()).loss_sum)


def test_guidance_that_is_off_has_no_loss_on_prefix_tokens() -> None:
    batch = Batch()
    objective = bind_objective(TropdObjective(guidance=GuidanceConfig(enabled=False, loss="nll", beta=1.0)))
    (gradient_TV,) = torch.autograd.grad(objective(batch.inputs()).loss_sum, batch.z_TV)
    assert not gradient_TV[torch.tensor([origin == "prefix" for origin in batch.origin])].any()


@pytest.mark.parametrize(
    ("config", "topk"), [(TropdObjective(outlier=OutlierConfig(topk=7)), 7), (OpdObjective(topk=9), 9)]
)
def test_topk_comes_from_the_section_of_the_kind(config: ObjectiveConfig, topk: int) -> None:
    assert support_size(config) == topk


def test_every_kind_of_the_schema_has_an_objective() -> None:
    assert set(OBJECTIVES) == {"tropd", "opd"}
    for config in (TropdObjective(), OpdObjective()):
        assert bind_objective(config)(Batch().inputs()).loss_sum.isfinite()
