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
from typing import Literal

from tropd_mcore.config.checks import data_problems, layout_problems
from tropd_mcore.config.derived import longest_sample, support_size
from tropd_mcore.config.plan import resolved_yaml
from tropd_mcore.config.schema import Config
from tropd_mcore.data.chat import Renderer
from tropd_mcore.data.prompts import PromptSet, load_prompts
from tropd_mcore.errors import ConfigError
from tropd_mcore.files import publish_text
from tropd_mcore.losses.method_table import bind_objective
from tropd_mcore.mcore.checkpoint import TrainState, load
from tropd_mcore.mcore.checkpoint_info import latest
from tropd_mcore.mcore.dry_run import dry_run
from tropd_mcore.mcore.model import Model, build_model
from tropd_mcore.mcore.optimizer import build_optimizer
from tropd_mcore.mcore.parallel import Layout, RankEnvironment, destroy, initialize
from tropd_mcore.mcore.platform import Platform, choose
from tropd_mcore.mcore.weights_io import iterate_hf, load_hf
from tropd_mcore.monitor.monitor import Monitor
from tropd_mcore.rollout.publisher import WeightPublisher
from tropd_mcore.rollout.sampler import SglangSampler, check_ids
from tropd_mcore.serving.process import ServerSpec
from tropd_mcore.serving.supervisor import SupervisedServer
from tropd_mcore.teacher.megatron import MegatronTeacher
from tropd_mcore.teacher.sglang import SglangTeacher
from tropd_mcore.teacher.vocabulary import check_same_vocabulary
from tropd_mcore.train.collective import on_rank_zero, shared_fate
from tropd_mcore.train.policy_server import PolicyServer
from tropd_mcore.train.rollout_source import RolloutSource
from tropd_mcore.train.run_dir import RunDir
from tropd_mcore.train.score_source import ScoreSource, Teacher
from tropd_mcore.train.served_teacher import ServedTeacher
from tropd_mcore.train.trainer import Parts, Trainer, loss_settings
from tropd_mcore.weights.architecture import Architecture, read_architecture
from tropd_mcore.weights.families import hf_weight_plan
from tropd_mcore.weights.hf_folder import write_hf_folder
from tropd_mcore.weights.publish import replace_folder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Site:
    """Where the run takes place."""

    config: Config
    platform: Platform
    layout: Layout
    run_dir: RunDir
    student: Architecture
    teacher: Architecture


def run_job(config: Config, sources: dict[str, str], environment: RankEnvironment) -> None:
    """Train `config` to its end (or for `run.stop_after` steps) and export the student. Raises TropdError."""
    problems = layout_problems(config.parallel, environment.world_size)
    if problems:
        raise ConfigError(problems)
    student, teacher = read_architecture(config.student.path), read_architecture(config.teacher.path)
    platform = choose(config.platform.kind, environment.local_rank)
    layout = initialize(config.parallel, platform, config.run.seed, environment)
    site = Site(config, platform, layout, RunDir(config.run.dir), student, teacher)
    with ExitStack() as cleanup:
        cleanup.callback(destroy, layout)
        _prepare_run_dir(site, sources, cleanup)
        if config.gates.vocabulary:
            on_rank_zero(lambda: check_same_vocabulary(config.student.path, config.teacher.path), layout.groups.control)
        renderer = Renderer(config.student.path)
        prompts = load_prompts(config.data, renderer, seed=config.run.seed)
        longest = _check_data(site, prompts)
        first_step = _first_step(site)
        exported = not config.run.export_at_end or site.run_dir.exported_at() == first_step
        if first_step >= config.run.steps and exported:
            log.info("%s is complete: %d of %d steps", config.run.dir, first_step, config.run.steps)
            return
        _train(site, renderer, prompts, longest, first_step, cleanup)


def _train(
    site: Site, renderer: Renderer, prompts: PromptSet, longest: int, first_step: int, cleanup: ExitStack
) -> None:
    config, layout = site.config, site.layout
    last_step = config.run.steps
    if config.run.stop_after is not None:
        last_step = min(last_step, first_step + config.run.stop_after)
    policy_process = teacher_process = None
    if first_step < last_step:
        policy_process = _policy_process(site, cleanup)
        teacher_process = _teacher_process(site, cleanup)

    student = build_model(
        site.student, config.parallel, layout, site.platform,
        dtype=config.student.dtype, trainable=True, recompute=config.student.recompute, optimizer=config.optimizer,
    )  # fmt: skip
    load_hf(student, config.student.path, layout)
    optimizer, scheduler = build_optimizer(student, config.optimizer, config.run.steps)
    if first_step:
        checkpoint = latest(site.run_dir.checkpoints)
        assert checkpoint is not None
        load(checkpoint, TrainState(student, optimizer, scheduler))
        log.info("resumed from %s", checkpoint)

    objective = bind_objective(config.objective)
    if config.gates.longest_sequence and first_step < last_step:
        dry_run(
            student, objective, loss_settings(config),
            tokens_per_micro_batch=config.batch.tokens_per_micro_batch, k=support_size(config.objective),
        )  # fmt: skip
    if first_step < last_step:
        policy = _policy(site, student, renderer, policy_process) if config.run.replay is None else None
        teacher = _teacher(site, teacher_process, longest)
        monitor = Monitor(config, site.run_dir.root, layout.rank, start_step=first_step)
        cleanup.callback(monitor.close)
        parts = Parts(
            config=config,
            layout=layout,
            run_dir=site.run_dir,
            student=student,
            optimizer=optimizer,
            scheduler=scheduler,
            objective=objective,
            rollouts=RolloutSource(config, site.run_dir, prompts, policy, layout),
            scores=ScoreSource(teacher, site.run_dir, config.run.replay, layout),
            monitor=monitor,
            renderer=renderer,
        )
        Trainer(parts, first_step=first_step, last_step=last_step).fit()
    if last_step == config.run.steps and config.run.export_at_end:
        export(site, student, max(first_step, last_step))


def export(site: Site, student: Model, step: int) -> None:
    """Write the student as a Hugging Face folder to <run.dir>/export. Collective."""
    stream = iterate_hf(student, site.layout)
    with shared_fate(site.layout.groups.control):
        try:
            if site.layout.rank == 0:
                fresh = site.run_dir.export.with_name("export.fresh")
                shutil.rmtree(fresh, ignore_errors=True)
                write_hf_folder(fresh, stream, source_folder=site.config.student.path)
                replace_folder(fresh, site.run_dir.export)
                publish_text(site.run_dir.export_step, f"{step}\n")
        finally:
            for _ in stream:  # every rank takes part to the end
                pass
    log.info("exported the student to %s", site.run_dir.export)


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


def _check_data(site: Site, prompts: PromptSet) -> int:
    """The most tokens a sample of this run can have.

    Raises ConfigError where packs or models are too short for it, DataError where an id is not in the vocabulary.
    """
    config = site.config
    for prompt in prompts.prompts:
        check_ids(prompt.token_ids, site.student.vocab_size, what=f"prompt {prompt.prompt_id!r} of data.prompts")
        if prompt.teacher_response_ids is not None:
            what = f"the response to {prompt.prompt_id!r} in data.teacher_responses"
            check_ids(prompt.teacher_response_ids, site.student.vocab_size, what=what)
    lengths = {"longest_prompt": prompts.longest_prompt, "longest_response": prompts.longest_response}
    problems = data_problems(config, **lengths)
    longest = longest_sample(config, **lengths)
    for key, path, arch in (
        ("student.path", config.student.path, site.student),
        ("teacher.path", config.teacher.path, site.teacher),
    ):
        if longest > arch.max_position_embeddings:
            problems.append(
                f"{key}={path}: its context is {arch.max_position_embeddings} tokens but the longest sample can have "
                f"{longest}; lower rollout.max_new_tokens or choose another model"
            )
    if problems:
        raise ConfigError(problems)
    return longest


def _policy_process(site: Site, cleanup: ExitStack) -> SupervisedServer | None:
    if site.config.run.replay is not None:
        return None
    return _start_server(site, "rollout", cleanup)


def _teacher_process(site: Site, cleanup: ExitStack) -> SupervisedServer | None:
    return _start_server(site, "teacher", cleanup) if site.config.teacher.kind == "sglang" else None


def _start_server(site: Site, name: Literal["rollout", "teacher"], cleanup: ExitStack) -> SupervisedServer | None:
    """Start the server of a section on rank 0, without waiting for it; on other ranks, None if it is a started one."""
    served = site.config.student if name == "rollout" else site.config.teacher
    config = site.config.rollout.server if name == "rollout" else site.config.teacher.server
    spec = ServerSpec(
        key=f"{name}.server",
        model_key="student.path" if name == "rollout" else "teacher.path",
        model_path=served.path,
        config=config,
        device=site.platform.name,
        run_dir=site.run_dir.logs,
        name=name,
        dtype=served.dtype,
    )
    server = SupervisedServer(spec) if site.layout.rank == 0 or config.url is not None else None
    with shared_fate(site.layout.groups.control):
        if server is not None:
            cleanup.callback(server.stop)
            server.start()
    return server


def _policy(site: Site, student: Model, renderer: Renderer, server: SupervisedServer | None) -> PolicyServer:
    config = site.config
    dtype = student.config.params_dtype
    plan = [(name, shape, dtype) for name, shape in hf_weight_plan(site.student)]

    def connect(server: SupervisedServer) -> tuple[SglangSampler, WeightPublisher]:
        sampler = SglangSampler(
            server.client,
            config.rollout,
            eos_ids=renderer.eos_ids,
            vocab_size=site.student.vocab_size,
            seed=config.run.seed,
        )
        return sampler, WeightPublisher(server.client, plan)

    return PolicyServer(student, site.layout, server, connect, prove_sync=config.gates.weight_sync)


def _teacher(site: Site, server: SupervisedServer | None, longest: int) -> Teacher:
    config, layout = site.config, site.layout
    k = support_size(config.objective)
    if config.teacher.kind == "sglang":
        return _served_teacher(site, server, longest)
    model = build_model(
        site.teacher, config.parallel, layout, site.platform, dtype=config.teacher.dtype, trainable=False
    )
    load_hf(model, config.teacher.path, layout)
    return MegatronTeacher(model, k=k, chunk_tokens=config.loss.chunk_tokens)


def _served_teacher(site: Site, server: SupervisedServer | None, longest: int) -> ServedTeacher:
    config, k = site.config.teacher, support_size(site.config.objective)
    teacher: SglangTeacher | None = None
    with shared_fate(site.layout.groups.control):
        if server is not None:
            server.wait_ready()
            teacher = SglangTeacher(
                server,
                topk=k,
                teacher_width=site.teacher.vocab_size,
                student_width=site.student.vocab_size,
                on_failure=config.on_failure,
            )
            teacher.check_length(longest)
    return ServedTeacher(teacher, site.layout, topk=k, only_rank_zero=config.server.url is None)
