"""The input of a self-teacher: the filled template, the choice of the solution, and settings without one."""

from __future__ import annotations

import logging
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tiny_models import tiny_tokenizer
from tests.unit.test_packing import make_rollout
from tropd_mcore.config.checks import problems_across_sections, self_teacher_problems
from tropd_mcore.config.plan import plan
from tropd_mcore.config.schema import Config, VerifierConfig
from tropd_mcore.data.chat import Renderer
from tropd_mcore.data.chat_template import Chat
from tropd_mcore.errors import DataError
from tropd_mcore.teacher.solutions import SolutionPrompts, other_solutions, with_solution
from tropd_mcore.types import Rollout

TOKENIZER = tiny_tokenizer()
JUDGED = VerifierConfig(kind="exact_match")
TEMPLATE = "{prompt} | {solution} | {prompt} {other} \\boxed{}"
CHAT = [
    {"role": "system", "content": "add"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three {solution}"},
]


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    path = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save_pretrained(path)
    return Renderer(path)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def rollout(index: int, prompt_id: str, response: str, prefix: str = "") -> Rollout:
    made = make_rollout(index, 3, 0, 4, False)
    return replace(
        made,
        prompt_id=prompt_id,
        prefix_ids=np.array(ids(prefix), dtype=np.int32),
        response_ids=np.array([*ids(response), TOKENIZER.eos_token_id], dtype=np.int32),
    )


def test_prompt_and_solution_are_filled_in_once_and_other_braces_are_text() -> None:
    assert with_solution("2+2={solution}", TEMPLATE, "a {prompt}") == (
        "2+2={solution} | a {prompt} | 2+2={solution} {other} \\boxed{}"
    )


def test_the_template_replaces_only_the_last_user_message_of_a_chat() -> None:
    chat = [*CHAT, {"role": "assistant", "content": "begun"}]
    changed = with_solution(chat, "{prompt}:{solution}", "six")
    assert changed == [*CHAT[:3], {"role": "user", "content": "three {solution}:six"}, chat[4]]
    assert chat[3]["content"] == "three {solution}"
    with pytest.raises(DataError, match="expected a message of role `user`, found none"):
        with_solution(CHAT[:1], "{solution}", "six")


def test_a_context_is_rendered_like_every_prompt(renderer: Renderer) -> None:
    prompts = SolutionPrompts({"chat": CHAT, "text": "count"}, renderer, "{prompt}{solution}", JUDGED)
    assert prompts.ids("text", " six").tolist() == ids("count six")
    chat = TOKENIZER.apply_chat_template(
        [*CHAT[:3], {"role": "user", "content": "three {solution} six"}], add_generation_prompt=True
    )
    assert prompts.ids("chat", " six").tolist() == chat["input_ids"]
    assert prompts.longest_without_solution() == len(prompts.ids("chat", ""))
    with pytest.raises(DataError, match=r"^prompt 'lost' of the rollouts is not in data.prompts; [^\n]*$"):
        prompts.ids("lost", "")
    with pytest.raises(DataError, match=r"^prompt 'system' with a solution \(objective.template\): expected a message"):
        SolutionPrompts({"system": CHAT[:1]}, renderer, "{solution}", JUDGED).longest_without_solution()


def test_a_context_has_the_tools_the_variables_and_the_date_of_its_prompt(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d') }} {{ tools[0].name }} {{ mood }} {{ messages[-1].content }}"
    tokenizer.save_pretrained(tmp_path)
    asked = Chat(CHAT[3:], [{"name": "count"}], {"mood": "calm"}, date(2024, 2, 29))
    prompts = SolutionPrompts({"a": asked}, Renderer(tmp_path), "{prompt}{solution}", JUDGED)
    assert tokenizer.decode(prompts.ids("a", " six")) == "29 count calm three {solution} six"


def test_a_solution_is_the_part_of_a_response_that_the_verifier_judged(renderer: Renderer) -> None:
    """The response of the other sample without its thinking."""
    rollouts = [rollout(0, "a", " one"), rollout(1, "a", " two</think> three", prefix="<think> four")]
    prompts = SolutionPrompts({"a": "sum"}, renderer, "{prompt}:{solution}", JUDGED)
    found = prompts.contexts(rollouts, [False, True], longest=200)
    assert found[0] is not None and found[0].tolist() == ids("sum: three")
    whole = SolutionPrompts({"a": "sum"}, renderer, "{prompt}:{solution}", VerifierConfig(thinking=None))
    found = whole.contexts(rollouts, [False, True], longest=200)
    assert found[0] is not None and found[0].tolist() == ids("sum:<think> four two</think> three")


def test_the_solution_is_the_first_correct_other_sample_of_the_prompt(renderer: Renderer) -> None:
    rollouts = [
        rollout(0, "a", " one"),
        rollout(1, "b", " two"),
        rollout(2, "a", " three"),
        rollout(3, "a", " four", prefix=" seven"),
        rollout(4, "b", " five"),
        rollout(5, "c", " six"),
        rollout(6, "d", " six"),
    ]
    verdicts = [False, True, True, True, False, False, None]
    assert list(other_solutions(rollouts, verdicts)) == [[2, 3], [], [3], [2], [1], [], []]
    prompts = SolutionPrompts(dict.fromkeys("abcd", "sum"), renderer, "{prompt}:{solution}", JUDGED)
    found = prompts.contexts(rollouts, verdicts, longest=100)
    # The only correct sample of b has no teacher. A solution is shown with its prefix and without its EOS.
    expected = ["sum: three", None, "sum: seven four", "sum: three", "sum: two", None, None]
    assert [None if context is None else context.tolist() for context in found] == [
        None if text is None else ids(text) for text in expected
    ]


def test_a_solution_that_is_too_long_is_replaced_by_the_next_and_samples_without_one_are_counted(
    renderer: Renderer, caplog: pytest.LogCaptureFixture
) -> None:
    rollouts = [
        rollout(0, "a", " one"),
        rollout(1, "a", " two two two two two"),
        rollout(2, "a", " three three"),
        rollout(3, "a", " four four four four"),
    ]
    prompts = SolutionPrompts({"a": "sum"}, renderer, "{prompt}:{solution}", JUDGED)
    context = len(ids("sum: three three"))
    room = context + len(rollouts[0].response_ids)
    assert len(ids("sum: two two two two two")) > context
    with caplog.at_level(logging.WARNING):
        found = prompts.contexts(rollouts, [False, True, True, False], longest=room)
    assert found[0] is not None and found[0].tolist() == ids("sum: three three")
    assert len(found[0]) + len(rollouts[0].response_ids) == room
    assert found[1:] == [None, None, None]
    assert "3 samples have no teacher" in caplog.text and f"into {room} tokens" in caplog.text
    caplog.clear()
    assert prompts.contexts(rollouts, [False] * 4, longest=room) == [None] * 4
    assert not caplog.records


# ---- settings ----


def config(objective: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Config:
    base: dict[str, Any] = {
        "run": {"dir": "run"},
        "student": {"path": "student"},
        "teacher": {"path": "student"},
        "data": {"prompts": "prompts.jsonl"},
        "verifier": {"kind": "exact_match"},
        "objective": {"kind": "sdpo", **(objective or {})},
    }
    return Config.model_validate({**base, **{name: base.get(name, {}) | keys for name, keys in sections.items()}})


def test_the_defaults_of_sdpo_have_no_problem() -> None:
    assert problems_across_sections(config()) == []
    assert "the student itself, bfloat16, weights averaged at rate 0.05" in plan(config())


@pytest.mark.parametrize(
    ("objective", "sections", "expected"),
    [
        ({"template": "{prompt} {solutions}"}, {}, "objective.template: expected {solution}, where the teacher reads"),
        ({}, {"teacher": {"path": "teacher"}}, "teacher.path=teacher is not student.path=student; set teacher.path="),
        ({}, {"verifier": {"kind": "none"}}, "objective.kind=sdpo learns from a verifier, but verifier.kind=none"),
        ({}, {"rollout": {"samples_per_prompt": 1}}, "rollout.samples_per_prompt = 1; set it to 2 or more"),
        ({}, {"teacher": {"kind": "sglang"}}, "objective.kind=sdpo needs the teacher's log-probs"),
    ],
)
def test_settings_that_leave_the_student_without_a_teacher_give_one_line(
    objective: dict[str, Any], sections: dict[str, dict[str, Any]], expected: str
) -> None:
    (problem,) = problems_across_sections(config(objective, **sections))
    assert expected in problem and "\n" not in problem


@pytest.mark.parametrize("kind", ["sdpo", "opsd"])
def test_the_template_of_every_self_teacher_must_contain_the_solution(kind: str) -> None:
    (problem,) = problems_across_sections(config({"kind": kind, "template": "{prompt}"}))
    assert problem.startswith("objective.template: expected {solution}")
    assert problems_across_sections(config({"kind": kind})) == []


def test_packs_and_a_context_without_room_for_a_solution_are_refused() -> None:
    settings = config(rollout={"max_new_tokens": 100}, batch={"tokens_per_micro_batch": 151})
    assert self_teacher_problems(settings, longest_prompt=50, context=151) == []
    budget, context = self_teacher_problems(settings, longest_prompt=51, context=151)
    assert budget.startswith("batch.tokens_per_micro_batch = 151 but the teacher of objective.kind=sdpo can read 51")
    assert "set batch.tokens_per_micro_batch=251" in budget
    assert context.startswith(f"student.path={Path('student')}: its context is 151 tokens")
