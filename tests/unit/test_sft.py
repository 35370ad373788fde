"""Supervised fine-tuning: what it trains on, what it needs, and what it leaves alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.library_cases import VP, Case
from tropd_mcore import TeacherTopK, distill_loss, objectives
from tropd_mcore.config.checks import problems_across_sections
from tropd_mcore.config.derived import longest_sample, reads_responses, samples_rollouts, used_servers
from tropd_mcore.config.schema import Config
from tropd_mcore.data.responses import scan_responses
from tropd_mcore.rollout.requests import responses_as_rollouts
from tropd_mcore.types import Prompt


def make_config(**run: str) -> Config:
    return Config.model_validate(
        {
            "run": {"dir": "runs/a", **run},
            "student": {"path": "models/student"},
            "teacher": {"kind": "sglang", "path": "models/teacher"},
            "data": {"prompts": "prompts.jsonl", "teacher_responses": "responses.jsonl"},
            "objective": {"kind": "sft"},
        }
    )


def prompt(name: str, *, finished: bool = True) -> Prompt:
    return Prompt(name, np.array([3, 4], np.int32), "42", np.array([7, 8, 9], np.int32), finished)


def test_a_response_becomes_a_sample_of_teacher_tokens_with_its_end_if_it_has_one() -> None:
    done, cut = responses_as_rollouts([prompt("a"), prompt("b", finished=False)], step=5, end_id=2)
    assert done.prefix_ids.tolist() == [7, 8, 9, 2] and cut.prefix_ids.tolist() == [7, 8, 9]
    assert (done.finish_reason, cut.finish_reason) == ("stop", "length")
    for rollout in (done, cut):
        assert rollout.carries_prefix_loss and len(rollout.response_ids) == len(rollout.rollout_logp) == 0
        assert rollout.prefix_ids.dtype == np.int32 and rollout.answer == "42"


def test_a_prompt_that_comes_twice_in_a_step_has_two_sample_ids() -> None:
    found = responses_as_rollouts([prompt("a"), prompt("b"), prompt("a")], step=5, end_id=2)
    assert [rollout.sample_id for rollout in found] == ["000005/a/0", "000005/b/0", "000005/a/1"]


def test_sft_uses_no_server_and_reads_the_stored_responses() -> None:
    config = make_config()
    assert used_servers(config) == {} and not samples_rollouts(config) and reads_responses(config)
    assert longest_sample(config, longest_prompt=5, longest_response=7) == 13


def test_sft_without_responses_and_with_a_replay_is_refused() -> None:
    config = make_config(replay="runs/b")
    (replayed,) = problems_across_sections(config)
    assert replayed.startswith("run.replay: objective.kind=sft trains on data.teacher_responses")
    bare = config.model_copy(update={"data": config.data.model_copy(update={"teacher_responses": None})})
    assert (
        "objective.kind=sft needs data.teacher_responses, which is not set; write the file with `tropd prefixes`"
        in (problems_across_sections(bare))
    )


def test_a_response_that_was_cut_is_remembered(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    lines = [{"id": "a", "response_ids": [5, 2]}, {"id": "b", "response_ids": [5], "finished": False}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = scan_responses(path, [2], vocab_size=10)
    assert found.cut == {"b"} and found.by_prompt["a"].tolist() == [5] and not found.problems


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_the_loss_is_the_negative_log_likelihood_and_needs_nothing_of_the_teacher(reduction: str) -> None:
    case, leaf = Case(), Case().logits().requires_grad_()
    out = distill_loss(
        leaf, case.x, TeacherTopK(), objectives.sft(), vp=VP, student_mask_T=case.mask, prefix_mask_T=~case.mask,
        reduction=reduction,
    )  # fmt: skip
    expected_leaf = case.logits().requires_grad_()
    expected_T = -case.at(expected_leaf.log_softmax(-1))
    found = out.loss_sum if reduction == "sum" else out.loss_T.sum()
    torch.testing.assert_close(found, expected_T.sum(), rtol=1e-12, atol=1e-12)
    found.backward()
    expected_T.sum().backward()
    torch.testing.assert_close(leaf.grad, expected_leaf.grad, rtol=1e-11, atol=1e-12)
