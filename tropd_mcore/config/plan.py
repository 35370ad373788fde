"""The resolved configuration file and the plan of `--dry-run`, from the configuration alone.

Nothing here reads models or data or starts anything. Invariant: loading a resolved file gives the same configuration.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import yaml

from tropd_mcore.config.derived import (
    alpha,
    chunk_tokens,
    phase_configs,
    reference_path,
    rollout_servers,
)
from tropd_mcore.config.fields import Dtype
from tropd_mcore.config.loader import leaves
from tropd_mcore.config.schema import Config, ServerConfig, StudentConfig
from tropd_mcore.config.server_checks import gpus_of
from tropd_mcore.config.teachers import TeacherSection, teachers_of


def resolved_yaml(config: Config, sources: Mapping[str, str]) -> str:
    """Return every key as YAML, one per line, each with the source of its value after two spaces and `# `."""
    lines: list[str] = []
    open_sections: list[str] = []
    for dotted, value in leaves(config).items():
        *sections, leaf = dotted.split(".")
        shared = 0
        while shared < min(len(sections), len(open_sections)) and sections[shared] == open_sections[shared]:
            shared += 1
        dash = False  # the next line is the first of an entry of a list
        for depth in range(shared, len(sections)):
            if sections[depth].isdecimal():
                dash = True
                continue
            lines.append(f"{_indent(depth, dash)}{sections[depth]}:")
            dash = False
        open_sections = sections
        lines.append(f"{_indent(len(sections), dash)}{leaf}: {_scalar(value)}  # {sources[dotted]}")
    return "\n".join(lines) + "\n"


def _indent(depth: int, dash: bool) -> str:
    return "  " * (depth - 1) + "- " if dash else "  " * depth


def plan(config: Config, world_size: int | None = None, more: Mapping[str, str] | None = None) -> str:
    """Return the plan as aligned lines. `world_size` is the number of ranks, or None if it is unknown.

    `more` are lines that the configuration alone does not give, by their names.
    """
    rows = {
        "layout": _layout(config, world_size),
        "student": _student(config),
        **_phases(config),
        "rollouts": _of_each_phase(config, _rollouts),
        **_teachers(config),
        "objective": _of_each_phase(config, _objective),
        "loss": _loss(config),
        "per step": _of_each_phase(config, _step),
        "guidance": _of_each_phase(config, _guidance),
        "optimizer": _optimizer(config),
        **(more or {}),
        "run": f"{config.run.steps} steps, checkpoint every {config.run.checkpoint_every}, seed {config.run.seed}",
        **_files(config),
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items()) + "\n"


def _phases(config: Config) -> dict[str, str]:
    return {"phases": config.objective.description()} if len(config.objective.parts) > 1 else {}


def _of_each_phase(config: Config, row: Callable[[Config], str]) -> str:
    """The text of a row; if it differs between phases, that of each."""
    texts = [row(phase) for phase in phase_configs(config)]
    if len(set(texts)) == 1:
        return texts[0]
    return " | ".join(f"phase {number}: {text}" for number, text in enumerate(texts))


def _layout(config: Config, world_size: int | None) -> str:
    parallel = config.parallel
    model = parallel.tensor * parallel.pipeline * parallel.context
    data = parallel.data or (world_size // model if world_size else None)
    ranks = f"{model * data} ranks" if data else f"WORLD_SIZE ranks, a multiple of {model}"
    chunks = f" (x {parallel.virtual_pipeline} chunks)" if parallel.virtual_pipeline else ""
    sequence = ", sequence parallel" if parallel.sequence_parallel else ""
    return (
        f"tp {parallel.tensor} x pp {parallel.pipeline}{chunks} x cp {parallel.context} x dp {data or '?'} = {ranks}"
        f"{sequence}, platform {config.platform.kind}"
    )


def _student(config: Config) -> str:
    student, run = config.student, config.run
    text = f"{student.path}, {student.dtype}, recompute {_recompute(student)}"
    if run.init_from is not None:
        what = "weights and optimizer state" if run.init_optimizer else "weights"
        text += f"; a new run begins with the {what} of {run.init_from}"
    return text


def _recompute(student: StudentConfig) -> str:
    if student.recompute == "selective":
        return f"selective ({', '.join(student.recompute_modules)})"
    if student.recompute == "full" and student.recompute_layers is not None:
        return f"full (the first {student.recompute_layers} layers of a stage)"
    return student.recompute


def _rollouts(config: Config) -> str:
    if not config.objective.samples:
        return f"none: trains on the responses of {config.data.teacher_responses}"
    if config.run.replay is not None:
        return f"replayed from {config.run.replay}, with the teacher's scores if the layout is the same"
    servers = _servers(
        rollout_servers(config), config.student.dtype, " from the student's weights", config.platform.kind
    )
    router = config.rollout.router
    if router is None:
        return servers
    return f"{servers}, behind {f'the router at {router.url}' if router.url else f'a router ({router.policy})'}"


def _servers(servers: Mapping[str, ServerConfig], dtype: Dtype, source: str, platform: str) -> str:
    """The text of each server; equal ones are counted, and their GPUs are listed."""
    if len(servers) == 1:
        (server,) = servers.values()
        return _server(server, dtype, f"started by {_who(server)}{source}", platform)
    texts: dict[str, list[str]] = {}
    for server in servers.values():
        text = _server(server.model_copy(update={"gpus": ()}), dtype, f"started by {_who(server)}{source}", "cpu")
        texts.setdefault(text, []).append("+".join(map(str, gpus_of(server))))
    listed = []
    for text, gpus in texts.items():
        where = "" if platform == "cpu" or text.startswith("SGLang at ") else f", on GPU {', '.join(gpus)}"
        listed.append(f"{len(gpus)} x {text}{where}" if len(gpus) > 1 else f"{text}{where}")
    return f"{len(servers)} servers: {' | '.join(listed)}"


def _who(server: ServerConfig) -> str:
    return "rank 0" if server.node == 0 else f"the first rank of node {server.node}"


def _server(server: ServerConfig, dtype: Dtype, started: str, platform: str) -> str:
    if server.url is not None:
        return f"SGLang at {server.url}"
    port = "a free port" if server.port is None else f"port {server.port}"
    own = "" if server.python is None else f", run by {server.python}"
    where = "" if platform == "cpu" else f" on GPU {', '.join(map(str, gpus_of(server)))}"
    return (
        f"SGLang on {port}, {started}, tp {server.tensor_parallel}{where}, {server.dtype or dtype}{_cache(server)}{own}"
    )


def _cache(server: ServerConfig) -> str:
    if server.max_total_tokens is not None:
        size = f", KV cache of {server.max_total_tokens:,} tokens"
    else:
        size = "" if server.mem_fraction is None else f", {server.mem_fraction:g} of the free GPU memory"
    return f"{size} for {server.max_concurrency} requests" + (", in turns with training" * server.release_memory)


def _teachers(config: Config) -> dict[str, str]:
    """A row for each teacher."""
    return {
        "teacher" if teacher.name is None else f"teacher {teacher.name}": _of_each_phase(
            config, partial(_teacher, teacher)
        )
        for teacher in teachers_of(config)
    }


def _teacher(section: TeacherSection, config: Config) -> str:
    teacher, own = section.config, config.objective.self_teaching
    if own is not None:
        return (
            f"the student itself, {teacher.dtype}, weights averaged at rate {own.average_rate:g}, with a correct "
            "solution of another sample before the response"
        )
    if not config.objective.reads_teacher:
        return f"{teacher.path}, whose responses are stored; its weights are not loaded"
    if teacher.kind == "sglang":
        server = _servers(section.servers, teacher.dtype, "", config.platform.kind)
        return f"{teacher.path}, scored by {server}"
    text = f"{teacher.path}, {teacher.dtype}, Megatron in the training job, sharded like the student"
    if teacher.pipeline_layers is not None:
        text += f", stages of {', '.join(map(str, teacher.pipeline_layers))} layers"
    return text + (", weights in host memory between scorings" if teacher.offload else "")


def _objective(config: Config) -> str:
    """Kind and constants, then everything that the objective needs besides the teacher's scores."""
    return "; ".join([f"{config.objective.kind}: {config.objective.description()}", *_needs(config)])


def _needs(config: Config) -> Iterator[str]:
    objective = config.objective
    correction, updates = objective.policy, objective.updates_per_step
    if correction.ratio != "none":
        yield f"ratio {correction.ratio}"
    if updates > 1:
        yield f"{updates} updates per step ({correction.mini_batches} mini-batches x {correction.epochs} epochs)"
    if objective.student_candidates:
        yield f"the student's own top-{objective.student_candidates}"
    if (reference := reference_path(config)) is not None:
        yield f"reference {reference}"
    if objective.needs_statistic:
        yield "a statistic over the batch"


def _loss(config: Config) -> str:
    loss = config.loss
    fused = f"output layer fused, weight gradient {loss.weight_gradient}"
    form = fused if loss.form == "fused" else "logits given"
    overlap = ", chunks overlapped" if loss.overlap_chunks else ""
    softcap = f", logits capped at {loss.logit_softcap:g}" if loss.logit_softcap is not None else ""
    ignored = len(loss.ignore_tokens) + len(loss.ignore_first_of)
    return (
        f"{form}, {loss.backend} backend, {chunk_tokens(config):,} rows per chunk, {loss.aggregation}"
        f"{overlap}{softcap}{f', {ignored} tokens ignored' if ignored else ''}"
    )


def _step(config: Config) -> str:
    rollout = config.rollout
    samples = rollout.prompts_per_step * rollout.samples_per_prompt
    tokens = samples * (config.data.max_prompt_tokens + rollout.max_new_tokens)
    guidance = config.objective.active_guidance
    prefix = " + teacher prefixes" if guidance is not None and guidance.continuation_budget == "full" else ""
    return (
        f"{rollout.prompts_per_step} prompts x {rollout.samples_per_prompt} = {samples} samples, at most {tokens:,} "
        f"tokens{prefix} in packs of {config.batch.tokens_per_micro_batch:,}{_truncation(config)}"
    )


def _truncation(config: Config) -> str:
    truncate = config.rollout.truncate
    if truncate is None:
        return ""
    return f"; responses cut at {truncate.start} tokens, {truncate.increment} more every {truncate.every} steps"


def _guidance(config: Config) -> str:
    guidance = config.objective.active_guidance
    if guidance is None:
        return "off: every token is sampled by the student"
    steps = [config.run.steps * quarter // 4 for quarter in range(5)]
    values = ", ".join(f"{alpha(step, config):.3f} at {step}" for step in steps)
    return f"{guidance.schedule}, {guidance.length_mode}, {guidance.loss} x {guidance.beta:g}; alpha {values}"


def _optimizer(config: Config) -> str:
    optimizer = config.optimizer
    return (
        f"Adam, learning rate {optimizer.learning_rate:g} {optimizer.schedule} after {optimizer.warmup_steps} warm-up "
        f"steps, weight decay {optimizer.weight_decay:g}, clip {optimizer.clip_grad_norm:g}, "
        f"{'sharded over data ranks' if optimizer.distributed else 'replicated'}"
    )


def _files(config: Config) -> dict[str, str]:
    root = config.run.dir
    files = {
        "settings": f"{root}/config.resolved.yaml",
        "metrics": f"{root}/metrics.jsonl",
        "checkpoints": f"{root}/checkpoints, the newest {config.run.keep_checkpoints} are kept",
    }
    if config.run.export_at_end:
        files["export"] = f"{root}/export, a Hugging Face folder"
    if config.monitor.tensorboard:
        files["tensorboard"] = f"{root}/tensorboard"
    return files


def _scalar(value: object) -> str:
    """One value as YAML on one line."""
    if isinstance(value, str) and "\n" in value:
        return json.dumps(value, ensure_ascii=False)
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
