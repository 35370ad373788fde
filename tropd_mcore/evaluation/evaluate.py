"""Exact match of a model on held-out prompts, greedy and sampled, with counts and intervals.

Not for starting servers: a `generate` callable answers the prompts (`SglangClient.generate`). Invariants: a prompt
without an answer is refused, a generation that failed is an error and never a wrong answer; two results are compared
only where prompts and settings are the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tropd_mcore.config.schema import VerifierConfig
from tropd_mcore.data.chat import Renderer
from tropd_mcore.data.prompts import read_prompt_file
from tropd_mcore.data.verify import judge
from tropd_mcore.errors import DataError, ServerError
from tropd_mcore.evaluation.statistics import clustered_interval, paired_difference_interval, wilson_interval
from tropd_mcore.files import publish_text
from tropd_mcore.serving.wire import Generation, GenerationRequest

Generate = Callable[[list[GenerationRequest]], Sequence[Generation | ServerError]]


@dataclass(frozen=True)
class EvaluationSettings:
    """What is asked and how it is judged."""

    prompts: str
    """JSONL as for `data.prompts`, every line with an answer"""
    max_new_tokens: int
    samples: int = 4
    """Sampled answers a prompt beside the greedy one; 0 = greedy only"""
    temperature: float = 1.0
    top_p: float = 1.0
    verifier: str = "exact_match"
    pattern: str = VerifierConfig.model_fields["pattern"].default
    limit: int | None = None
    """First prompts of the file; None = all"""


@dataclass(frozen=True)
class Score:
    """Right answers of `total`, with a 95 % interval of the accuracy."""

    correct: int
    total: int
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class EvaluationResult:
    """One model on one prompt file."""

    model: str
    weights_sha256: str
    """Hash over the safetensors of the folder"""
    prompts_sha256: str
    """Hash of the prompt file"""
    settings: EvaluationSettings
    greedy: Score
    sampled: Score | None
    truncated: float
    """Share of the greedy answers that reached max_new_tokens"""
    mean_length: float
    """Tokens of a greedy answer"""
    greedy_correct: list[bool]
    """By prompt, in the order of the file"""

    def save(self, path: Path) -> None:
        """Publish the result as JSON."""
        publish_text(path, json.dumps(asdict(self), indent=1) + "\n")


def load_result(path: Path) -> EvaluationResult:
    """Read what `EvaluationResult.save` wrote. Raises DataError."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        values["settings"] = EvaluationSettings(**values["settings"])
        values["greedy"] = Score(**values["greedy"])
        values["sampled"] = Score(**values["sampled"]) if values["sampled"] is not None else None
        return EvaluationResult(**values)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: expected a result of `tropd eval`: {error!r}") from error


def evaluate(model: Path, generate: Generate, settings: EvaluationSettings) -> EvaluationResult:
    """Answer every prompt with `generate`, which serves `model`, and judge the answers.

    Raises DataError where the prompts cannot be judged, ServerError where an answer is missing.
    """
    renderer = Renderer(model)
    records = read_prompt_file(Path(settings.prompts))[: settings.limit]
    missing = [record.prompt_id for record in records if record.answer is None]
    if missing:
        raise DataError(f"{settings.prompts}: {len(missing)} prompts have no answer to judge by, first {missing[0]!r}")
    prompts = [renderer.prompt_ids(record.prompt) for record in records]
    verifier = VerifierConfig.model_validate({"kind": settings.verifier, "pattern": settings.pattern})

    def answers(temperature: float, samples: int) -> list[Generation]:
        requests = [
            GenerationRequest(
                input_ids=ids,
                max_new_tokens=settings.max_new_tokens,
                temperature=temperature,
                top_p=settings.top_p if temperature > 0 else 1.0,
                stop_token_ids=renderer.eos_ids,
            )
            for ids in prompts
            for _ in range(samples)
        ]
        return [_present(generation) for generation in generate(requests)]

    def judged(generations: list[Generation], samples: int) -> list[bool]:
        texts = [renderer.decode(generation.output_ids) for generation in generations]
        return [judge(verifier, text, str(records[i // samples].answer)) for i, text in enumerate(texts)]

    greedy = answers(0.0, 1)
    greedy_correct = judged(greedy, 1)
    sampled = judged(answers(settings.temperature, settings.samples), settings.samples) if settings.samples else []
    return EvaluationResult(
        model=str(model),
        weights_sha256=weights_hash(model),
        prompts_sha256=file_hash([Path(settings.prompts)]),
        settings=settings,
        greedy=_score(greedy_correct),
        sampled=_clustered_score(sampled, settings.samples) if sampled else None,
        truncated=sum(generation.finish_reason == "length" for generation in greedy) / len(greedy),
        mean_length=sum(len(generation.output_ids) for generation in greedy) / len(greedy),
        greedy_correct=greedy_correct,
    )


def compare(before: EvaluationResult, after: EvaluationResult) -> dict[str, float]:
    """Return the difference of the greedy accuracies (after - before) with its 95 % interval, paired by prompt.

    Raises DataError where the two answered other prompts or had other settings.
    """
    if before.settings != after.settings or before.prompts_sha256 != after.prompts_sha256:
        raise DataError(f"{before.model} and {after.model} were evaluated with other settings; evaluate both again")
    low, high = paired_difference_interval(before.greedy_correct, after.greedy_correct)
    return {"difference": after.greedy.accuracy - before.greedy.accuracy, "low": low, "high": high}


def describe(result: EvaluationResult) -> str:
    """One line: accuracies with counts and intervals, truncation, length."""
    parts = [f"greedy {_percent(result.greedy)}"]
    if result.sampled is not None:
        parts.append(f"sampled (T={result.settings.temperature:g}) {_percent(result.sampled)}")
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


def _clustered_score(correct: list[bool], samples: int) -> Score:
    means = [sum(correct[start : start + samples]) / samples for start in range(0, len(correct), samples)]
    low, high = clustered_interval(means)
    return Score(sum(correct), len(correct), sum(correct) / len(correct), low, high)


def weights_hash(model: Path) -> str:
    """Return the hash of the safetensors in a model folder, in the order of their names."""
    return file_hash(sorted(model.glob("*.safetensors")))


def file_hash(paths: Sequence[Path]) -> str:
    """Return the SHA-256 of the contents of the files, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
