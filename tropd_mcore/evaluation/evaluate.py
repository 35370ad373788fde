"""Accuracy of a model on held-out prompts, greedy and sampled, with counts and intervals.

This module does not start servers: the callable `generate` answers the prompts (`SglangClient.generate`). Invariants: a
prompt without an expected answer is refused. A failed generation is an error and never a wrong answer. Answers are
judged as in training. Two results are compared only if prompts and settings are the same.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import date
from pathlib import Path
from typing import Any

from tropd_mcore.config.schema import DataConfig, VerifierConfig
from tropd_mcore.data.chat import Renderer
from tropd_mcore.data.end_tokens import served_end_ids
from tropd_mcore.data.prompts import PromptNeeds, PromptSet, load_prompts
from tropd_mcore.data.thinking import read_answer_ids
from tropd_mcore.data.tokenizer import decode
from tropd_mcore.data.verify import found_answer, is_right
from tropd_mcore.errors import DataError, ServerError
from tropd_mcore.evaluation.statistics import (
    clustered_interval,
    paired_difference_interval,
    paired_mean_interval,
    pass_at,
    wilson_interval,
)
from tropd_mcore.files import file_digest, publish_text
from tropd_mcore.progress import counted, progress
from tropd_mcore.serving.wire import Generation, GenerationRequest
from tropd_mcore.weights.digest import folder_digest
from tropd_mcore.weights.served import read_vocab_size

log = logging.getLogger(__name__)

ANY_LENGTH = 1 << 31
"""Largest number of prompt tokens in an evaluation: no limit here, the server decides."""

Generate = Callable[[list[GenerationRequest]], Sequence[Generation | ServerError]]


@dataclass(frozen=True)
class EvaluationSettings:
    """Which prompts are answered, how they are sampled, and how answers are judged."""

    prompts: str
    """JSONL file as for `data.prompts`; every line needs an answer"""
    max_new_tokens: int
    samples: int = 4
    """Sampled answers per prompt in addition to the greedy one; 0 = greedy only"""
    temperature: float = 1.0
    top_p: float = 1.0
    verifier: str = "exact_match"
    pattern: str = VerifierConfig.model_fields["pattern"].default
    unfinished: str = "wrong"
    """verifier.unfinished"""
    thinking: list[str] | None = field(default_factory=lambda: list(VerifierConfig().thinking or ()))
    """verifier.thinking"""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """data.chat_template_kwargs"""
    template_date: str | None = None
    """data.template_date, YYYY-MM-DD"""
    limit: int | None = None
    """Number of prompts, from the start of the file; None = all"""
    end_ids: list[int] = field(default_factory=list)
    """End tokens of training (`data.end_tokens`). They end a response in addition to those of the model's files"""


@dataclass(frozen=True)
class Score:
    """Number of right answers out of `total`, with a 95 % interval of the accuracy."""

    correct: int
    total: int
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class Answer:
    """One answer and what became of it, for a reader who looks at single verdicts."""

    id: str
    """Of the prompt"""
    sample: int | None
    """Number of the sampled answer, from 0; None = the greedy one"""
    text: str
    """The answer with its special tokens, as the model wrote it"""
    finish_reason: str
    """`stop` or `length`"""
    found: str | None
    """What the verifier took for the answer; None if there is none"""
    expected: str
    right: bool


@dataclass(frozen=True)
class EvaluationResult:
    """The result of one model on one prompt file."""

    model: str
    weights_sha256: str
    """Digest of the folder's safetensors files (`weights.digest`)"""
    prompts_sha256: str
    """Hash of the prompt file"""
    settings: EvaluationSettings
    greedy: Score
    sampled: Score | None
    truncated: float
    """Share of the greedy answers that reached max_new_tokens"""
    mean_length: float
    """Mean number of tokens of a greedy answer"""
    greedy_correct: list[bool]
    """Per prompt, in the order of the file: whether the greedy answer is right"""
    template_date: str | None = None
    """The date that the chat template printed, YYYY-MM-DD; None if it printed none"""
    model_sha256: str = ""
    """Digest of the whole folder, including tokenizer, chat template and end tokens; "" in results of older releases"""
    sampled_correct: list[int] = field(default_factory=list)
    """Per prompt, in the order of the file: number of right sampled answers; empty in results of older releases"""
    pass_at: dict[str, float] = field(default_factory=dict)
    """k -> probability that one of k sampled answers is right (`statistics.pass_at`)"""
    answers: list[Answer] = field(default_factory=list, compare=False)
    """Every answer; saved in a file beside the result, and not read back with it"""

    def save(self, path: Path) -> None:
        """Write the result as JSON, and before it its answers (`answers_file`). Raises DataError if it cannot."""
        lines = (json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in self.answers)
        publish_text(answers_file(path), "".join(lines), key="--out")
        values = asdict(replace(self, answers=[]))
        del values["answers"]
        publish_text(path, json.dumps(values, indent=1) + "\n", key="--out")


def answers_file(path: Path) -> Path:
    """Return the JSONL file with the answers of the result at `path`."""
    return path.with_suffix(".answers.jsonl")


def load_result(path: Path) -> EvaluationResult:
    """Read what `EvaluationResult.save` wrote. Raises DataError."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        # Results of older releases lack some settings of the judgement.
        absent = [entry.name for entry in fields(EvaluationSettings) if entry.name not in values["settings"]]
        if absent:
            raise KeyError(f"settings.{absent[0]}")
        values["settings"] = EvaluationSettings(**values["settings"])
        values["greedy"] = Score(**values["greedy"])
        values["sampled"] = Score(**values["sampled"]) if values["sampled"] is not None else None
        return EvaluationResult(**values)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: expected a result of `tropd eval`: {error!r}") from error


def evaluate(model: Path, generate: Generate, settings: EvaluationSettings, *, today: date) -> EvaluationResult:
    """Answer every prompt with `generate`, which serves `model`, and judge the answers.

    `today` is the date that a chat template prints. Raises DataError if the prompts cannot be judged, and ServerError
    if an answer is missing.
    """
    renderer = Renderer(model)
    verifier = _verifier(settings)
    prompt_set = _read_prompts(renderer, settings, verifier, today)
    prompts = [prompt.token_ids for prompt in prompt_set.prompts]
    expected = [str(prompt.answer) for prompt in prompt_set.prompts]
    vocab_size, stops = read_vocab_size(model), served_end_ids(settings.end_ids, model)

    def answers(temperature: float, samples: int) -> list[Generation]:
        requests = [
            GenerationRequest(
                input_ids=ids,
                max_new_tokens=settings.max_new_tokens,
                vocab_size=vocab_size,
                temperature=temperature,
                top_p=settings.top_p if temperature > 0 else 1.0,
                stop_token_ids=stops,
            )
            for ids in prompts
            for _ in range(samples)
        ]
        return [_present(generation) for generation in generate(requests)]

    def judged(generations: list[Generation], samples: int, *, greedy: bool) -> list[Answer]:
        found: list[Answer] = []
        with progress(log, "verifier", total=len(generations), unit="responses judged") as state:
            for index, generation in enumerate(counted(generations, state)):
                ids, finished = generation.output_ids, generation.finish_reason == "stop"
                number, sample = divmod(index, samples)
                said = read_answer_ids(verifier, renderer, prompts[number], ids, finished=finished)
                found.append(
                    Answer(
                        id=prompt_set.prompts[number].prompt_id,
                        sample=None if greedy else sample,
                        text=decode(renderer.tokenizer, ids.tolist()),
                        finish_reason=generation.finish_reason,
                        found=None if said is None else found_answer(verifier, said),
                        expected=expected[number],
                        right=said is not None and is_right(verifier, said, expected[number]),
                    )
                )
        return found

    digest = folder_digest(model)
    greedy = answers(0.0, 1)
    judged_greedy, samples = judged(greedy, 1, greedy=True), settings.samples
    sampled = judged(answers(settings.temperature, samples), samples, greedy=False) if samples else []
    greedy_correct = [answer.right for answer in judged_greedy]
    sampled_correct = [
        sum(answer.right for answer in sampled[start : start + samples])
        for start in range(0, len(sampled), samples or 1)
    ]
    return EvaluationResult(
        model=str(model),
        weights_sha256=digest.weights(),
        prompts_sha256=file_digest(Path(settings.prompts)),
        settings=settings,
        greedy=_score(greedy_correct),
        sampled=_clustered_score(sampled_correct, samples) if sampled else None,
        truncated=sum(generation.finish_reason == "length" for generation in greedy) / len(greedy),
        mean_length=sum(len(generation.output_ids) for generation in greedy) / len(greedy),
        greedy_correct=greedy_correct,
        template_date=prompt_set.printed_date.isoformat() if prompt_set.printed_date else None,
        model_sha256=digest.whole(),
        sampled_correct=sampled_correct,
        pass_at={str(k): pass_at(k, sampled_correct, samples) for k in range(1, samples + 1)},
        answers=[*judged_greedy, *sampled],
    )


def read_prompts(model: Path, settings: EvaluationSettings, today: date) -> PromptSet:
    """Return the prompts as `evaluate` reads them. Raises DataError if one cannot be rendered or judged."""
    return _read_prompts(Renderer(model), settings, _verifier(settings), today)


def _verifier(settings: EvaluationSettings) -> VerifierConfig:
    keys = {"pattern": settings.pattern, "unfinished": settings.unfinished, "thinking": settings.thinking}
    return VerifierConfig.model_validate({"kind": settings.verifier, **keys})


def _read_prompts(renderer: Renderer, settings: EvaluationSettings, verifier: VerifierConfig, today: date) -> PromptSet:
    """The prompts in the order of the file. Raises DataError if one cannot be rendered or judged."""
    data = DataConfig(
        prompts=Path(settings.prompts),
        chat_template_kwargs=settings.chat_template_kwargs,
        template_date=date.fromisoformat(settings.template_date) if settings.template_date else None,
        max_prompt_tokens=ANY_LENGTH,
        shuffle=False,
    )
    needs = PromptNeeds(answers="`tropd eval` judges by it; add it", verifier=verifier, limit=settings.limit)
    return load_prompts(data, renderer, seed=0, needs=needs, today=today)


def compare(before: EvaluationResult, after: EvaluationResult) -> dict[str, float]:
    """Return the difference of the greedy accuracies (after - before) with its 95 % interval, paired by prompt.

    If both results have sampled answers per prompt, also that of the sampled accuracies (`sampled_...`). Raises
    DataError if the two results have different prompts or settings.
    """
    if before.settings != after.settings or before.prompts_sha256 != after.prompts_sha256:
        raise DataError(f"{before.model} and {after.model} were evaluated with different settings; evaluate both again")
    if before.template_date != after.template_date:
        raise DataError(
            f"the prompts of {before.model} and {after.model} print different dates ({before.template_date} and "
            f"{after.template_date}); set data.template_date and evaluate both again"
        )
    low, high = paired_difference_interval(before.greedy_correct, after.greedy_correct)
    found = {"difference": after.greedy.accuracy - before.greedy.accuracy, "low": low, "high": high}
    if before.sampled_correct and after.sampled_correct:
        samples = after.settings.samples
        old, new = ([right / samples for right in each.sampled_correct] for each in (before, after))
        low, high = paired_mean_interval(old, new)
        found |= {"sampled_difference": (sum(new) - sum(old)) / len(new), "sampled_low": low, "sampled_high": high}
    return found


def describe(result: EvaluationResult) -> str:
    """Return one line: accuracies with counts and intervals, mean length, truncation."""
    parts = [f"greedy {_percent(result.greedy)}"]
    if result.sampled is not None:
        parts.append(f"sampled (T={result.settings.temperature:g}) {_percent(result.sampled)}")
        if len(result.pass_at) > 1:
            k, share = list(result.pass_at.items())[-1]
            parts.append(f"pass@{k} {share:.1%}")
    parts.append(f"{result.mean_length:.1f} tokens, {result.truncated:.1%} truncated")
    return f"{result.model}: " + "; ".join(parts)


def _percent(score: Score) -> str:
    return f"{score.accuracy:.1%} [{score.low:.1%}, {score.high:.1%}] ({score.correct} of {score.total})"


def _present(generation: Generation | ServerError) -> Generation:
    if isinstance(generation, ServerError):
        raise generation
    if generation.finish_reason == "abort":
        raise ServerError("the server aborted an answer of the evaluation; evaluate again")
    return generation


def _score(correct: list[bool]) -> Score:
    low, high = wilson_interval(sum(correct), len(correct))
    return Score(sum(correct), len(correct), sum(correct) / len(correct), low, high)


def _clustered_score(correct: list[int], samples: int) -> Score:
    low, high = clustered_interval([right / samples for right in correct])
    total = len(correct) * samples
    return Score(sum(correct), total, sum(correct) / total, low, high)
