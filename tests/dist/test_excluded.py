"""Tokens that only the teacher's tokenizer has are not candidates of a teacher in the job, at any sharding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.dist import excluded_ranks, reference
from tests.dist.layouts import Case
from tests.ranks import run_on_ranks

LENGTHS = [(5, 2, 7), (3, 0, 9), (6, 3, 4)]
K = 7


@pytest.mark.parametrize(("case", "ranks"), [(Case(), 1), (Case(tensor=2), 2)], ids=["one rank", "tensor 2"])
def test_the_next_best_tokens_replace_excluded_ones_whose_mass_goes_to_the_tail(
    tmp_path: Path, case: Case, ranks: int
) -> None:
    folder = reference.write_model(reference.TEACHER, tmp_path / "teacher", seed=11)
    rollouts = reference.make_rollouts(LENGTHS)
    probe = run_on_ranks(excluded_ranks.score_both, ranks, folder, rollouts, case, K, [], [])[-1]
    often = torch.cat([whole.topk_ids_TK[:, :K].flatten() for whole, _, _ in probe]).bincount().topk(5).indices.tolist()
    answers = run_on_ranks(excluded_ranks.score_both, ranks, folder, rollouts, case, K, often, [often[0], 1])[-1]
    counted = 0
    for whole, found, error in answers:
        assert "tokens that teacher.extra_tokens=exclude takes out; lower it" in error
        for row in range(len(whole.logp_T)):
            order = whole.topk_ids_TK[row].tolist()
            kept = [place for place, index in enumerate(order) if index not in often][:K]
            assert found.topk_ids_TK[row].tolist() == [order[place] for place in kept]
            logp_K = whole.topk_logp_TK[row, kept]
            torch.testing.assert_close(found.topk_logp_TK[row], logp_K)
            torch.testing.assert_close(
                found.tail_mass_T[row], 1.0 - logp_K.double().exp().sum().float(), atol=1e-6, rtol=0
            )
            assert found.excluded_T is not None
            expected = sum(index in often for index in order[:K])
            assert int(found.excluded_T[row]) == expected
            counted += expected
        torch.testing.assert_close(found.logp_T, whole.logp_T)
        assert found.logp_of_student_topk_TL is not None and whole.logp_of_student_topk_TL is not None
        absent = torch.tensor([index in often for index in (often[0], 1)])
        assert found.logp_of_student_topk_TL[:, absent].isneginf().all()
        torch.testing.assert_close(found.logp_of_student_topk_TL[:, ~absent], whole.logp_of_student_topk_TL[:, ~absent])
    assert counted > 0
    assert all(found.excluded_T is None for _, found, _ in probe)
