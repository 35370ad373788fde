"""What a run reads before it builds anything: tokenizers, prompts, stored responses, and whether they fit together.

Not for weights or servers (`parts`). Invariant: everything that is wrong with the data is found here, before a model is
built or a server is asked, and all of it is said at once.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path

from tropd_mcore.config.checks import data_problems, self_teacher_problems
from tropd_mcore.config.derived import (
    longest_sample,
    own_support_size,
    reference_path,
    support_key,
    support_size,
)
from tropd_mcore.config.divergence_objectives import SdpoObjective
from tropd_mcore.config.schema import Config
from tropd_mcore.data.chat import Renderer
from tropd_mcore.data.end_tokens import EndTokens, end_tokens
from tropd_mcore.data.feedback import SolutionPrompts
from tropd_mcore.data.prompts import PromptSet, load_prompts, needs_of
from tropd_mcore.data.supervision import IgnoredTokens, ignored_tokens
from tropd_mcore.data.tokenizer_gate import check_tokenizer
from tropd_mcore.errors import ConfigError
from tropd_mcore.losses.method_table import bind_objective
from tropd_mcore.mcore.collective import on_rank_zero, shared_fate
from tropd_mcore.teacher.vocabulary import check_same_vocabulary
from tropd_mcore.train.parts import Site

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
    ends: EndTokens
    """What ends a response."""
    excluded: tuple[int, ...]
    """Ids of tokens that only the teacher has, which are no candidates (teacher.extra_tokens)."""
    day: date
    """The day that chat templates print."""


def check_tokenizers(site: Site) -> None:
    """Raise on every rank where a tokenizer of the run is not the one of its files (gates.tokenizer). Collective."""
    if not site.config.gates.tokenizer:
        return

    def check() -> None:
        checked: set[Path] = set()
        for key, path in model_paths(site.config).items():
            if path.resolve() not in checked:
                check_tokenizer(path, key=key)
                checked.add(path.resolve())

    on_rank_zero(check, site.layout.groups.control)


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
                allow_extra = key == "teacher.path" and config.teacher.extra_tokens == "exclude"
                check = partial(check_same_vocabulary, config.student.path, path, key=key, allow_extra=allow_extra)
                on_rank_zero(check, control)
    reference = site.models.get("objective.reference")
    if reference is not None and reference.vocab_size < site.student.vocab_size:
        raise ConfigError(
            [
                f"objective.reference={reference_path(config)}: its vocabulary has {reference.vocab_size} entries, the "
                f"student's {site.student.vocab_size}; choose a reference that knows every token of the student"
            ]
        )


def read_material(site: Site) -> Material:
    """Read tokenizer and data. Collective.

    Raises ConfigError where packs or models are too short for the data, a token to ignore is unknown or a custom
    objective cannot be imported, DataError with everything that the run would miss in prompts and stored responses.
    """
    config, control = site.config, site.layout.groups.control
    # Every rank reads, perhaps from a disk of its own: what one alone cannot read is met by all.
    with shared_fate(control):
        bind_objective(config.objective)
        renderer = Renderer(config.student.path)
        ignored = ignored_tokens(config.loss, renderer.token_id)
        ends = end_tokens(config, renderer, config.teacher.path)
    day = on_rank_zero(lambda: _template_date(site), control)
    prompts = _prompts(site, renderer, ends, day)
    with shared_fate(control):
        longest = _longest_sample(site, prompts)
        solution_prompts = _solution_prompts(site, renderer, prompts)
    return Material(renderer, prompts, ignored, longest, solution_prompts, ends, _excluded_tokens(site), day)


def _template_date(site: Site) -> date:
    """The configured day, else the recorded one, else today, which `start.accept` records."""
    return site.config.data.template_date or site.run_dir.recorded_template_date() or date.today()


def _prompts(site: Site, renderer: Renderer, ends: EndTokens, day: date) -> PromptSet:
    """The prompts, with all that the run needs of them. Collective.

    Every rank reads and renders them. Rank 0 alone looks at the answers, which takes milliseconds each.
    """
    config, control = site.config, site.layout.groups.control
    needs = needs_of(config, vocab_size=site.student.vocab_size, end_ids=ends.ids)
    if site.layout.rank != 0:
        needs = replace(needs, verifier=None)
    with shared_fate(control):
        return load_prompts(config.data, renderer, seed=config.run.seed, needs=needs, today=day)


def _excluded_tokens(site: Site) -> tuple[int, ...]:
    """Ids of tokens that only the teacher has and that are no candidates; said once. Collective."""
    config = site.config
    if config.teacher.extra_tokens == "refuse":
        return ()
    find = partial(check_same_vocabulary, config.student.path, config.teacher.path, allow_extra=True)
    found = on_rank_zero(find, site.layout.groups.control)
    if found:
        log.info("%d tokens that only the teacher has are no candidates, the first is id %d", len(found), found[0])
    return found


def _solution_prompts(site: Site, renderer: Renderer, prompts: PromptSet) -> SolutionPrompts | None:
    """Raises DataError where a prompt cannot take a solution, ConfigError where a response would not fit after one."""
    config, objective = site.config, site.config.objective
    if not isinstance(objective, SdpoObjective):
        return None
    found = SolutionPrompts(prompts.asked, renderer, objective.template, config.verifier)
    longest, context = found.longest_without_solution(), site.student.max_position_embeddings
    problems = self_teacher_problems(config, longest_prompt=longest, context=context)
    if problems:
        raise ConfigError(problems)
    room = min(config.batch.tokens_per_micro_batch, context) - longest - config.rollout.max_new_tokens
    log.info("solutions of up to %d tokens fit before the longest response to the longest prompt", room)
    return found


def _longest_sample(site: Site, prompts: PromptSet) -> int:
    """The most tokens a sample of this run can have."""
    config = site.config
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
