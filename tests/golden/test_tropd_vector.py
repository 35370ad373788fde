"""The golden vector: every formula, value and gradient, through the real kernel on one, two and three shards."""

from __future__ import annotations

import math

import pytest
import torch

from tests import claims
from tests.golden_rows import GOLDEN, assert_close
from tests.mutants import real_losses
from tests.oracles import forward_kl, forward_kl_gradient, log_softmax, top_ids
from tests.ranks import run_on_ranks
from tests.reward_claims import REWARD_CLAIMS
from tropd_mcore.objectives.parts.trust import trust_gate


def _check(claim: claims.Claim) -> None:
    claim(real_losses())


@pytest.mark.parametrize("tp_size", [1, 2, 3])
@pytest.mark.parametrize("claim", claims.CLAIMS + REWARD_CLAIMS, ids=lambda claim: claim.__name__)
def test_every_claim_about_the_golden_vector_holds_on_one_two_and_three_ranks(
    claim: claims.Claim, tp_size: int
) -> None:
    run_on_ranks(_check, tp_size, claim)


def test_the_worked_example_tokens_have_the_expected_log_ratio_and_trust_probability() -> None:
    for token in GOLDEN["single_tokens"]:
        log_ratio_T = torch.tensor([math.log(token["q"]) - math.log(token["p"])], dtype=torch.float64)
        trust_T = trust_gate(log_ratio_T, mode="soft", trust_u_T=torch.zeros(1), threshold=0.0)
        assert float(log_ratio_T) == pytest.approx(token["log_ratio"], abs=5e-3)
        assert float(trust_T) == pytest.approx(token["trust_probability"], rel=2e-3)


@pytest.mark.parametrize("norm", ["truncated", "tail", "renorm"])
def test_the_oracle_gives_the_golden_forward_kl(norm: str) -> None:
    log_p, log_q = log_softmax(GOLDEN["student_logits"]), log_softmax(GOLDEN["teacher_logits"])
    ids = top_ids(GOLDEN["teacher_logits"], GOLDEN["topk"])
    assert ids == GOLDEN["teacher_topk_ids"]
    assert_close(forward_kl(log_q, log_p, ids, norm), GOLDEN["forward_kl_topk"][norm], 1e-9)
    assert_close(forward_kl_gradient(log_q, log_p, ids, norm), GOLDEN["forward_kl_topk_gradient"][norm])
