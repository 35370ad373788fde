"""Which tokens move the student: the shares of force that objectives give to near and to distant tokens.

Each state has a distance to the teacher; the sampled tokens come from the student itself.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tropd_mcore import objectives
from tropd_mcore.library.arguments import TeacherTopK, VocabParallel
from tropd_mcore.library.loss import distill_loss
from tropd_mcore.monitor.distance import BINS
from tropd_mcore.monitor.record import StepRecord
from tropd_mcore.types import TokenTable

WRONG, RIGHT, VOCABULARY, DRAWS = 0, 1, 7, 4000
STATES = {"0_1": 0.004, "1_10": 0.05, "10_50": 0.3, "50_90": 0.8, "90_100": 0.9999}
"""Bin of a state -> the probability that the student gives to a token of which the teacher thinks nothing."""
OBJECTIVES = {"opd": objectives.opd(), "tropd": objectives.tropd(), "gkd": objectives.gkd(divergence="fkl")}


@functools.cache
def columns_of(name: str) -> dict[str, Tensor]:
    """DRAWS samples of the student in each of STATES; the teacher is sure of RIGHT."""
    wrong = list(STATES.values())
    random = torch.Generator().manual_seed(3)
    rest = 1e-7
    p_SV = torch.full((len(wrong), VOCABULARY), rest, dtype=torch.float64)
    p_SV[:, WRONG] = torch.tensor(wrong, dtype=torch.float64)
    p_SV[:, RIGHT] = 1.0 - p_SV[:, WRONG] - rest * (VOCABULARY - 2)
    logits_TV = p_SV.log().repeat_interleave(DRAWS, 0)
    x_T = torch.multinomial(p_SV, DRAWS, replacement=True, generator=random).reshape(-1)
    q_V = torch.full((VOCABULARY,), 1e-7, dtype=torch.float64)
    q_V[RIGHT] = 1.0 - 1e-7 * (VOCABULARY - 1)
    order_TK = q_V.argsort(descending=True).expand(len(x_T), VOCABULARY)
    log_q_V = q_V.log()
    teacher = TeacherTopK(log_q_V[x_T], order_TK, log_q_V[order_TK])
    loss = distill_loss(
        logits_TV.requires_grad_(True),
        x_T,
        teacher,
        OBJECTIVES[name],
        vp=VocabParallel.single(VOCABULARY),
        trust_u_T=torch.rand(len(x_T), generator=random, dtype=torch.float64),
        measure_force=True,
    )
    return loss.columns


def shares(name: str) -> dict[str, float]:
    """Force of each bin's tokens, divided by the force that the forward KL has on a token at distance 1."""
    force = columns_of(name)["force"].reshape(len(STATES), DRAWS).mean(1) / 2
    return dict(zip(STATES, force.tolist(), strict=True))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_metrics_put_each_state_into_its_bin_and_share_out_the_force(name: str) -> None:
    columns = {key: column.numpy() for key, column in columns_of(name).items()}
    rows = len(columns["tv"])
    table = TokenTable({**columns, "on": np.ones(rows, bool), "epoch": np.zeros(rows, np.int64)})
    record = StepRecord(table=table, rollouts=[], updates=[], alpha=0.0, timings={})
    assert [part.name for part in BINS] == list(STATES)
    assert [part.share_of_tokens(record) for part in BINS] == pytest.approx([0.2] * 5)
    force, total = shares(name), sum(shares(name).values())
    assert [part.share_of_force(record) for part in BINS] == pytest.approx([force[bin_] / total for bin_ in STATES])


def test_the_forward_kl_has_a_force_equal_to_the_distance() -> None:
    for name, wrong in STATES.items():
        assert shares("gkd")[name] == pytest.approx(wrong, rel=1e-4)


def test_trust_regions_have_the_force_of_the_forward_kl_on_distant_tokens_and_its_square_on_near_ones() -> None:
    found = shares("tropd")
    assert found["90_100"] == pytest.approx(1.0, rel=1e-3)
    for name in ("0_1", "1_10"):
        assert 0.2 * STATES[name] ** 2 < found[name] < 4 * STATES[name] ** 2


def test_a_reward_of_the_sampled_token_has_no_force_on_confident_mistakes_and_much_on_the_others() -> None:
    found = shares("opd")
    assert found["90_100"] < 0.01 * shares("tropd")["90_100"]
    assert found["0_1"] > 5 * shares("gkd")["0_1"] and found["10_50"] > 5 * shares("gkd")["10_50"]


def test_without_candidates_of_a_teacher_there_is_no_distance_and_no_share() -> None:
    columns = {"tv": np.full(3, np.nan), "force": np.ones(3), "on": np.ones(3, bool), "epoch": np.zeros(3)}
    record = StepRecord(table=TokenTable(columns), rollouts=[], updates=[], alpha=0.0, timings={})
    assert all(math.isnan(part.share_of_tokens(record)) and math.isnan(part.share_of_force(record)) for part in BINS)
