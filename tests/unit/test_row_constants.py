"""A token with teacher probability zero: a finite loss for every objective, distrusted, and counted.

Shapes: T tokens, V vocabulary, J support ids.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from tests import row_constants
from tests.objective_batch import Batch
from tropd_mcore.config.objectives import KINDS, ObjectiveConfig
from tropd_mcore.kernel.token_losses import TokenLosses
from tropd_mcore.library.inputs import Constants, without_neginf
from tropd_mcore.objectives.parts.batch_statistics import BatchRows, statistic_of
from tropd_mcore.objectives.registry import bind_objective
from tropd_mcore.sentinels import LOGP_FLOOR
from tropd_mcore.train.batch_context import _columns
from tropd_mcore.types import MicroBatch, RowContext, StudentPass, TeacherScores

NEGATIVE_INFINITY = float("-inf")
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "tropd": [
        {},
        {"trust": {"mode": "soft"}},
        {"trust": {"mode": "none"}},
        {"trust": {"mode": "threshold"}},
        {"outlier": {"mode": "fkl_scalar"}},
        {"outlier": {"mode": "clip"}},
        {"outlier": {"mode": "mask"}},
        {"guidance": {"loss": "scalar_adv"}},
        {"guidance": {"loss": "topk_fkl"}},
        {"policy_gradient": {"ratio": "ppo_clip"}},
    ],
    "lsm": [{}, {"sampled_tail": True}, {"sampled_tail": True, "clip_log_ratio": 2.0}],
    "reopold": [{}, {"stages": 2, "switch_at": 0.9}, {"stages": 2, "switch_at": 0.1}],
    "gkd": [{"divergence": "fkl"}, {"divergence": "rkl"}, {"divergence": "jsd"}],
    "rethinking": [{"student_topk": 8, "support": support} for support in ("student", "union")],
    "vopd": [{"student_topk": 8}],
    "sdpo": [{"student_topk": 8}],
    "opsd": [{"student_topk": 8}, {"student_topk": 8, "norm": "truncated"}],
    "custom": [{"function": "tropd_mcore.objectives.trust_region:opd"}],
}
CASES = [(kind, settings) for kind in sorted(KINDS) for settings in SETTINGS.get(kind, [{}])]


def at_every_origin(batch: Batch) -> Tensor:
    """bool [T]: two sampled tokens, one of a prefix and one of neither. The teacher gives them probability zero."""
    impossible_T = torch.zeros(len(batch.origin), dtype=torch.bool)
    for origin, count in (("student", 2), ("prefix", 1), ("none", 1)):
        places = [place for place, found in enumerate(batch.origin) if found == origin]
        impossible_T[places[:count]] = True
    return impossible_T


def constants_of(batch: Batch, config: ObjectiveConfig | None, logp_T: Tensor, u_T: Tensor | None = None) -> Constants:
    """The constants of the batch's rows if the teacher's log-probs of the sampled tokens are `logp_T`."""
    inputs, rows = batch.inputs(), torch.arange(len(batch.origin))
    micro_batch = MicroBatch(
        input_ids_P=rows,
        position_ids_P=rows,
        cu_seqlens=torch.tensor([0, len(rows)]),
        max_seqlen=len(rows),
        rows_T=rows,
        target_ids_T=inputs.target_ids_T,
        student_mask_T=inputs.student_mask_T,
        prefix_mask_T=inputs.prefix_mask_T,
        rollout_logp_T=inputs.rollout_logp_T,
        trust_u_T=batch.u_T if u_T is None else u_T,
        weight_T=inputs.weight_T,
        sample_index_T=rows // 10,
        token_index_T=rows % 10 + 1,
    )
    scores = TeacherScores(
        logp_T=logp_T,
        topk_ids_TK=inputs.topk_ids_TK,
        topk_logp_TK=inputs.teacher_topk_logp_TK,
        tail_mass_T=torch.zeros_like(logp_T),
        entropy_T=inputs.teacher_entropy_T,
        scored_T=torch.ones_like(inputs.student_mask_T),
        logp_of_student_topk_TL=inputs.teacher_own_logp_TL,
    )
    found = StudentPass(inputs.old_logp_T, inputs.student_entropy_T.detach(), inputs.own_ids_TL, inputs.old_own_logp_TL)
    statistic = statistic_of(config, 0.5) if config is not None else None
    statistic_T = None
    if statistic is not None:
        samples = int(micro_batch.sample_index_T.max()) + 1
        columns: dict[str, Any] = _columns([micro_batch], [found], [scores])
        reward_S, prompt_index_S = np.arange(samples) % 2 * 1.0, np.zeros(samples, dtype=np.int64)
        statistic_T = torch.from_numpy(
            statistic(BatchRows(**columns, prompt_index_S=prompt_index_S, reward_S=reward_S))
        )
    context = RowContext(
        old_logp_T=inputs.old_logp_T,
        reference_logp_T=inputs.reference_logp_T,
        statistic_T=statistic_T,
        own_ids_TL=inputs.own_ids_TL,
        old_own_logp_TL=inputs.old_own_logp_TL,
        teacher_own_logp_TL=inputs.teacher_own_logp_TL,
    )
    return row_constants.constants_of(micro_batch, scores, context, batch.z_TV.shape[1])


def run(batch: Batch, config: ObjectiveConfig, constants: Constants) -> TokenLosses:
    log_p_TV = batch.z_TV.log_softmax(dim=1)
    entropy_T = -(log_p_TV.exp() * log_p_TV).sum(dim=1)
    logp_TJ = log_p_TV.gather(1, constants.ids_TJ.clamp_min(0)).masked_fill(constants.ids_TJ < 0, 0.0)
    return bind_objective(config, progress=0.5)(constants.inputs(logp_TJ, entropy_T, None, slice(None)))


@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_a_token_with_teacher_probability_zero_counts_as_one_at_the_floor(kind: str, settings: dict[str, Any]) -> None:
    """Loss, gradient and columns are finite, and equal those of log q = -50 with a uniform that distrusts."""
    config: ObjectiveConfig = TypeAdapter(ObjectiveConfig).validate_python({"kind": kind, **settings})
    batch = Batch(2, moved=0.3)
    impossible_T = at_every_origin(batch)
    logp_T = batch.inputs().teacher_logp_T
    found = run(batch, config, constants_of(batch, config, logp_T.masked_fill(impossible_T, NEGATIVE_INFINITY)))
    floored = constants_of(
        batch, config, logp_T.masked_fill(impossible_T, LOGP_FLOOR), batch.u_T.masked_fill(impossible_T, 1.0)
    )
    expected = run(batch, config, floored)
    gradient_TV = batch.gradient(found.loss_sum)
    assert found.loss_sum.isfinite() and gradient_TV.isfinite().all()
    assert torch.equal(found.loss_sum, expected.loss_sum) and torch.equal(found.token_count, expected.token_count)
    assert torch.equal(gradient_TV, batch.gradient(expected.loss_sum))
    for name, column in found.columns.items():
        assert torch.equal(column.nan_to_num(7.0), expected.columns[name].nan_to_num(7.0)), name
        assert column.isinf().sum() == 0, name


@pytest.mark.parametrize("u", [0.0, 1e-30, 0.5, 1.0 - 2.0**-24])
def test_the_bernoulli_gate_distrusts_an_impossible_token_for_every_draw(u: float) -> None:
    config: ObjectiveConfig = TypeAdapter(ObjectiveConfig).validate_python({"kind": "tropd"})
    batch = Batch(2)
    impossible_T = at_every_origin(batch)
    logp_T = batch.inputs().teacher_logp_T.masked_fill(impossible_T, NEGATIVE_INFINITY)
    output = run(batch, config, constants_of(batch, config, logp_T, torch.full_like(batch.u_T, u)))
    assert not output.columns["trusted"][impossible_T].any()
    others_T = batch.on_T & ~impossible_T
    assert output.columns["trusted"][others_T].all() or u > 0, "a drawn 0 trusts every possible token"


def test_only_minus_infinity_is_replaced_by_the_floor_and_replacements_are_counted() -> None:
    batch = Batch(2)
    impossible_T = at_every_origin(batch)
    logp_T = batch.inputs().teacher_logp_T.masked_fill(impossible_T, NEGATIVE_INFINITY)
    low, broken = 10, 11
    assert batch.origin[low] == batch.origin[broken] == "student"
    logp_T[low], logp_T[broken] = -73.0, torch.nan
    constants = constants_of(batch, None, logp_T)
    found_T = constants.columns["teacher_logp_T"]
    assert (found_T[impossible_T] == LOGP_FLOOR).all()
    assert found_T[low] == -73.0 and found_T[broken].isnan()
    others_T = ~(impossible_T | found_T.isnan())
    assert torch.equal(found_T[others_T], logp_T[others_T])
    assert torch.equal(constants.columns["trust_u_T"][others_T], batch.u_T[others_T])
    assert torch.equal(constants.impossible_T, impossible_T & ~batch.uncounted_T)
    assert int(constants.impossible_T.sum()) == 3


def test_a_nan_teacher_log_prob_stays_nan() -> None:
    assert without_neginf(torch.tensor([torch.nan, torch.inf, -50.5])).tolist()[1:] == [float("inf"), -50.5]
    assert without_neginf(torch.tensor([torch.nan])).isnan().all()


def test_a_row_that_the_teacher_did_not_score_is_not_counted_as_impossible() -> None:
    batch = Batch(2)
    constants = constants_of(batch, None, torch.full_like(batch.u_T, NEGATIVE_INFINITY))
    assert torch.equal(constants.impossible_T, ~batch.uncounted_T)
