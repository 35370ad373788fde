"""The verifier's verdicts on the rollouts of a step: one each, and an error where an objective would miss one."""

from dataclasses import replace

import numpy as np
import pytest

from tests.unit.test_config_checks import make_config
from tests.unit.test_packing import make_rollout
from tropd_mcore.config.schema import Config
from tropd_mcore.errors import DataError
from tropd_mcore.train.verdicts import accuracy, judge_rollouts, rewards


class Speller:
    """A renderer whose text of ids is their digits."""

    def decode(self, ids: np.ndarray) -> str:
        return "".join(str(index) for index in ids)


def config_of(kind: str, verifier: str = "exact_match") -> Config:
    return make_config(objective={"kind": kind}, verifier={"kind": verifier, "pattern": "(.+)"})


def rollouts_of(*answers: str | None) -> list:
    made = [make_rollout(index, 3, 2, 4, False) for index in range(len(answers))]
    return [replace(rollout, answer=answer) for rollout, answer in zip(made, answers, strict=True)]


def test_prefix_and_response_together_are_judged() -> None:
    first = rollouts_of("x")[0]
    right = Speller().decode(np.concatenate([first.prefix_ids, first.response_ids]))
    verdicts = judge_rollouts(rollouts_of(right, "x", None), Speller(), config_of("opd"))
    assert verdicts == [True, False, None]
    assert accuracy(verdicts) == 0.5
    np.testing.assert_array_equal(rewards(verdicts), [1.0, 0.0, np.nan])


def test_without_a_verifier_nothing_is_judged() -> None:
    verdicts = judge_rollouts(rollouts_of("x", None), Speller(), config_of("opd", verifier="none"))
    assert verdicts == [None, None] and accuracy(verdicts) is None


@pytest.mark.parametrize("kind", ["kdrl", "rlad"])
def test_an_objective_that_learns_from_verdicts_names_the_prompt_without_an_answer(kind: str) -> None:
    with pytest.raises(DataError, match=rf"kind={kind} learns from a verifier, but prompt 'p1' \(and 1 more\) has no"):
        judge_rollouts(rollouts_of("x", None, None), Speller(), config_of(kind))
