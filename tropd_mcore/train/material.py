"""What a run reads before it builds anything: tokenizers, prompts, stored responses, and whether they fit together.

Not for weights or servers (`parts`). Invariant: everything that is wrong with the data is found here, before a model is
built or a server is asked, and all of it is said at once.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tropd_mcore.config.checks import data_problems, self_teacher_problems
from tropd_mcore.config.derived import (
    learns_from_verifier,
    longest_sample,
    own_support_size,
    reference_path,
    support_key,
    support_size,
)
from tropd_mcore.config.divergence_objectives import SdpoObjective
from tropd_mcore.config.schema import Config
from tropd_mcore.data.chat import Renderer
from tropd_mcore.data.feedback import SolutionPrompts
from tropd_mcore.data.prompts import PromptSet, load_prompts, read_prompt_file
from tropd_mcore.data.supervision import IgnoredTokens, ignored_tokens
from tropd_mcore.errors import ConfigError
from tropd_mcore.losses.method_table import bind_objective
from tropd_mcore.mcore.collective import on_rank_zero
from tropd_mcore.rollout.sampler import check_ids
from tropd_mcore.teacher.vocabulary import check_same_vocabulary
from tropd_mcore.train.parts import Site
from tropd_mcore.train.verdicts import check_answers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Material:
    """What the run reads before it builds anything."""

    renderer: Renderer
    prompts: PromptSet
    ignored: IgnoredTokens
    longest: int
    """Most tokens that a sample can have."""
    solution_prompts: SolutionPrompts | None
    """What the teacher reads where that is the student itself; None elsewhere."""


def check_vocabularies(site: Site) -> None:
    """Raise where a model does not have the student's tokens: the teacher unless told not to look, the reference.

    Also where a model has fewer tokens than the candidates that are asked of it.
    """
    config, control = site.config, site.layout.groups.control
    problems = [
        f"objective.{key} = {candidates} but the vocabulary of the {name} has {vocab_size} tokens; lower it"
        for key, candidates, name, vocab_size in (
            (support_key(config.objective), support_size(config.objective), "teacher", site.teacher.vocab_size),
            ("own_topk", own_support_size(config.objective), "student", site.student.vocab_size),
        )
        if candidates > vocab_size
    ]
    if problems:
        raise ConfigError(problems)
    if config.gates.vocabulary:
        for key, path in model_paths(config).items():
            if key != "student.path":
                on_rank_zero(partial(check_same_vocabulary, config.student.path, path, key=key), control)
    reference = site.models.get("objective.reference")
    if reference is not None and reference.vocab_size < site.student.vocab_size:
        raise ConfigError(
            [
                f"objective.reference={reference_path(config)}: its vocabulary has {reference.vocab_size} entries, the "
                f"student's {site.student.vocab_size}; choose a reference that knows every token of the student"
            ]
        )


def read_material(site: Site) -> Material:
    """Read tokenizer and data.

    Raises ConfigError where packs or models are too short for the data, a token to ignore is unknown or a custom
    objective cannot be imported, DataError where an id is not in the vocabulary or an answer is missing.
    """
    config = site.config
    bind_objective(config.objective)
    renderer = Renderer(config.student.path)
    ignored = ignored_tokens(config.loss, renderer.token_id)
    prompts = load_prompts(config.data, renderer, seed=config.run.seed)
    if learns_from_verifier(config.objective):
        check_answers(prompts.prompts, config)
    longest = _longest_sample(site, prompts)
    return Material(renderer, prompts, ignored, longest, _solution_prompts(site, renderer))


def _solution_prompts(site: Site, renderer: Renderer) -> SolutionPrompts | None:
    """Raises DataError where a prompt cannot take a solution, ConfigError where a response would not fit after one."""
    config, objective = site.config, site.config.objective
    if not isinstance(objective, SdpoObjective):
        return None
    asked = {record.prompt_id: record.prompt for record in read_prompt_file(config.data.prompts)}
    prompts = SolutionPrompts(asked, renderer, objective.template)
    longest, context = prompts.longest_without_solution(), site.student.max_position_embeddings
    problems = self_teacher_problems(config, longest_prompt=longest, context=context)
    if problems:
        raise ConfigError(problems)
    room = min(config.batch.tokens_per_micro_batch, context) - longest - config.rollout.max_new_tokens
    log.info("solutions of up to %d tokens fit before the longest response to the longest prompt", room)
    return prompts


def _longest_sample(site: Site, prompts: PromptSet) -> int:
    """The most tokens a sample of this run can have."""
    config = site.config
    for prompt in prompts.prompts:
        check_ids(prompt.token_ids, site.student.vocab_size, what=f"prompt {prompt.prompt_id!r} of data.prompts")
        if prompt.teacher_response_ids is not None:
            what = f"the response to {prompt.prompt_id!r} in data.teacher_responses"
            check_ids(prompt.teacher_response_ids, site.student.vocab_size, what=what)
    lengths = {"longest_prompt": prompts.longest_prompt, "longest_response": prompts.longest_response}
    problems = data_problems(config, **lengths)
    longest = longest_sample(config, **lengths)
    for key, path in model_paths(config).items():
        context = site.models[key].max_position_embeddings
        if longest > context:
            problems.append(
                f"{key}={path}: its context is {context} tokens but the longest sample can have "
                f"{longest}; lower rollout.max_new_tokens or choose another model"
            )
    if problems:
        raise ConfigError(problems)
    return longest


def model_paths(config: Config) -> dict[str, Path]:
    """{configuration key: folder} of every model of the run."""
    paths = {"student.path": config.student.path, "teacher.path": config.teacher.path}
    reference = reference_path(config)
    return paths if reference is None else {**paths, "objective.reference": reference}
