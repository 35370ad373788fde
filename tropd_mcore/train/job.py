"""Runs a job on this rank, from a configuration to a finished run: builds each part once, checks it, trains.

This module does not parse the command line (`train.__main__`). Checks that are cheap and likely to fail come first.
Invariants: nothing is written outside the run directory. Servers that were started here are stopped on every exit.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

from tropd_mcore import stopping
from tropd_mcore.config.checks import layout_problems
from tropd_mcore.config.derived import phase_configs, reference_path, samples_rollouts
from tropd_mcore.config.phases import PhasesObjective
from tropd_mcore.config.schema import Config
from tropd_mcore.config.teachers import teachers_of
from tropd_mcore.errors import ConfigError
from tropd_mcore.files import publish_text
from tropd_mcore.mcore.checkpoint import TrainState, load
from tropd_mcore.mcore.checkpoint_info import latest
from tropd_mcore.mcore.collective import raise_on_all_ranks
from tropd_mcore.mcore.loss_settings import LossSettings
from tropd_mcore.mcore.memory_probe import probe_memory
from tropd_mcore.mcore.model import Model, build_model
from tropd_mcore.mcore.optimizer import build_optimizer
from tropd_mcore.mcore.parallel import RankEnvironment, collective_timeout, destroy, initialize
from tropd_mcore.mcore.platform import choose
from tropd_mcore.mcore.weights_io import export_hf, load_hf
from tropd_mcore.monitor.clock import StepClock
from tropd_mcore.monitor.monitor import Monitor
from tropd_mcore.objectives.registry import objective_of
from tropd_mcore.progress import progress
from tropd_mcore.records.run_dir import RunDir
from tropd_mcore.rollout.policy_server import PolicyServer
from tropd_mcore.rollout.rollout_source import RolloutSource
from tropd_mcore.serving.left_behind import remove_left_over
from tropd_mcore.teacher.identity_check import TeacherCheck
from tropd_mcore.teacher.score_source import ScoreSource, Teacher
from tropd_mcore.teacher.served import ServedTeacher
from tropd_mcore.teacher.teacher_set import TeacherSet
from tropd_mcore.train.batch_context import BatchContextSource
from tropd_mcore.train.components import (
    JobContext,
    Servers,
    TeacherAccess,
    make_held_out,
    make_policy,
    make_self_teacher,
    make_teacher,
    reference_model,
    sampler_bounds,
    start_servers,
    student_average,
    teacher_contexts,
    teacher_model,
)
from tropd_mcore.train.gates import SamplerBounds
from tropd_mcore.train.init_from import begin_optimizer, begin_weights
from tropd_mcore.train.inputs import read_inputs
from tropd_mcore.train.loaded_inputs import LoadedInputs
from tropd_mcore.train.model_check import check_model
from tropd_mcore.train.phases import PhaseRun, remaining
from tropd_mcore.train.prefix_losses import PrefixLosses
from tropd_mcore.train.servers import find_nodes
from tropd_mcore.train.several_teachers import excluded_of, joined, joined_checks, scorer_name
from tropd_mcore.train.start import Start, accept, make_start
from tropd_mcore.train.start_checks import (
    BACKEND,
    CONTENT_CHECKS,
    INPUT_CHECKS,
    MODELS,
    State,
    run_before_groups,
    run_checks,
)
from tropd_mcore.train.trainer import Components, Trainer
from tropd_mcore.weights.publish import replace_folder

log = logging.getLogger(__name__)


def run_job(config: Config, sources: dict[str, str], environment: RankEnvironment) -> None:
    """Train `config` to its end (or for `run.stop_after` steps) and export the student.

    Raises TropdError. If the job was asked to stop, raises StopRequested with a message that says what was saved.
    """
    problems = layout_problems(config.parallel, environment.world_size)
    if problems:
        raise ConfigError(problems)
    before = State(config, RunDir(config.run.dir))
    run_before_groups([MODELS], before)
    platform = choose(config.platform.kind, environment.local_rank)
    before.platform = platform.name
    run_before_groups([BACKEND], before)
    timeout = collective_timeout(config.run)
    with progress(log, f"waiting for all {environment.world_size} ranks to join"):
        layout = initialize(config.parallel, platform, config.run.seed, environment, timeout=timeout)
    with ExitStack() as cleanup:
        cleanup.callback(destroy, layout)
        nodes = find_nodes(layout, environment)
        context = JobContext(config, platform, layout, before.run_dir, before.models, nodes)
        with progress(log, "checking files and settings"):
            _hold_run_dir(context, cleanup)
            state = State.of(context)
            run_checks(INPUT_CHECKS, state, context)
            assert state.opened is not None
            first_step = state.opened.first_step
            exported = not config.run.export_at_end or context.run_dir.exported_at() == first_step
            if first_step >= config.run.steps and exported:
                log.info("%s is complete: %d of %d steps", config.run.dir, first_step, config.run.steps)
                return
            state.inputs = read_inputs(context)
            run_checks(CONTENT_CHECKS, state, context)
            start = make_start(context, state.opened, state.inputs, sources)
        _train(context, state.loaded_inputs(), start, cleanup)


def _train(context: JobContext, loaded: LoadedInputs, start: Start, cleanup: ExitStack) -> None:
    config, layout, first_step = context.config, context.layout, start.first_step
    last_step = config.run.steps
    if config.run.stop_after is not None:
        last_step = min(last_step, first_step + config.run.stop_after)
    needed = replace(context, config=remaining(config, start.phase))
    servers = start_servers(needed, cleanup, loaded.longest) if first_step < last_step else Servers()

    with progress(log, "making models, optimizer and servers ready"):
        student = build_model(
            context.student, config.parallel, layout, context.platform,
            dtype=config.student.dtype, trainable=True, recompute=config.student.recompute,
            recompute_modules=config.student.recompute_modules, recompute_layers=config.student.recompute_layers,
            optimizer=config.optimizer,
        )  # fmt: skip
        load_hf(student, config.student.path, layout)
        if first_step < last_step:
            check_model(context, "student.path", student, start.inputs)
        if start.source is not None and not config.run.init_optimizer:
            begin_weights(start.source, student)
        optimizer, scheduler = build_optimizer(
            student, config.optimizer, steps=config.run.steps * config.objective.updates_per_step
        )
        if start.source is not None and config.run.init_optimizer:
            begin_optimizer(start.source, TrainState(student, optimizer, scheduler))
        average = student_average(context, student) if first_step < last_step else None
        state = TrainState(student, optimizer, scheduler, average)
        if start.checkpoint is not None:
            load(start.checkpoint, state, run=start.run)
            log.info("resumed from %s", start.checkpoint)
        components = (
            _make_components(context, loaded, state, servers, start, cleanup) if first_step < last_step else None
        )
        accept(context, start, loaded.day)
    if components is not None:
        Trainer(components, first_step=first_step, last_step=last_step).fit()
    if last_step < config.run.steps:
        log.info(
            "stopped after step %d of %d (run.stop_after=%s); the same command resumes from %s",
            last_step,
            config.run.steps,
            config.run.stop_after,
            latest(context.run_dir.checkpoints),
        )
    if last_step == config.run.steps and config.run.export_at_end:
        with stopping.safe_points(), stopping.held():
            export(context, student, max(first_step, last_step))


@dataclass(frozen=True)
class _Shared:
    """The parts of a job that all of its phases use; a run without phases has one."""

    context: JobContext
    """With the configuration of the whole run."""
    loaded: LoadedInputs
    state: TrainState
    servers: Servers
    start: Start
    teachers: Mapping[str | None, Model | None]
    """The models of the teachers in the job by name; the only one has the name None."""
    reference: Model | None
    policy: PolicyServer | None
    monitor: Monitor
    bounds: SamplerBounds
    clock: StepClock


def _make_components(
    context: JobContext, loaded: LoadedInputs, state: TrainState, servers: Servers, start: Start, cleanup: ExitStack
) -> Components:
    config, layout = remaining(context.config, start.phase), context.layout
    needed = replace(context, config=config)
    sections = {teacher.name: teacher for teacher in teachers_of(config)}
    teachers = {name: teacher_model(each) for name, each in teacher_contexts(needed).items()}
    reference = reference_model(needed)
    keys = [sections[name].path_key for name in teachers]
    for key, model in zip([*keys, "objective.reference"], [*teachers.values(), reference], strict=True):
        if model is not None:
            check_model(context, key, model, start.inputs)
    if config.gates.longest_sequence:
        for phase in phase_configs(config):
            _try_longest(phase, state.model, teachers.get(None))
    clock = StepClock()
    policy = make_policy(context, state.model, loaded.ends, servers.policy, clock) if samples_rollouts(config) else None
    if policy is not None:
        cleanup.callback(policy.close)
    with raise_on_all_ranks(layout.groups.control):
        monitor = Monitor(context.config, context.run_dir.root, layout.rank, start_step=start.first_step)
        cleanup.callback(monitor.close)
    bounds = sampler_bounds(context, servers.policy)
    shared = _Shared(
        context, loaded, state, servers, start, teachers, reference, policy, monitor, bounds, clock
    )  # fmt: skip
    parts: list[Components] = []
    checks: dict[str | None, TeacherCheck] = {}
    for phase in phase_configs(config):
        parts.append(_make_phase(shared, phase, checks))
    access = {
        name: TeacherAccess(model, servers.of_teacher(name), _identity(checks, name), start.inputs)
        for name, model in teachers.items()
    }
    held_out = make_held_out(needed, state.model, LossSettings.from_config(parts[0].config), loaded, access)
    parts = [replace(part, held_out=held_out) for part in parts]
    if start.phase is None:
        return parts[0]
    assert isinstance(context.config.objective, PhasesObjective)
    return replace(parts[0], phases=PhaseRun(context.config.objective, start.phase, parts))


def _try_longest(config: Config, student: Model, teacher: Model | None) -> None:
    """Try the longest pack with the objective of `config`."""
    objective = config.objective
    probe_memory(
        student,
        objective_of(objective),
        LossSettings.from_config(config),
        tokens_per_micro_batch=config.batch.tokens_per_micro_batch,
        k=objective.teacher_topk,
        student_topk=objective.student_candidates,
        teacher=teacher if objective.full_vocabulary_divergence is not None else None,
    )


def _identity(checks: Mapping[str | None, TeacherCheck], teacher: str | None) -> str:
    return checks[teacher].name if teacher in checks else ""


def _make_phase(shared: _Shared, config: Config, checks: dict[str | None, TeacherCheck]) -> Components:
    """Return the parts for the objective of `config`. `checks` has those of served teachers that earlier phases made,
    by the teacher's name, and gets those of this phase."""
    context, loaded, state = replace(shared.context, config=config), shared.loaded, shared.state
    layout, objective, settings = context.layout, config.objective, LossSettings.from_config(config)
    scorers: dict[str | None, Teacher] = {}
    if state.average is not None and loaded.solution_prompts is not None:
        scorers[None] = make_self_teacher(context, state.average, settings, loaded.solution_prompts, loaded.ignored)
    else:
        for name, each in teacher_contexts(context).items():
            model = shared.teachers[name] if objective.reads_teacher else None
            server = shared.servers.of_teacher(name)
            scorers[name] = make_teacher(
                each, model, settings, server, loaded.longest, excluded_of(loaded, name), checks.get(name)
            )
    scorer = joined(scorers, context, state.model, loaded.ignored)
    served = {name: each for name, each in scorers.items() if isinstance(each, ServedTeacher)}
    asked = {name: each.check for name, each in served.items() if each.check is not None}
    checks |= asked
    assert state.optimizer is not None and state.scheduler is not None
    rollouts = RolloutSource(
        config,
        context.run_dir,
        loaded.prompts,
        shared.policy if objective.samples else None,
        layout,
        vocab_size=context.student.vocab_size,
        end_id=loaded.ends.end_id,
    )
    scores = ScoreSource(
        scorer,
        context.run_dir,
        layout,
        replay=config.run.replay,
        name=scorer_name(config, shared.start.inputs, {name: _identity(asked, name) for name in scorers}),
        on_disk=objective.stores_scores,
    )
    fallible = (
        scorer if isinstance(scorer, ServedTeacher | TeacherSet) and served and objective.has_prefix_loss else None
    )
    reference = shared.reference if reference_path(config) is not None else None
    return Components(
        config=config,
        layout=layout,
        run_dir=context.run_dir,
        student=state.model,
        optimizer=state.optimizer,
        scheduler=state.scheduler,
        teacher_model=shared.teachers.get(None) if objective.reads_teacher else None,
        average=state.average,
        ignored=loaded.ignored,
        rollouts=rollouts,
        prefixes=PrefixLosses(fallible, scores, rollouts),
        scores=scores,
        context=BatchContextSource(config, state.model, reference),
        monitor=shared.monitor,
        renderer=loaded.renderer,
        sampler_bounds=shared.bounds,
        teacher_check=joined_checks(asked),
        clock=shared.clock,
    )


def export(context: JobContext, student: Model, step: int) -> None:
    """Write the student as a Hugging Face folder to <run.dir>/export. Collective.

    An older export is replaced only when the new one is complete.
    """
    run_dir, control = context.run_dir, context.layout.groups.control
    fresh = run_dir.export.with_name("export.fresh")
    if context.layout.rank == 0:
        shutil.rmtree(fresh, ignore_errors=True)
    export_hf(student, context.layout, fresh, source_folder=context.config.student.path)
    with raise_on_all_ranks(control):
        if context.layout.rank == 0:
            replace_folder(fresh, run_dir.export)
            publish_text(run_dir.export_step, f"{step}\n")
    log.info("exported the student to %s", run_dir.export)


def _hold_run_dir(context: JobContext, cleanup: ExitStack) -> None:
    """Lock the run directory on rank 0, then watch it on the others, so every rank notices its removal. Collective."""
    run_dir, rank = context.run_dir, context.layout.rank
    for mine, hold in ((rank == 0, lambda: run_dir.lock(context.config.run.lock)), (rank != 0, run_dir.watch)):
        with raise_on_all_ranks(context.layout.groups.control):
            if mine:
                cleanup.callback(hold().release)
    if rank == 0:
        remove_left_over()
        if removed := run_dir.clean():
            log.info("removed %d unfinished files of a killed launch in %s", removed, run_dir.root)
