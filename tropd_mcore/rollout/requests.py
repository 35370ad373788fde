"""Builds the sampling requests of a step from its prompts: teacher prefix, token budget, sample ids.

This module does not compute the guidance schedule (see `config.derived`) and does not sample (see `sampler`).
Invariant: requests are a pure function of (prompts, step, config). A prefix is the beginning of the stored teacher
response as token ids; nothing is tokenised again.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from tropd_mcore.config.derived import new_token_budget, prefix_length
from tropd_mcore.config.schema import Config
from tropd_mcore.errors import DataError
from tropd_mcore.types import IntArray, Prompt, Rollout, SampleRequest

TEACHER = "teacher"
"""Policy version of a response of the teacher."""


def build_requests(
    prompts: Sequence[Prompt], *, step: int, config: Config, longest_response: int
) -> list[SampleRequest]:
    """Return `rollout.samples_per_prompt` requests per prompt, in the order of the prompts.

    All samples of a prompt share one prefix. Only the first sample carries the loss of the prefix, and none does if
    `objective.guidance.loss` is `none`. Sample ids are `<step>/<prompt id>/<index>`. If a prompt appears twice in a
    step, its index continues, so ids never repeat. `longest_response`: tokens of the longest stored response (`cap`
    mode). Raises DataError if guidance needs a stored response and the prompt has none. Source: docs/method.md, 6.
    """
    prefix_loss = config.objective.has_prefix_loss
    seen: Counter[str] = Counter()
    requests = []
    for prompt in prompts:
        prefix_ids = _prefix(prompt, step, config, longest_response)
        for position in range(config.rollout.samples_per_prompt):
            requests.append(
                SampleRequest(
                    sample_id=f"{step:06d}/{prompt.prompt_id}/{seen[prompt.prompt_id]}",
                    prompt_id=prompt.prompt_id,
                    prompt_ids=prompt.token_ids,
                    prefix_ids=prefix_ids,
                    max_new_tokens=new_token_budget(step, len(prefix_ids), config),
                    carries_prefix_loss=position == 0 and prefix_loss,
                    answer=prompt.answer,
                    teacher=prompt.teacher,
                )
            )
            seen[prompt.prompt_id] += 1
    return requests


def responses_as_rollouts(prompts: Sequence[Prompt], *, step: int, end_id: int | Mapping[str, int]) -> list[Rollout]:
    """Return the stored teacher response of each prompt as a rollout that is all prefix, with nothing of the student.

    `end_id` is added to a response that the teacher ended by itself; with several teachers, it has one id for each.
    Every sample carries its own loss.
    """
    nothing = np.zeros(0, dtype=np.float32)
    seen: Counter[str] = Counter()
    rollouts = []
    for prompt in prompts:
        assert prompt.teacher_response_ids is not None, "prompts without a response are refused when they are read"
        end = [end_id if isinstance(end_id, int) else end_id[prompt.teacher or ""]] if prompt.teacher_finished else []
        rollouts.append(
            Rollout(
                sample_id=f"{step:06d}/{prompt.prompt_id}/{seen[prompt.prompt_id]}",
                prompt_id=prompt.prompt_id,
                prompt_ids=prompt.token_ids,
                prefix_ids=np.concatenate([prompt.teacher_response_ids, np.array(end)]).astype(np.int32),
                response_ids=np.zeros(0, dtype=np.int32),
                rollout_logp=nothing,
                trust_u=nothing,
                policy_version=TEACHER,
                finish_reason="stop" if prompt.teacher_finished else "length",
                carries_prefix_loss=True,
                answer=prompt.answer,
                teacher=prompt.teacher,
            )
        )
        seen[prompt.prompt_id] += 1
    return rollouts


def are_taught(rollouts: Sequence[Rollout]) -> bool:
    """Return whether these are responses of the teacher (`responses_as_rollouts`), with nothing of the student."""
    return bool(rollouts) and all(rollout.policy_version == TEACHER for rollout in rollouts)


def cut_response(rollout: Rollout, longest: int) -> Rollout:
    """Return `rollout` with at most `longest` response tokens, as if it had been sampled with that budget."""
    longest = max(longest, 0)
    if len(rollout.response_ids) <= longest:
        return rollout
    return dataclasses.replace(
        rollout,
        response_ids=rollout.response_ids[:longest],
        rollout_logp=rollout.rollout_logp[:longest],
        trust_u=rollout.trust_u[:longest],
        finish_reason="length",
    )


def _prefix(prompt: Prompt, step: int, config: Config, longest_response: int) -> IntArray:
    if config.objective.active_guidance is None:
        return np.zeros(0, dtype=np.int32)
    if prompt.teacher_response_ids is None:
        raise DataError(
            f"objective.guidance is enabled but prompt {prompt.prompt_id!r} has no response in data.teacher_responses: "
            "add it (`tropd prefixes`) or set objective.guidance.enabled=false"
        )
    length = prefix_length(len(prompt.teacher_response_ids), step, config, longest_response=longest_response)
    return prompt.teacher_response_ids[:length].astype(np.int32)
