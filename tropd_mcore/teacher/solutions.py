"""Builds the input of a self-teacher: the prompt together with a correct solution of it.

This module does not decide whether a response is correct (see `verify`). Invariants: the solution is the response of
another sample of the same prompt, never the scored response. Prompt and solution are rendered like every other prompt.
The choice depends only on the order of the rollouts, their verdicts and the available room.

Shapes: S samples of a step.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

from tropd_mcore.config.schema import VerifierConfig
from tropd_mcore.data.chat import RawPrompt, Renderer
from tropd_mcore.data.chat_template import Chat, Message
from tropd_mcore.data.thinking import read_answer
from tropd_mcore.errors import DataError
from tropd_mcore.types import IntArray, Rollout

_FIELDS = re.compile(r"\{(prompt|solution)\}")

log = logging.getLogger(__name__)


class SolutionPrompts:
    """Renders prompts with a solution by objective.template. `raw_prompts` maps a prompt id to its prompt.

    Chats keep their tools and variables. The solution is the text that `verifier` judged: the response without its
    thinking.
    """

    def __init__(
        self, raw_prompts: Mapping[str, RawPrompt], renderer: Renderer, template: str, verifier: VerifierConfig
    ) -> None:
        self._raw_prompts = raw_prompts
        self._renderer = renderer
        self._template = template
        self._verifier = verifier

    def ids(self, prompt_id: str, solution: str) -> IntArray:
        """Return the ids of the prompt with the solution, int32 [length].

        Raises DataError if the prompt is unknown, has no user message, or is refused by the chat template.
        """
        raw_prompt = self._raw_prompts.get(prompt_id)
        if raw_prompt is None:
            raise DataError(
                f"prompt {prompt_id!r} of the rollouts is not in data.prompts; give the file they came from"
            )
        try:
            return self._renderer.prompt_ids(with_solution(raw_prompt, self._template, solution))
        except DataError as error:
            raise DataError(f"prompt {prompt_id!r} with a solution (objective.template): {error}") from error

    def longest_without_solution(self) -> int:
        """Return the number of tokens of the longest prompt with an empty solution. Raises DataError like `ids`."""
        return max(len(self.ids(prompt_id, "")) for prompt_id in self._raw_prompts)

    def contexts(
        self, rollouts: Sequence[Rollout], verdicts: Sequence[bool | None], *, longest: int
    ) -> list[IntArray | None]:
        """Return, for each sample, the ids that the teacher reads before the response; None if it has no teacher.

        The solution is the first correct one among the prompt's other samples that leaves room: context, prefix and
        response have at most `longest` tokens. Source: SDPO (the authors' code with its default
        dont_reprompt_on_self_success; their code cuts the context at a fixed length instead).
        """
        rendered: dict[int, IntArray] = {}

        def context(solved: int) -> IntArray:
            if solved not in rendered:
                solution = rollouts[solved]
                rendered[solved] = self.ids(solution.prompt_id, self._text(solution))
            return rendered[solved]

        found: list[IntArray | None] = []
        too_long = 0
        for rollout, others in zip(rollouts, other_solutions(rollouts, verdicts), strict=True):
            room = longest - len(rollout.prefix_ids) - len(rollout.response_ids)
            found.append(next((ids for ids in map(context, others) if len(ids) <= room), None))
            too_long += bool(others) and found[-1] is None
        if too_long:
            log.warning(
                "%d samples have no teacher: no solution of their prompt fits before their response into %d tokens "
                "(batch.tokens_per_micro_batch, the student's context)",
                too_long,
                longest,
            )
        return found

    def _text(self, rollout: Rollout) -> str:
        """The text that the verifier judged."""
        said = read_answer(self._verifier, self._renderer, rollout)
        assert said is not None, "a response without an answer is not correct"
        return said


def with_solution(raw_prompt: RawPrompt, template: str, solution: str) -> RawPrompt:
    """Fill {prompt} and {solution} in `template`.

    A text prompt is replaced as a whole; in a chat, the last user message is replaced. All other braces are plain text.
    Raises DataError if the chat has no user message.
    """

    def filled(prompt: str) -> str:
        values = {"prompt": prompt, "solution": solution}
        return _FIELDS.sub(lambda match: values[match[1]], template)

    if isinstance(raw_prompt, str):
        return filled(raw_prompt)
    if isinstance(raw_prompt, Chat):
        return dataclasses.replace(raw_prompt, messages=_with_solution(raw_prompt.messages, filled))
    return _with_solution(raw_prompt, filled)


def _with_solution(messages: Sequence[Message], filled: Callable[[str], str]) -> list[Message]:
    last = max((place for place, message in enumerate(messages) if message["role"] == "user"), default=None)
    if last is None:
        raise DataError("expected a message of role `user`, found none; the template would replace it")
    changed = {**messages[last], "content": filled(messages[last]["content"])}
    return [*messages[:last], changed, *messages[last + 1 :]]


def other_solutions(rollouts: Sequence[Rollout], verdicts: Sequence[bool | None]) -> Iterator[list[int]]:
    """Yield, for each sample, the other samples of its prompt that are correct, in the order of the rollouts."""
    correct: dict[str, list[int]] = defaultdict(list)
    for index, (rollout, verdict) in enumerate(zip(rollouts, verdicts, strict=True)):
        if verdict:
            correct[rollout.prompt_id].append(index)
    for index, rollout in enumerate(rollouts):
        yield [other for other in correct[rollout.prompt_id] if other != index]
