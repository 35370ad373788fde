"""A server that lies about values: any value that no softmax and no continuation can give is refused by its field."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tropd_mcore.errors import AnswerError
from tropd_mcore.serving.wire import (
    Generation,
    GenerationRequest,
    ScoringRequest,
    TokenScores,
    read_generation,
    read_scores,
)

WIDTH, END = 50, 2
ASK = GenerationRequest(np.array([3, 4, 9], np.int32), max_new_tokens=4, vocab_size=WIDTH, stop_token_ids=(END, 5))
Change = Callable[[dict[str, Any]], object]


def generation(ids: list[Any], reason: str = "length", **finish: Any) -> dict[str, Any]:
    """An honest answer with these tokens."""
    return {
        "output_ids": ids,
        "meta_info": {
            "finish_reason": {"type": reason, **finish},
            "output_token_logprobs": [[-0.5, token_id, None] for token_id in ids],
            "prompt_tokens": 3,
            "weight_version": "v1",
        },
    }


def read(answer: dict[str, Any]) -> Generation:
    return read_generation(answer, ASK)


@pytest.mark.parametrize("value", [WIDTH, 10**10, -3, -1, 2.0, True, None, "7"], ids=str)
def test_an_id_outside_the_served_vocabulary_is_refused_before_it_is_converted(value: object) -> None:
    with pytest.raises(AnswerError, match=r"in output_ids\[1\]; expected a token id in \[0, 50\)"):
        read(generation([7, value, 8, 9]))


@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize("logp", [3.0, 0.5, 0.0011])
def test_a_log_prob_above_0_is_refused(logp: float, place: int) -> None:
    answer = generation([7, 8, 9, 10])
    answer["meta_info"]["output_token_logprobs"][place][0] = logp
    with pytest.raises(AnswerError, match=rf"log-prob \+.* in output_token_logprobs\[{place}\]; expected at most 0"):
        read(answer)


@pytest.mark.parametrize("value", [-1e39, -(10**400), -float("inf"), float("nan"), True, None])
def test_a_log_prob_outside_float32_is_refused(value: object) -> None:
    answer = generation([7, 8, 9, 10])
    answer["meta_info"]["output_token_logprobs"][2][0] = value
    with pytest.raises(AnswerError, match=r"output_token_logprobs\[2\]; expected a finite number"):
        read(answer)


def test_a_log_prob_slightly_above_0_by_rounding_is_accepted() -> None:
    answer = generation([7, 8, 9, 10])
    answer["meta_info"]["output_token_logprobs"][0][0] = 1e-6
    assert read(answer).logp[0] == np.float32(1e-6)


def test_an_answer_that_stops_without_an_end_token_is_refused() -> None:
    with pytest.raises(AnswerError, match=r"stopped at token 8; expected one of \[2, 5\] \(rollout.end_tokens\)"):
        read(generation([7, 8], "stop"))


@pytest.mark.parametrize("matched", ["NaN happened", 5, 7])
def test_an_end_token_that_the_server_wrote_over_another_token_is_refused(matched: object) -> None:
    """SGLang replaces a token that it could not sample (NaN logits) and reports this only in `matched`."""
    with pytest.raises(AnswerError, match="but the last token is 2; expected the same token"):
        read(generation([7, END], "stop", matched=matched))


def test_tokens_after_an_end_token_are_refused() -> None:
    with pytest.raises(AnswerError, match=r"2 more tokens after the end token 5 in output_ids\[1\]"):
        read(generation([7, 5, 8, END], "stop", matched=END))


def test_aborted_tokens_that_go_on_after_an_end_token_are_refused() -> None:
    with pytest.raises(AnswerError, match=r"1 more tokens after the end token 5 in output_ids\[1\]"):
        read(generation([7, 5, 8], "abort"))


@pytest.mark.parametrize(
    ("ids", "reason"), [([7, 8, 9], "length"), ([7, 8, 9, 10, 11], "length"), ([7, 8, 9, 10, END], "stop")]
)
def test_a_continuation_of_another_length_than_requested_is_refused(ids: list[int], reason: str) -> None:
    with pytest.raises(AnswerError, match=rf"answered {len(ids)} tokens that ended by '{reason}'; expected 4"):
        read(generation(ids, reason))


def test_a_prompt_truncated_by_the_server_is_refused() -> None:
    answer = generation([7, 8, 9, 10])
    answer["meta_info"]["prompt_tokens"] = 2
    with pytest.raises(AnswerError, match="prompt_tokens 2; 3 were sent: the prompt was cut"):
        read(answer)


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_an_end_token_at_the_length_limit_counts_as_a_regular_end(reason: str) -> None:
    """SGLang reports `length` if the last allowed token is the end token."""
    found = read(generation([7, 8, 9, END], reason))
    assert found.finish_reason == "stop" and found.output_ids.tolist() == [7, 8, 9, END]


def test_an_honest_answer_passes() -> None:
    assert read(generation([7, 8, 9, 10])).finish_reason == "length"
    assert read(generation([7, 5], "stop", matched=5)).finish_reason == "stop"
    anywhere = GenerationRequest(ASK.input_ids, max_new_tokens=4, vocab_size=WIDTH)
    assert read_generation(generation([7, 9], "stop", matched=9), anywhere).finish_reason == "stop"


SCORED = np.array([3, 9, 4, 6], np.int32)
IDS = [[4, 7, 9], [8, 6, 11], [6, 0, 1]]
LOGP = np.log([[0.5, 0.3, 0.1], [0.6, 0.2, 0.1], [0.9, 0.05, 0.01]])
OWN = [LOGP[0][2], np.log(0.05), LOGP[2][0]]
"""Of the tokens 9 (third candidate), 4 (none) and 6 (the first)."""


def scores(own: Any = OWN, ids: Any = IDS, logp: Any = LOGP, *, width: int = WIDTH) -> TokenScores:
    def encoded(values: Any, dtype: str) -> str:
        return base64.b64encode(np.array(values, dtype).tobytes()).decode()

    entries = [[float(value), int(token), None] for value, token in zip(own, SCORED[1:], strict=True)]
    meta = {
        "input_token_logprobs": [[None, int(SCORED[0]), None], *entries],
        "input_top_logprobs_shape": [3, 3],
        "input_top_logprobs_null_prefix": 1,
        "input_top_logprobs_val_flat_b64": encoded(logp, "<f4"),
        "input_top_logprobs_idx_flat_b64": encoded(ids, "<i4"),
    }
    return read_scores({"meta_info": meta}, ScoringRequest(SCORED, first=1, topk=3, vocab_size=width))


def test_honest_scores_pass() -> None:
    found = scores()
    assert found.topk_ids_NK.tolist() == IDS
    np.testing.assert_allclose(found.logp_N, OWN, rtol=1e-6)


def changed(values: Any, row: int, column: int, value: float) -> Any:
    copy = np.array(values, dtype=np.float64).copy()
    copy[row, column] = value
    return copy


@pytest.mark.parametrize("bad", [-1, WIDTH, 10**9])
def test_a_candidate_outside_the_teachers_vocabulary_is_refused(bad: int) -> None:
    with pytest.raises(AnswerError, match=rf"candidate {bad} in the top log-probs; expected ids in \[0, 50\)"):
        scores(ids=changed(IDS, 1, 2, bad))


def test_a_duplicate_candidate_is_refused() -> None:
    with pytest.raises(AnswerError, match="candidate 8 twice for one token"):
        scores(ids=changed(IDS, 1, 2, 8))


def test_a_candidate_with_probability_above_1_is_refused() -> None:
    with pytest.raises(AnswerError, match=r"log-prob \+2 in the top log-probs; expected at most 0"):
        scores(logp=changed(LOGP, 2, 1, 2.0))


def test_candidates_with_total_probability_above_1_are_refused() -> None:
    with pytest.raises(AnswerError, match=r"3 candidates of probability 1\.300 together"):
        scores(logp=changed(LOGP, 1, 1, np.log(0.6)))


def test_a_score_above_0_is_refused() -> None:
    with pytest.raises(AnswerError, match=r"log-prob \+3 in input_token_logprobs\[1\]"):
        scores(own=[OWN[0], 3.0, OWN[2]])


def test_a_score_that_contradicts_its_own_candidate_is_refused() -> None:
    with pytest.raises(AnswerError, match=r"for token 6, but its top log-probs say -0\.105; expected the same"):
        scores(own=[OWN[0], OWN[1], OWN[2] - 0.5])


def test_a_score_that_beats_all_candidates_is_refused() -> None:
    with pytest.raises(AnswerError, match=r"log-prob -1\.2 for token 4, but its top log-probs say at most -2\.3"):
        scores(own=[OWN[0], -1.2, OWN[2]])
