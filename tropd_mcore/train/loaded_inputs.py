"""Reads tokenizers, prompts and stored responses before anything is built, and checks that they fit together.

This module does not handle models or servers (`components`). `start_checks` calls it, for the ranks of a job or for
`tropd doctor`. Invariants: every problem of the data is found here, before a model is built or a server is asked, and
all problems are reported at once. Nothing here is collective, and nothing is written.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path

from tropd_mcore.config.checks import data_problems, self_teacher_problems
from tropd_mcore.config.derived import is_served, longest_sample, model_paths, reads_responses, reference_path
from tropd_mcore.config.phase_checks import of_each_phase
from tropd_mcore.config.schema import Config
from tropd_mcore.config.teachers import TeacherSection, by_path_key, names_of, teachers_of
from tropd_mcore.data.chat import Renderer
from tropd_mcore.data.end_tokens import EndTokens
from tropd_mcore.data.prompts import PromptNeeds, PromptSet, load_prompts, needs_of
from tropd_mcore.data.supervision import IgnoredTokens
from tropd_mcore.data.tokenizer_gate import check_tokenizer
from tropd_mcore.errors import ConfigError, DataError, ModelError, TropdError
from tropd_mcore.teacher.solutions import SolutionPrompts
from tropd_mcore.teacher.vocabulary import check_same_vocabulary
from tropd_mcore.train.ground import Ground, read_model
from tropd_mcore.weights.architecture import Architecture, is_supported
from tropd_mcore.weights.hf_folder import HfReader, TensorReader
from tropd_mcore.weights.served import ServedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedInputs:
    """Everything that a run reads before it builds anything."""

    renderer: Renderer
    prompts: PromptSet
    ignored: IgnoredTokens
    longest: int
    """Most tokens that a sample can have."""
    solution_prompts: SolutionPrompts | None
    """Prompts with solutions, which the student reads as its own teacher; None for another teacher."""
    ends: EndTokens
    """Tokens that end a response."""
    excluded: tuple[int, ...] | dict[str, tuple[int, ...]]
    """Ids of tokens that only the teacher has, which cannot be in the top-k (teacher.extra_tokens); of several teachers
    by name."""
    day: date
    """The date that chat templates print."""
    held_out: PromptSet | None = None
    """Prompts with stored responses that are measured and not trained on (held_out); None = off."""


def together(looks: Iterable[Callable[[], object]]) -> None:
    """Run all checks, then raise their errors: a single error unchanged, several as one DataError of their lines."""
    met: list[TropdError] = []
    for look in looks:
        try:
            look()
        except TropdError as error:
            met.append(error)
    if len(met) == 1:
        raise met[0]
    if met:
        raise DataError("\n".join(map(str, met)))


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Prefix errors about a model folder with its configuration key."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{key}: {error}") from error


def _each_once(paths: Mapping[str, Path]) -> Iterator[tuple[str, Path]]:
    """Yield (key, folder) for each distinct folder, with its first key."""
    first: dict[Path, tuple[str, Path]] = {}
    for key, path in paths.items():
        first.setdefault(path.resolve(), (key, path))
    yield from first.values()


def read_models(config: Config) -> dict[str, Architecture | ServedModel]:
    """Return the architecture of every model, or the sizes of a served one, by key.

    Raises TropdError that names every unusable config.json.
    """
    found: dict[str, Architecture | ServedModel] = {}

    def read(key: str, path: Path) -> None:
        found[key] = read_model(config, key, path)

    together(partial(read, key, path) for key, path in model_paths(config).items())
    return found


def check_weights(ground: Ground) -> None:
    """Raise if the tensors that this run loads do not match config.json. Only headers are read.

    Of a served model that Megatron could not build, only the files are checked.
    """
    config = ground.config

    def look(key: str, path: Path) -> None:
        with _named(key):
            if is_served(config, key) and not is_supported(path):
                TensorReader(path).close()
                return
            with HfReader(path) as reader:
                reader.check()

    elsewhere = {
        teacher.path_key for teacher in teachers_of(config) if teacher.served and teacher.config.server.url is not None
    }
    loaded = {key: path for key, path in model_paths(config).items() if key not in elsewhere}
    together(partial(look, key, path) for key, path in _each_once(loaded))


def check_tokenizers(ground: Ground) -> None:
    """Raise if a tokenizer of the run differs from its files (gates.tokenizer)."""
    if ground.config.gates.tokenizer:
        paths = _each_once(model_paths(ground.config))
        together(partial(check_tokenizer, path, key=key) for key, path in paths)


def check_vocabularies(ground: Ground) -> None:
    """Raise if the teacher or the reference does not have the student's tokens, unless gates.vocabulary is off.

    Also raises if a model has fewer tokens than the top-k that it must return, or if the reference's vocabulary is
    smaller than the student's.
    """
    config = ground.config
    problems = list(of_each_phase(lambda phase: _too_many_candidates(phase, ground))(config))
    smaller = min(ground.models[key].vocab_size for key in ("student.path", *by_path_key(config)))
    if config.held_out is not None and config.held_out.topk > smaller:
        problems.append(f"held_out.topk = {config.held_out.topk} but a vocabulary has {smaller} tokens; lower it")
    if problems:
        raise ConfigError(problems)
    if config.gates.vocabulary:
        others = {key: path for key, path in model_paths(config).items() if key != "student.path"}
        allowed = {each.path_key for each in teachers_of(config) if each.config.extra_tokens == "exclude"}
        together(
            partial(check_same_vocabulary, config.student.path, path, key=key, allow_extra=key in allowed)
            for key, path in others.items()
        )
    reference = ground.models.get("objective.reference")
    if reference is not None and reference.vocab_size < ground.student.vocab_size:
        raise ConfigError(
            [
                f"objective.reference={reference_path(config)}: its vocabulary has {reference.vocab_size} entries, the "
                f"student's {ground.student.vocab_size}; choose a reference that has every token of the student"
            ]
        )


def _too_many_candidates(config: Config, ground: Ground) -> Iterator[str]:
    objective = config.objective
    for key, candidates, name, vocab_size in (
        *(
            (objective.teacher_topk_key, objective.teacher_topk, each.key, ground.models[each.path_key].vocab_size)
            for each in teachers_of(config)
        ),
        ("student_topk", objective.student_candidates, "student", ground.student.vocab_size),
    ):
        if candidates > vocab_size:
            yield f"objective.{key} = {candidates} but the vocabulary of the {name} has {vocab_size} tokens; lower it"


def template_day(ground: Ground) -> date:
    """Return the configured date, else the recorded one, else today, which `start.accept` records. Raises DataError."""
    return ground.config.data.template_date or ground.run_dir.recorded_template_date() or date.today()


def read_prompts(
    ground: Ground,
    renderer: Renderer,
    ends: EndTokens,
    day: date,
    *,
    answers: bool = True,
    responses: bool = True,
) -> PromptSet:
    """Return the prompts with everything that the run needs of them. Raises DataError with every problem of the files.

    `answers`: whether to check reference answers, which takes milliseconds each. `responses`: whether the file
    data.teacher_responses exists; it is read only if the run continues responses.
    """
    config = ground.config
    needs = needs_of(config, vocab_size=ground.student.vocab_size, end_ids=ends.ids)
    if not answers:
        needs = replace(needs, verifier=None)
    data = config.data
    if not responses:
        needs = replace(needs, responses=None)
    if not responses or not reads_responses(config):
        data = data.model_copy(update={"teacher_responses": None})
    return load_prompts(data, renderer, seed=config.run.seed, needs=needs, today=day)


def read_held_out(
    ground: Ground, renderer: Renderer, ends: EndTokens, day: date, trained: PromptSet
) -> PromptSet | None:
    """Return the held-out prompts with their responses; None if nothing is held out.

    Raises DataError with every problem of the files, and if a prompt is also trained on (compared by its tokens).
    Raises ConfigError if a response does not fit into a pack or a context.
    """
    config, held_out = ground.config, ground.config.held_out
    if held_out is None:
        return None
    needs = PromptNeeds(
        responses="the student is measured on it; add it (`tropd prefixes`) or lower held_out.limit",
        vocab_size=ground.student.vocab_size,
        end_ids=ends.ids,
        limit=held_out.limit,
        keys=("held_out.prompts", "held_out.responses"),
        teachers=names_of(config),
    )
    files = {"prompts": held_out.prompts, "teacher_responses": held_out.responses}
    found = load_prompts(config.data.model_copy(update=files), renderer, seed=0, needs=needs, today=day)
    seen = {prompt.token_ids.tobytes() for prompt in trained.prompts}
    both = [prompt.prompt_id for prompt in found.prompts if prompt.token_ids.tobytes() in seen]
    if both:
        raise DataError(
            f"held_out.prompts={held_out.prompts}: {len(both)} of its {len(found.prompts)} prompts are also in "
            f"data.prompts={config.data.prompts}, the first is {both[0]!r}; remove them from one of the files"
        )
    longest = longest_held_out(found)
    limits = {
        f"batch.tokens_per_micro_batch={config.batch.tokens_per_micro_batch}": config.batch.tokens_per_micro_batch,
        f"the context of student.path={config.student.path}": ground.student.max_position_embeddings,
    }
    limits |= {
        f"the context of {each.path_key}={each.path}": ground.models[each.path_key].max_position_embeddings
        for each in teachers_of(config)
    }
    problems = [
        f"held_out.responses={held_out.responses}: the longest prompt with its response has {longest} tokens, but "
        f"{name} holds {limit}; remove long responses"
        for name, limit in limits.items()
        if longest > limit
    ]
    if problems:
        raise ConfigError(problems)
    return found


def longest_held_out(held_out: PromptSet) -> int:
    """Return the number of tokens of the longest held-out sample: prompt, response and end token."""
    responses = [prompt.teacher_response_ids for prompt in held_out.prompts]
    lengths = [0 if response is None else len(response) + 1 for response in responses]
    return max(len(prompt.token_ids) + length for prompt, length in zip(held_out.prompts, lengths, strict=True))


def excluded_tokens(ground: Ground) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
    """Return the ids of tokens that only the teacher has and that cannot be in the top-k; of several teachers by name.

    Raises DataError.
    """
    found = {each.name or "": _excluded(ground.config, each) for each in teachers_of(ground.config)}
    return found if ground.config.teachers else found[""]


def _excluded(config: Config, teacher: TeacherSection) -> tuple[int, ...]:
    if teacher.config.extra_tokens == "refuse":
        return ()
    key = teacher.path_key
    found = check_same_vocabulary(config.student.path, teacher.path, key=key, allow_extra=True)
    if found:
        whose = "the teacher" if teacher.name is None else f"teacher {teacher.name}"
        log.info("%d tokens that only %s has are excluded, the first is id %d", len(found), whose, found[0])
    return found


def solution_prompts(ground: Ground, renderer: Renderer, prompts: PromptSet) -> SolutionPrompts | None:
    """Return the prompts with solutions that a self-teacher reads; None for another teacher.

    Raises DataError if a solution cannot be put into a prompt, and ConfigError if a response would not fit after one.
    """
    config, own = ground.config, ground.config.objective.self_teaching
    if own is None:
        return None
    found = SolutionPrompts(prompts.raw_prompts, renderer, own.template, config.verifier)
    longest, context = found.longest_without_solution(), ground.student.max_position_embeddings
    problems = self_teacher_problems(config, longest_prompt=longest, context=context)
    if problems:
        raise ConfigError(problems)
    room = min(config.batch.tokens_per_micro_batch, context) - longest - config.rollout.max_new_tokens
    log.info("solutions of up to %d tokens fit before the longest response to the longest prompt", room)
    return found


def check_lengths(ground: Ground, prompts: PromptSet) -> int:
    """Return the largest number of tokens that a sample of this run can have.

    Raises ConfigError if packs or model contexts are too short.
    """
    config = ground.config
    lengths = {"longest_prompt": prompts.longest_prompt, "longest_response": prompts.longest_response}
    problems = data_problems(config, **lengths)
    longest = longest_sample(config, **lengths)
    for key, path in model_paths(config).items():
        context = ground.models[key].max_position_embeddings
        if longest > context:
            problems.append(
                f"{key}={path}: its context is {context} tokens but the longest sample can have "
                f"{longest}; lower rollout.max_new_tokens or choose another model"
            )
    if problems:
        raise ConfigError(problems)
    return longest
