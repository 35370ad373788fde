"""The verifier's verdicts on the rollouts of a step: one per rollout, and an error if an objective would lack one."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from tests.unit.test_config_checks import make_config
from tests.unit.test_packing import make_rollout
from tropd_mcore.config.schema import Config
from tropd_mcore.data.verdicts import Verdicts, accuracy, rewards, verify_rollouts
from tropd_mcore.errors import DataError


class Speller:
    """A renderer whose text of ids is their digits. Id 9 opens a thinking block, id 8 closes one."""

    def decode(self, ids: np.ndarray, *, keep: Sequence[str] = ()) -> str:
        assert tuple(keep) == ("<think>", "</think>")
        return "".join({9: "<think>", 8: "</think>"}.get(int(index), str(index)) for index in ids)

    def ends_with(self, prompt_ids: np.ndarray, text: str) -> bool:
        return self.decode(prompt_ids, keep=("<think>", "</think>")).endswith(text)


def config_of(kind: str, verifier: str = "exact_match") -> Config:
    return make_config(objective={"kind": kind}, verifier={"kind": verifier, "pattern": "(.+)"})


def rollouts_of(*answers: str | None) -> list:
    made = [make_rollout(index, 3, 2, 4, False) for index in range(len(answers))]
    return [replace(rollout, answer=answer) for rollout, answer in zip(made, answers, strict=True)]


def test_prefix_and_response_are_judged_together() -> None:
    first = rollouts_of("x")[0]
    right = "".join(str(index) for index in [*first.prefix_ids, *first.response_ids])
    verdicts = verify_rollouts(rollouts_of(right, "x", None), Speller(), config_of("opd"))
    assert verdicts == Verdicts([True, False, None], unfinished=0.0)
    assert accuracy(verdicts.right) == 0.5
    np.testing.assert_array_equal(rewards(verdicts.right), [1.0, 0.0, np.nan])


@pytest.mark.parametrize(
    ("changes", "right"),
    [
        ({}, True),
        ({"finish_reason": "length"}, False),
        ({"prompt_ids": [5, 9]}, False),
        ({"prompt_ids": [5, 9], "prefix_ids": [4, 8]}, True),
        ({"prefix_ids": [9]}, False),
        ({"response_ids": [1, 2, 9]}, False),
        ({"response_ids": [9, 3, 8, 1, 2]}, True),
    ],
)
def test_a_truncated_sample_or_one_still_thinking_is_wrong_and_counted(changes: dict, right: bool) -> None:
    """Cut by rollout.truncate as by any other budget: the rollout says `length`."""
    base: dict = {"prompt_ids": [5], "prefix_ids": [], "response_ids": [1, 2]}
    ids = {name: np.array(value, np.int32) for name, value in (base | changes).items() if name != "finish_reason"}
    rollout = replace(rollouts_of("12")[0], **ids, finish_reason=changes.get("finish_reason", "stop"))
    other = replace(rollouts_of("12")[0], **ids, answer=None)
    verdicts = verify_rollouts([rollout, other], Speller(), config_of("opd"))
    assert verdicts == Verdicts([right, None], unfinished=0.0 if right else 1.0)
    lenient = make_config(verifier={"kind": "exact_match", "pattern": "(.+)", "unfinished": "judge"})
    cut = replace(rollout, finish_reason="length")
    assert verify_rollouts([cut], Speller(), lenient) == verify_rollouts([rollout], Speller(), lenient)
    assert verify_rollouts([cut], Speller(), lenient).unfinished == 0.0


def test_without_a_verifier_no_sample_is_judged() -> None:
    verdicts = verify_rollouts(rollouts_of("x", None), Speller(), config_of("opd", verifier="none"))
    assert verdicts == Verdicts([None, None], unfinished=None) and accuracy(verdicts.right) is None


@pytest.mark.parametrize("kind", ["kdrl", "rlad"])
def test_an_objective_that_learns_from_verdicts_refuses_a_prompt_without_an_answer_by_name(kind: str) -> None:
    with pytest.raises(DataError, match=rf"kind={kind} learns from a verifier, but prompt 'p1' \(and 1 more\) has no"):
        verify_rollouts(rollouts_of("x", None, None), Speller(), config_of(kind))
