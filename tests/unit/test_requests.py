"""Guidance schedule, prefix rule and request building against values written out from the specification."""

import math

import numpy as np
import pytest

from tropd_mcore.config.derived import alpha, longest_response_at, prefix_length
from tropd_mcore.config.schema import Config
from tropd_mcore.errors import DataError
from tropd_mcore.rollout.requests import build_requests, cut_response
from tropd_mcore.types import Prompt, Rollout


def make_config(*, guidance=None, rollout=None, steps=200, kind="tropd") -> Config:
    objective = {"kind": kind} if kind == "opd" else {"kind": kind, "guidance": guidance or {}}
    return Config.model_validate(
        {
            "run": {"dir": "run", "steps": steps},
            "student": {"path": "student"},
            "teacher": {"kind": "megatron", "path": "teacher"},
            "data": {"prompts": "prompts.jsonl"},
            "rollout": rollout or {},
            "objective": objective,
        }
    )


def make_prompt(name: str, response_length: int | None) -> Prompt:
    response = None if response_length is None else np.arange(1000, 1000 + response_length, dtype=np.int32)
    return Prompt(name, np.array([5, 6, 7], dtype=np.int32), "42", response)


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 1.0), (50, 0.853553), (100, 0.5), (150, 0.146447), (200, 0.0), (201, 0.0), (9999, 0.0)]
)
def test_cosine_alpha_has_the_values_of_the_specification(step, expected):
    assert alpha(step, make_config()) == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize(("step", "expected"), [(0, 1.0), (50, 0.75), (100, 0.5), (150, 0.25), (200, 0.0), (300, 0.0)])
def test_linear_alpha_falls_evenly_and_stays_at_zero(step, expected):
    assert alpha(step, make_config(guidance={"schedule": "linear"})) == expected


@pytest.mark.parametrize("step", [0, 50, 100, 150, 200, 300])
def test_constant_alpha_is_one_at_every_step(step):
    assert alpha(step, make_config(guidance={"schedule": "constant"})) == 1.0


def test_alpha_is_scheduled_over_total_steps_if_set_and_over_run_steps_otherwise():
    assert alpha(10, make_config(steps=40)) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert alpha(10, make_config(steps=40, guidance={"total_steps": 20})) == pytest.approx(0.5)
    assert alpha(20, make_config(steps=40, guidance={"total_steps": 20})) == 0.0


@pytest.mark.parametrize("config", [make_config(kind="opd"), make_config(guidance={"enabled": False})])
def test_without_guidance_alpha_is_zero_and_no_response_is_needed(config):
    assert alpha(0, config) == 0.0
    requests = build_requests([make_prompt("a", None)], step=0, config=config, longest_response=0)
    assert [len(request.prefix_ids) for request in requests] == [0] * 4
    assert not any(request.carries_prefix_loss for request in requests)


def test_the_prefix_length_is_the_floor_of_alpha_times_the_response_length():
    config = make_config(guidance={"min_continuation": 1})
    assert [prefix_length(1001, step, config, longest_response=5000) for step in (0, 50, 100, 150, 200)] == [
        1000,  # the whole response less one token for the student
        854,
        500,
        146,
        0,
    ]


def test_min_continuation_is_always_left_to_the_student_and_short_responses_give_no_prefix():
    config = make_config(guidance={"min_continuation": 64})
    assert prefix_length(100, 0, config, longest_response=100) == 36
    assert prefix_length(64, 0, config, longest_response=100) == 0
    assert prefix_length(3, 0, config, longest_response=100) == 0


def test_cap_mode_cuts_only_responses_longer_than_the_cap():
    config = make_config(guidance={"length_mode": "cap", "min_continuation": 10})
    assert prefix_length(300, 100, config, longest_response=1000) == 290
    assert prefix_length(900, 100, config, longest_response=1000) == 500
    assert prefix_length(1000, 200, config, longest_response=1000) == 0


def test_full_budget_is_independent_of_the_prefix_and_shared_budget_subtracts_it():
    rollout = {"max_new_tokens": 500, "prompts_per_step": 1}
    prompt = make_prompt("a", 400)
    full = build_requests([prompt], step=100, config=make_config(rollout=rollout), longest_response=400)
    shared_config = make_config(rollout=rollout, guidance={"continuation_budget": "shared"})
    shared = build_requests([prompt], step=100, config=shared_config, longest_response=400)
    assert {(len(request.prefix_ids), request.max_new_tokens) for request in full} == {(200, 500)}
    assert {(len(request.prefix_ids), request.max_new_tokens) for request in shared} == {(200, 300)}


def test_a_shared_budget_never_leaves_less_than_min_continuation_new_tokens():
    config = make_config(rollout={"max_new_tokens": 100}, guidance={"continuation_budget": "shared"})
    request = build_requests([make_prompt("a", 4000)], step=0, config=config, longest_response=4000)[0]
    assert (len(request.prefix_ids), request.max_new_tokens) == (36, 64)


def test_samples_of_a_prompt_share_the_prefix_and_the_first_alone_carries_its_loss():
    prompts = [make_prompt("a", 200), make_prompt("b", 300)]
    requests = build_requests(prompts, step=12, config=make_config(), longest_response=300)
    assert [request.sample_id for request in requests] == [f"000012/{p}/{i}" for p in "ab" for i in range(4)]
    assert [request.carries_prefix_loss for request in requests] == [True, False, False, False] * 2
    for request, prompt in zip(requests, [p for p in prompts for _ in range(4)], strict=True):
        assert request.prefix_ids.dtype == np.int32 and len(request.prefix_ids) > 0
        assert np.array_equal(request.prefix_ids, prompt.teacher_response_ids[: len(request.prefix_ids)])
        assert np.array_equal(request.prompt_ids, prompt.token_ids) and request.answer == "42"


def test_no_sample_carries_a_prefix_loss_that_is_switched_off():
    requests = build_requests(
        [make_prompt("a", 200)], step=0, config=make_config(guidance={"loss": "none"}), longest_response=200
    )
    assert len(requests[0].prefix_ids) > 0 and not any(request.carries_prefix_loss for request in requests)


def test_samples_of_a_prompt_that_appears_twice_in_a_step_have_unique_ids():
    requests = build_requests([make_prompt("a", 200)] * 2, step=0, config=make_config(), longest_response=200)
    assert [request.sample_id[-1] for request in requests] == list("01234567")
    assert [request.carries_prefix_loss for request in requests] == [True, False, False, False] * 2


def test_a_missing_teacher_response_names_the_prompt_and_the_key():
    with pytest.raises(DataError, match=r"guidance is enabled but prompt 'p7' .* data\.teacher_responses"):
        build_requests([make_prompt("p7", None)], step=0, config=make_config(), longest_response=0)


def truncated(**rollout) -> dict:
    return {"max_new_tokens": 1000, "truncate": {"start": 100, "increment": 250, "every": 3}} | rollout


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 100), (2, 100), (3, 350), (5, 350), (6, 600), (9, 850), (12, 1000), (10**6, 1000)]
)
def test_the_response_limit_grows_by_stages_up_to_the_longest(step, expected):
    config = make_config(kind="opd", rollout=truncated())
    assert longest_response_at(step, config) == expected
    requests = build_requests([make_prompt("a", None)], step=step, config=config, longest_response=0)
    assert {request.max_new_tokens for request in requests} == {expected}


def test_a_shared_budget_leaves_min_continuation_tokens_at_every_stage():
    config = make_config(guidance={"continuation_budget": "shared", "schedule": "constant"}, rollout=truncated())
    for step, longest in ((0, 100), (3, 350)):
        (request, *_) = build_requests([make_prompt("a", 5000)], step=step, config=config, longest_response=5000)
        assert len(request.prefix_ids) == longest - 64
        assert request.max_new_tokens == 64


def test_a_replayed_response_is_cut_to_what_the_step_allows():
    rollout = Rollout(
        sample_id="000000/a/0",
        prompt_id="a",
        prompt_ids=np.array([5], dtype=np.int32),
        prefix_ids=np.array([6], dtype=np.int32),
        response_ids=np.arange(7, dtype=np.int32),
        rollout_logp=-np.arange(7, dtype=np.float32),
        trust_u=np.linspace(0, 0.9, 7, dtype=np.float32),
        policy_version="v",
        finish_reason="stop",
        carries_prefix_loss=True,
        answer=None,
    )
    cut = cut_response(rollout, 4)
    assert cut.response_ids.tolist() == [0, 1, 2, 3] and cut.rollout_logp.tolist() == [0, -1, -2, -3]
    assert len(cut.trust_u) == 4 and cut.finish_reason == "length" and cut.prefix_ids.tolist() == [6]
    assert cut_response(rollout, 7) is rollout
