"""Builds the parts of a job that have weights or a server: models in this process, and server processes.

This module does not decide their order (`job`) or use them. Invariant: everything started here is stopped by the
caller's `cleanup`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from tropd_mcore.config.derived import (
    is_rollout,
    reference_path,
    rollout_servers,
    used_servers,
)
from tropd_mcore.config.fields import Dtype
from tropd_mcore.config.schema import Config
from tropd_mcore.config.teachers import alone, stage_layers, teachers_of, the_teacher
from tropd_mcore.data.end_tokens import EndTokens
from tropd_mcore.data.packing import NOTHING_IGNORED
from tropd_mcore.data.supervision import IgnoredTokens
from tropd_mcore.mcore.average import WeightAverage
from tropd_mcore.mcore.collective import on_rank_zero, raise_on_all_ranks
from tropd_mcore.mcore.loss_settings import LossSettings
from tropd_mcore.mcore.model import Model, build_model, offloaded
from tropd_mcore.mcore.packs import pack_on
from tropd_mcore.mcore.parallel import Layout
from tropd_mcore.mcore.platform import Platform
from tropd_mcore.mcore.weights_io import load_hf
from tropd_mcore.monitor.clock import StepClock
from tropd_mcore.records.run_dir import RunDir
from tropd_mcore.rollout.fleet_publisher import FleetPublisher, Target
from tropd_mcore.rollout.policy_server import PolicyServer, PolicyServers, PolicyTools
from tropd_mcore.rollout.publication import PublicationLedger
from tropd_mcore.rollout.requests import responses_as_rollouts
from tropd_mcore.rollout.sampler import SglangSampler
from tropd_mcore.rollout.served_tokenizer import check_served_tokenizer
from tropd_mcore.serving.fleet import ServerFleet
from tropd_mcore.serving.router_lane import RouterLane
from tropd_mcore.serving.supervisor import SupervisedServer
from tropd_mcore.serving.wire import ServerInfo
from tropd_mcore.teacher.identity_check import TeacherCheck
from tropd_mcore.teacher.megatron import MegatronTeacher
from tropd_mcore.teacher.nobody import NoTeacher
from tropd_mcore.teacher.score_source import ScoreSource, Teacher
from tropd_mcore.teacher.self_teacher import SelfTeacher
from tropd_mcore.teacher.served import ServedTeacher
from tropd_mcore.teacher.sglang import SglangTeacher
from tropd_mcore.teacher.solutions import SolutionPrompts
from tropd_mcore.train.gates import SamplerBounds, engines_are_exact
from tropd_mcore.train.ground import NamedModels
from tropd_mcore.train.held_out import HeldOut, LoadedOnce
from tropd_mcore.train.inputs import Inputs
from tropd_mcore.train.loaded_inputs import LoadedInputs, longest_held_out
from tropd_mcore.train.model_check import check_model
from tropd_mcore.train.servers import Nodes, start_policy_servers, start_teacher_servers
from tropd_mcore.train.several_teachers import excluded_of, joined, scorer_name
from tropd_mcore.weights.architecture import Architecture
from tropd_mcore.weights.families import hf_weight_plan
from tropd_mcore.weights.served import ServedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobContext(NamedModels):
    """Configuration, platform, layout, run directory and architectures of the job."""

    config: Config
    platform: Platform
    layout: Layout
    run_dir: RunDir
    models: Mapping[str, Architecture | ServedModel]
    """Architectures, or sizes of a served teacher, by the key of their folder: student.path, teacher.path, and
    objective.reference if there is one."""
    nodes: Nodes = field(default_factory=Nodes)


@dataclass(frozen=True)
class Servers:
    """The servers of the run. A teacher's are on rank 0 if the job starts one of them, else on every rank."""

    policy: PolicyServers = field(default_factory=lambda: PolicyServers({}, {}))
    teacher: ServerFleet | None = None
    teachers: Mapping[str, ServerFleet | None] = field(default_factory=dict)
    """Those of several teachers, by name."""

    def of_teacher(self, name: str | None) -> ServerFleet | None:
        """Return the servers of a teacher; None is the name of the only one."""
        return self.teacher if name is None else self.teachers.get(name)


def start_servers(context: JobContext, cleanup: ExitStack, longest: int) -> Servers:
    """Start the servers of the run; `longest` is the number of tokens of the longest sample. Collective.

    On GPUs the rollout servers are ready before the teacher's starts, and all before this returns. Call it before the
    trainer takes memory: a server takes a part of what is free when it starts. On a CPU nothing is waited for.
    """
    used = used_servers(context.config)
    policy = start_policy_servers(
        {key: server for key, server in used.items() if is_rollout(key)}, context, cleanup, longest
    )
    teachers = {
        name: start_teacher_servers(of_teacher, cleanup, longest)
        for name, of_teacher in teacher_contexts(context).items()
        if used.keys() & the_teacher(of_teacher.config).servers.keys()
    }
    named = {name: server for name, server in teachers.items() if name is not None}
    servers = Servers(policy, teachers.get(None), named)
    with raise_on_all_ranks(context.layout.groups.control):
        if _releases_memory(context):
            for server in (one for one in policy.reached.values() if one.config.release_memory):
                server.release_memory()  # until the first publication; all servers have fitted at once
    return servers


def teacher_contexts(context: JobContext) -> dict[str | None, JobContext]:
    """Return the context of each teacher by name, in which it is the only one. The only teacher has the name None."""
    config = context.config
    return {each.name: replace(context, config=alone(config, each.name)) for each in teachers_of(config)}


def teacher_model(context: JobContext) -> Model | None:
    """Build the teacher in this process; None if it is a server or the student, or if nobody asks it. Collective."""
    teacher, objective = the_teacher(context.config), context.config.objective
    if teacher.served or objective.self_teaching is not None or not objective.reads_teacher:
        return None
    model = _frozen(context, teacher.path_key, teacher.path, teacher.config.dtype)
    return offloaded(model) if teacher.config.offload else model


def student_average(context: JobContext, student: Model) -> WeightAverage | None:
    """Start the average of `student` if it is the teacher; None otherwise."""
    config, own = context.config, context.config.objective.self_teaching
    if own is None:
        return None
    return WeightAverage(student, config.parallel, dtype=config.teacher.dtype, rate=own.average_rate)


def reference_model(context: JobContext) -> Model | None:
    """Build the objective's reference model in the student's dtype; None if the objective has none. Collective."""
    path = reference_path(context.config)
    return _frozen(context, "objective.reference", path, context.config.student.dtype) if path else None


def make_policy(
    context: JobContext,
    student: Model,
    ends: EndTokens,
    servers: PolicyServers,
    clock: StepClock | None = None,
) -> PolicyServer:
    """Return the interface of all ranks to the rollout servers. Responses stop at `ends`; `clock` times the step."""
    config = context.config
    dtype = student.config.params_dtype
    plan = [(name, shape, dtype) for name, shape in hf_weight_plan(context.student)]
    ledgers = {key: PublicationLedger(key) for key in servers.reached} if config.gates.weight_sync else {}

    def connect(server: SupervisedServer) -> Target:
        if config.gates.tokenizer:
            check_served_tokenizer(server, config.student.path)
        return Target(server.client, ledgers.get(server.spec.key), server.config.weights, server.config.weights_folder)

    lane = RouterLane(servers.router) if servers.router is not None else None
    sampler = SglangSampler(
        [],
        config.rollout,
        eos_ids=ends.ids,
        vocab_size=context.student.vocab_size,
        seed=config.run.seed,
        masked_share=config.gates.masked_share,
        lane=lane,
    )
    publisher = FleetPublisher(plan, student_folder=config.student.path)
    tools = PolicyTools(sampler, publisher, connect) if context.layout.rank == 0 else None
    return PolicyServer(
        student,
        context.layout,
        servers,
        tools,
        verify_sync=config.gates.weight_sync,
        release_memory=_releases_memory(context),
        clock=clock,
    )


def _releases_memory(context: JobContext) -> bool:
    servers = rollout_servers(context.config).values()
    return context.platform.name == "cuda" and any(server.release_memory for server in servers)


def sampler_bounds(context: JobContext, servers: PolicyServers) -> SamplerBounds:
    """Return the allowed difference between sampler and trainer. Servers at a url are asked how they compute.

    Collective.
    """
    config = context.config

    def bounds() -> SamplerBounds:
        elsewhere = [server for server in servers.reached.values() if not server.is_started]
        asked: list[ServerInfo | None] = []
        if config.gates.sampler_logprob:
            asked = [server.client.info() for server in elsewhere]
        if len(asked) < max(len(servers.reached), 1):
            asked.append(None)  # those that the job starts compute as the configuration says
        exact = all(engines_are_exact(config, context.platform.name, served) for served in asked)
        return SamplerBounds.of(config, exact=exact)

    return on_rank_zero(bounds, context.layout.groups.control)


def make_teacher(
    context: JobContext,
    model: Model | None,
    settings: LossSettings,
    server: ServerFleet | None,
    longest: int,
    excluded: tuple[int, ...],
    check: TeacherCheck | None = None,
) -> Teacher:
    """Return the scorer: `model` in this process, `server` if `model` is None, or nobody. Collective.

    `longest` is the length of the longest sample; `excluded` ids cannot be in the top-k. `check` is the check of
    `server` if an earlier phase has made it.
    """
    objective = context.config.objective
    if not objective.reads_teacher:
        return NoTeacher(context.layout)
    if model is None:
        return _served_teacher(
            context,
            server,
            longest,
            excluded,
            topk=objective.teacher_topk,
            on_failure=the_teacher(context.config).config.on_failure,
            check=check,
            identify=context.config.gates.teacher_identity,
        )
    return MegatronTeacher(
        model,
        k=objective.teacher_topk,
        settings=settings,
        keep_hidden=objective.full_vocabulary_divergence is not None,
        excluded=excluded,
        key=the_teacher(context.config).key,
    )


def make_self_teacher(
    context: JobContext,
    average: WeightAverage,
    settings: LossSettings,
    prompts: SolutionPrompts,
    ignored: IgnoredTokens,
) -> Teacher:
    """Return the scorer that uses the student's average as the teacher; `ignored` tokens are not rows."""
    return SelfTeacher(
        average.model,
        prompts,
        k=context.config.objective.teacher_topk,
        settings=settings,
        tokens_per_micro_batch=context.config.batch.tokens_per_micro_batch,
        ignored=ignored,
    )


@dataclass(frozen=True)
class TeacherAccess:
    """How a teacher of the run can be asked outside a step."""

    model: Model | None
    """In this process; None = not loaded"""
    server: ServerFleet | None
    identity: str
    """Of the server (`teacher.identity`); "" if there is none"""
    inputs: Inputs


def make_held_out(
    context: JobContext,
    student: Model,
    settings: LossSettings,
    loaded: LoadedInputs,
    access: Mapping[str | None, TeacherAccess],
) -> HeldOut | None:
    """Return what measures the held-out responses; None if nothing is held out. `access` has each teacher by name.
    Collective."""
    config, layout = context.config, context.layout
    if config.held_out is None or loaded.held_out is None:
        return None
    rollouts = responses_as_rollouts(loaded.held_out.prompts, step=0, end_id=loaded.ends.end_id)
    packed = pack_on(
        layout,
        rollouts,
        tokens_per_micro_batch=config.batch.tokens_per_micro_batch,
        device=student.platform.device,
    )
    longest = longest_held_out(loaded.held_out)
    found = {
        name: _held_out_teacher(each, config.held_out.topk, settings, excluded_of(loaded, name), access[name], longest)
        for name, each in teacher_contexts(context).items()
        if name is None or any(rollout.teacher == name for rollout in rollouts)
    }
    teachers = {name: teacher for name, teacher in found.items() if teacher is not None}
    scores = None
    if len(teachers) == len(found):
        identities = {name: access[name].identity for name in teachers}
        inputs = next(iter(access.values())).inputs
        scores = ScoreSource(
            joined(teachers, context, student, NOTHING_IGNORED),
            context.run_dir,
            layout,
            replay=None,
            name=scorer_name(config, inputs, identities, candidates=config.held_out.topk),
            on_disk=True,
            place=lambda run_dir, step, dp_rank, cp_rank: run_dir.held_out_scores(dp_rank, cp_rank),
        )
    return HeldOut(config.held_out, config.run.steps - 1, student, settings, rollouts, packed, scores)


def _held_out_teacher(
    context: JobContext,
    k: int,
    settings: LossSettings,
    excluded: tuple[int, ...],
    access: TeacherAccess,
    longest: int,
) -> Teacher | None:
    """Return the scorer of held-out responses; None, with a line in the log, if no teacher can be asked. Collective.

    A teacher in this process that the objective does not read is loaded when it is asked, and freed afterwards.
    """
    config, objective = context.config, context.config.objective
    only = "so only -log p of the held-out responses is measured, not KL(teacher || student)"
    if objective.self_teaching is not None:
        log.warning("held_out: objective.kind=%s changes its teacher, %s", objective.kind, only)
        return None
    teacher = the_teacher(config)
    if teacher.served and objective.reads_teacher:
        return _served_teacher(context, access.server, longest, excluded, topk=k, on_failure="stop")
    if teacher.served:
        advice = f"with {teacher.key}.kind=megatron the teacher would be loaded once"
        log.warning("held_out: objective.kind=%s asks no teacher's server, %s; %s", objective.kind, only, advice)
        return None
    if access.model is not None:
        return MegatronTeacher(access.model, k=k, settings=settings, excluded=excluded, key=teacher.key)

    def load() -> MegatronTeacher:
        model = _frozen(context, teacher.path_key, teacher.path, teacher.config.dtype)
        check_model(context, teacher.path_key, model, access.inputs)
        return MegatronTeacher(model, k=k, settings=settings, excluded=excluded, key=teacher.key)

    return LoadedOnce(load)


def _served_teacher(
    context: JobContext,
    server: ServerFleet | None,
    longest: int,
    excluded: tuple[int, ...],
    *,
    topk: int,
    on_failure: Literal["mask", "stop"],
    check: TeacherCheck | None = None,
    identify: bool = False,
) -> ServedTeacher:
    """Return the scorer of a teacher's servers. `check` is its check if there is one; else `identify` makes one."""
    section = the_teacher(context.config)
    teacher: SglangTeacher | None = None
    with raise_on_all_ranks(context.layout.groups.control):
        if server is not None:
            server.wait_ready()
            for one in server.each if context.layout.rank == 0 else ():
                if context.config.gates.tokenizer:
                    check_served_tokenizer(one, section.path)
                one.warn_of_rounded_logits()
            teacher = SglangTeacher(
                server,
                topk=topk,
                teacher_width=context.models[section.path_key].vocab_size,
                student_width=context.student.vocab_size,
                on_failure=on_failure,
                excluded=excluded,
            )
            teacher.check_length(longest)
    if check is None and identify:
        check = TeacherCheck(server, context.config, context.layout.groups.control, section.name)
    return ServedTeacher(
        teacher,
        context.layout,
        topk=topk,
        only_rank_zero=any(one.url is None for one in section.servers.values()),
        masked_share=context.config.gates.masked_share,
        check=check,
        key=f"{section.key}.server",
    )


def _frozen(context: JobContext, key: str, path: Path, dtype: Dtype) -> Model:
    model = build_model(
        context.in_job(key), context.config.parallel, context.layout, context.platform, dtype=dtype, trainable=False,
        stage_layers=stage_layers(context.config, key),
    )  # fmt: skip
    load_hf(model, path, context.layout)
    return model
