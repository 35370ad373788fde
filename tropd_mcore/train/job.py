"""From a configuration to a finished run on this rank: makes each part once, checks what can be checked, trains.

Not for the command line (`train.__main__`). Order: what is cheap and likely to be wrong comes first; nothing is written
outside the run directory; servers that were started here are stopped on every way out.
"""

from __future__ import annotations

import logging
import os
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tropd_mcore.config.checks import backend_problems, data_problems, layout_problems, self_teacher_problems
from tropd_mcore.config.derived import (
    full_vocabulary,
    has_prefix_loss,
    learns_from_verifier,
    longest_sample,
    own_support_size,
    reference_path,
    support_key,
    support_size,
    teaches_itself,
    updates_per_step,
)
from tropd_mcore.config.divergence_objectives import SdpoObjective
from tropd_mcore.config.plan import resolved_yaml
from tropd_mcore.config.schema import Config
from tropd_mcore.data.chat import Renderer
from tropd_mcore.data.feedback import SolutionPrompts
from tropd_mcore.data.prompts import PromptSet, load_prompts, read_prompt_file
from tropd_mcore.data.supervision import IgnoredTokens, ignored_tokens
from tropd_mcore.errors import ConfigError
from tropd_mcore.files import publish_text
from tropd_mcore.losses.method_table import bind_objective
from tropd_mcore.mcore.checkpoint import TrainState, load
from tropd_mcore.mcore.checkpoint_info import latest
from tropd_mcore.mcore.collective import on_rank_zero, shared_fate
from tropd_mcore.mcore.dry_run import dry_run
from tropd_mcore.mcore.loss_settings import LossSettings
from tropd_mcore.mcore.model import Model, build_model
from tropd_mcore.mcore.optimizer import build_optimizer
from tropd_mcore.mcore.parallel import RankEnvironment, destroy, initialize
from tropd_mcore.mcore.platform import choose
from tropd_mcore.mcore.weights_io import export_hf, load_hf
from tropd_mcore.monitor.monitor import Monitor
from tropd_mcore.rollout.sampler import check_ids
from tropd_mcore.teacher.vocabulary import check_same_vocabulary
from tropd_mcore.train.batch_context import BatchContextSource
from tropd_mcore.train.parts import (
    Servers,
    Site,
    make_policy,
    make_self_teacher,
    make_teacher,
    reference_model,
    start_servers,
    student_average,
    teacher_model,
)
from tropd_mcore.train.prefix_losses import PrefixLosses
from tropd_mcore.train.rollout_source import RolloutSource
from tropd_mcore.train.run_dir import RunDir
from tropd_mcore.train.score_source import ScoreSource
from tropd_mcore.train.served_teacher import ServedTeacher
from tropd_mcore.train.trainer import Parts, Trainer
from tropd_mcore.train.verdicts import check_answers
from tropd_mcore.weights.architecture import read_architecture
from tropd_mcore.weights.publish import replace_folder

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


def run_job(config: Config, sources: dict[str, str], environment: RankEnvironment) -> None:
    """Train `config` to its end (or for `run.stop_after` steps) and export the student. Raises TropdError."""
    problems = layout_problems(config.parallel, environment.world_size)
    if problems:
        raise ConfigError(problems)
    models = {key: read_architecture(path) for key, path in _model_paths(config).items()}
    platform = choose(config.platform.kind, environment.local_rank)
    if problems := backend_problems(config.loss.backend, platform.name):
        raise ConfigError(problems)
    layout = initialize(config.parallel, platform, config.run.seed, environment)
    site = Site(config, platform, layout, RunDir(config.run.dir), models)
    with ExitStack() as cleanup:
        cleanup.callback(destroy, layout)
        _prepare_run_dir(site, sources, cleanup)
        _check_vocabularies(site)
        material = _read_material(site)
        first_step = _first_step(site)
        exported = not config.run.export_at_end or site.run_dir.exported_at() == first_step
        if first_step >= config.run.steps and exported:
            log.info("%s is complete: %d of %d steps", config.run.dir, first_step, config.run.steps)
            return
        _train(site, material, first_step, cleanup)


def _train(site: Site, material: Material, first_step: int, cleanup: ExitStack) -> None:
    config, layout = site.config, site.layout
    last_step = config.run.steps
    if config.run.stop_after is not None:
        last_step = min(last_step, first_step + config.run.stop_after)
    servers = start_servers(site, cleanup) if first_step < last_step else Servers()

    student = build_model(
        site.student, config.parallel, layout, site.platform,
        dtype=config.student.dtype, trainable=True, recompute=config.student.recompute, optimizer=config.optimizer,
    )  # fmt: skip
    load_hf(student, config.student.path, layout)
    optimizer, scheduler = build_optimizer(
        student, config.optimizer, steps=config.run.steps * updates_per_step(config.objective)
    )
    average = student_average(site, student) if first_step < last_step else None
    state = TrainState(student, optimizer, scheduler, average)
    if first_step:
        checkpoint = latest(site.run_dir.checkpoints)
        assert checkpoint is not None
        load(checkpoint, state)
        log.info("resumed from %s", checkpoint)
    if first_step < last_step:
        parts = _make_parts(site, material, state, servers, first_step, cleanup)
        Trainer(parts, first_step=first_step, last_step=last_step).fit()
    if last_step == config.run.steps and config.run.export_at_end:
        export(site, student, max(first_step, last_step))


def _make_parts(
    site: Site, material: Material, state: TrainState, servers: Servers, first_step: int, cleanup: ExitStack
) -> Parts:
    config, layout, student = site.config, site.layout, state.model
    settings = LossSettings.from_config(config)
    teacher, reference = teacher_model(site), reference_model(site)
    if config.gates.longest_sequence:
        dry_run(
            student,
            bind_objective(config.objective),
            settings,
            tokens_per_micro_batch=config.batch.tokens_per_micro_batch,
            k=support_size(config.objective),
            own_topk=own_support_size(config.objective),
            teacher=teacher if full_vocabulary(config.objective) else None,
        )
    policy = make_policy(site, student, material.renderer, servers.policy) if config.run.replay is None else None
    monitor = Monitor(config, site.run_dir.root, layout.rank, start_step=first_step)
    cleanup.callback(monitor.close)
    if state.average is not None and material.solution_prompts is not None:
        scorer = make_self_teacher(site, state.average, settings, material.solution_prompts, material.ignored)
    else:
        scorer = make_teacher(site, teacher, settings, servers.teacher, material.longest)
    assert state.optimizer is not None and state.scheduler is not None
    rollouts = RolloutSource(config, site.run_dir, material.prompts, policy, layout)
    scores = ScoreSource(
        scorer,
        site.run_dir,
        layout,
        replay=config.run.replay,
        name=f"{config.teacher.kind} {config.teacher.path} {config.teacher.dtype} {support_size(config.objective)}",
        on_disk=not (full_vocabulary(config.objective) or teaches_itself(config.objective)),
    )
    fallible = scorer if isinstance(scorer, ServedTeacher) and has_prefix_loss(config.objective) else None
    return Parts(
        config=config,
        layout=layout,
        run_dir=site.run_dir,
        student=student,
        optimizer=state.optimizer,
        scheduler=state.scheduler,
        teacher_model=teacher,
        average=state.average,
        ignored=material.ignored,
        rollouts=rollouts,
        prefixes=PrefixLosses(fallible, scores, rollouts),
        scores=scores,
        context=BatchContextSource(config, student, reference),
        monitor=monitor,
        renderer=material.renderer,
    )


def export(site: Site, student: Model, step: int) -> None:
    """Write the student as a Hugging Face folder to <run.dir>/export, which goes once that is complete. Collective."""
    run_dir, control = site.run_dir, site.layout.groups.control
    fresh = run_dir.export.with_name("export.fresh")
    if site.layout.rank == 0:
        shutil.rmtree(fresh, ignore_errors=True)
    export_hf(student, site.layout, fresh, source_folder=site.config.student.path)
    with shared_fate(control):
        if site.layout.rank == 0:
            replace_folder(fresh, run_dir.export)
            publish_text(run_dir.export_step, f"{step}\n")
    log.info("exported the student to %s", run_dir.export)


def _prepare_run_dir(site: Site, sources: dict[str, str], cleanup: ExitStack) -> None:
    run_dir, control = site.run_dir, site.layout.groups.control
    resolved = resolved_yaml(site.config, sources)
    with shared_fate(control):
        if site.layout.rank == 0:
            cleanup.callback(os.close, run_dir.lock())
            for line in run_dir.record_config(resolved):
                log.warning("%s was made with another value than `%s`", run_dir.root, line)


def _first_step(site: Site) -> int:
    """Steps done according to the newest checkpoint of the run; the same on all ranks."""

    def steps_done() -> int:
        checkpoint = latest(site.run_dir.checkpoints)
        return int(checkpoint.name.removeprefix("step_")) if checkpoint is not None else 0

    return on_rank_zero(steps_done, site.layout.groups.control)


def _model_paths(config: Config) -> dict[str, Path]:
    """{configuration key: folder} of every model of the run."""
    paths = {"student.path": config.student.path, "teacher.path": config.teacher.path}
    reference = reference_path(config)
    return paths if reference is None else {**paths, "objective.reference": reference}


def _check_vocabularies(site: Site) -> None:
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
        for key, path in _model_paths(config).items():
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


def _read_material(site: Site) -> Material:
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
    for key, path in _model_paths(config).items():
        context = site.models[key].max_position_embeddings
        if longest > context:
            problems.append(
                f"{key}={path}: its context is {context} tokens but the longest sample can have "
                f"{longest}; lower rollout.max_new_tokens or choose another model"
            )
    if problems:
        raise ConfigError(problems)
    return longest
