"""Values that follow from the configuration alone.

Nothing here needs data, a model or a process. Invariant: pure functions of the configuration (and the step).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path

from tropd_mcore.config.schema import Config, ParallelConfig, RouterConfig, ServerConfig
from tropd_mcore.config.teachers import by_path_key, teachers_of
from tropd_mcore.errors import ConfigError


def phase_configs(config: Config) -> list[Config]:
    """Return the configuration of each phase, which has the phase's objective as its own; without phases, [config]."""
    parts = config.objective.parts
    if parts == (config.objective,):
        return [config]
    return [config.model_copy(update={"objective": part}) for part in parts]


def alpha(step: int, config: Config) -> float:
    """Return the fraction of the teacher response that is a prefix at `step` (from 0), in [0, 1]; 0 without guidance.

    Source: TrOPD section 3.3 (annealed to zero with a cosine); docs/method.md, 6.
    """
    guidance = config.objective.active_guidance
    if guidance is None:
        return 0.0
    if guidance.schedule == "constant":
        return 1.0
    total = guidance.total_steps or config.run.steps
    progress = min(step, total) / total
    if guidance.schedule == "linear":
        return 1.0 - progress
    return (1.0 + math.cos(math.pi * progress)) / 2.0


def prefix_length(response_length: int, step: int, config: Config, *, longest_response: int) -> int:
    """Return the number of teacher tokens in the prefix that one prompt's samples continue.

    `response_length` and `longest_response` count tokens without EOS. The result leaves `min_continuation` tokens of
    the response to the student. Under a shared budget it also leaves that many of the new tokens that the step allows.
    Source: docs/method.md, 5 and 6.
    """
    guidance = config.objective.active_guidance
    if guidance is None:
        return 0
    share = alpha(step, config)
    if guidance.length_mode == "proportional":
        wanted = math.floor(share * response_length)
    else:
        wanted = min(math.floor(share * longest_response), response_length)
    allowed = response_length - guidance.min_continuation
    if guidance.continuation_budget == "shared":
        allowed = min(allowed, longest_response_at(step, config) - guidance.min_continuation)
    return max(0, min(wanted, allowed))


def needs_student_pass(config: Config) -> bool:
    """Return whether the trainer runs a forward pass over the rollouts, without gradients, before it trains on them.

    The pass computes log p before the update (if several updates or a ratio follow), statistics over the batch or the
    sample, and the student's own candidates.
    """
    objective = config.objective
    return (
        objective.policy.ratio != "none"
        or objective.student_candidates > 0
        or objective.needs_statistic
        or objective.needs_old_logp
    )


def reference_path(config: Config) -> Path | None:
    """Return the folder of the frozen reference model; None if the objective has none."""
    return config.objective.reference_folder(config.student.path)


def model_paths(config: Config) -> dict[str, Path]:
    """Return {configuration key: folder} of every model of the run."""
    paths = {"student.path": config.student.path}
    paths |= {teacher.path_key: teacher.path for teacher in teachers_of(config)}
    reference = reference_path(config)
    return paths if reference is None else {**paths, "objective.reference": reference}


def is_served(config: Config, key: str) -> bool:
    """Return whether only a server loads the model of `key`, so that Megatron need not be able to build it."""
    teacher = by_path_key(config).get(key)
    return teacher is not None and teacher.served


def samples_rollouts(config: Config) -> bool:
    """Return whether the run samples in any phase, so that it needs a rollout server: neither a replay nor `sft`
    does."""
    return config.objective.samples and config.run.replay is None


def chunk_tokens(config: Config) -> int:
    """Return the number of tokens per chunk of the loss (loss.chunk_tokens or its default).

    A chunk of a narrow vocabulary shard is bound by launching small kernels, so it gets more rows. Its logits do not
    need more memory: rows x columns stay the same from two tensor ranks on.
    """
    return config.loss.chunk_tokens or max(2048, 1024 * config.parallel.tensor)


def measures_overlap(config: Config, step: int) -> bool:
    """Return whether topk/overlap is measured at `step`: at some steps, or at all if the student's top-k is known."""
    monitor, objective = config.monitor, config.objective
    known = objective.student_candidates >= objective.teacher_topk
    due = step % monitor.topk_overlap_every == 0 or step == config.run.steps - 1
    return monitor.topk_overlap and (known or due)


def rollout_servers(config: Config) -> dict[str, ServerConfig]:
    """Return {section: settings} of the rollout servers: rollout.server, or each entry of rollout.servers."""
    if not config.rollout.servers:
        return {"rollout.server": config.rollout.server}
    return {f"rollout.servers.{place}": server for place, server in enumerate(config.rollout.servers)}


def of_first_node(servers: Iterable[ServerConfig]) -> list[ServerConfig]:
    """Return those of `servers` that a job starts on its first node."""
    return [server for server in servers if server.url is None and server.node == 0]


def teacher_servers(config: Config) -> dict[str, ServerConfig]:
    """Return {section: settings} of the teachers' servers, of all teachers: teacher.server, or each entry of
    teacher.servers."""
    return {key: server for teacher in teachers_of(config) for key, server in teacher.servers.items()}


def is_rollout(section: str) -> bool:
    """Return whether a server's section is that of a rollout server, not of a teacher's."""
    return section.startswith("rollout.")


def server_name(section: str) -> str:
    """Return the name of a server's files in <run.dir>/logs: `rollout`, or `rollout-1` for rollout.servers.1.

    The server of teachers.math has the name `teacher-math`.
    """
    found = re.fullmatch(r"(rollout|teacher)(?:s\.([\w-]+))?\.server(?:s\.(\d+))?", section)
    assert found is not None, f"{section} is no section of a server"
    return "-".join(part for part in found.groups() if part is not None)


def model_key(section: str) -> str:
    """Return the configuration key of the folder of the model that a server's section serves."""
    return "student.path" if is_rollout(section) else f"{re.sub(r'[.]server(s[.][0-9]+)?$', '', section)}.path"


def used_servers(config: Config) -> dict[str, ServerConfig]:
    """Return {section: settings} of the servers that the job uses. A replay uses no rollout server, `sft` none."""
    servers = rollout_servers(config) if samples_rollouts(config) else {}
    if config.objective.reads_teacher:
        servers |= {key: server for each in teachers_of(config) if each.served for key, server in each.servers.items()}
    return servers


def used_router(config: Config) -> RouterConfig | None:
    """Return the section of the router that the job uses; None if it uses none, or no rollout server."""
    return config.rollout.router if samples_rollouts(config) else None


def started_router(config: Config) -> RouterConfig | None:
    """Return the section of the router that the launch starts itself; None if it starts none."""
    router = used_router(config)
    return router if router is not None and router.url is None else None


def started_servers(config: Config) -> dict[str, ServerConfig]:
    """Return {section: settings} of the servers that the launch starts itself."""
    return {key: server for key, server in used_servers(config).items() if server.url is None}


def reads_responses(config: Config) -> bool:
    """Return whether the run reads data.teacher_responses: for guidance, in sampled or replayed rollouts, or for
    `sft`."""
    return config.objective.reads_responses and config.data.teacher_responses is not None


def longest_response_at(step: int, config: Config) -> int:
    """Return the largest number of new tokens at `step` (from rollout.truncate, else rollout.max_new_tokens)."""
    truncate = config.rollout.truncate
    if truncate is None:
        return config.rollout.max_new_tokens
    return min(truncate.start + truncate.increment * (step // truncate.every), config.rollout.max_new_tokens)


def new_token_budget(step: int, prefix_tokens: int, config: Config) -> int:
    """Return the largest number of new tokens of a sample at `step` after a teacher prefix of `prefix_tokens`."""
    guidance = config.objective.active_guidance
    shared = guidance is not None and guidance.continuation_budget == "shared"
    return longest_response_at(step, config) - (prefix_tokens if shared else 0)


def longest_sample(config: Config, *, longest_prompt: int, longest_response: int) -> int:
    """Return the largest number of tokens in a sample of this run: prompt + teacher prefix + new tokens.

    Without rollouts it is prompt + teacher response.

    `longest_prompt` and `longest_response` are lengths in the data, in tokens.
    """
    lengths = {"longest_prompt": longest_prompt, "longest_response": longest_response}
    phases = phase_configs(config)
    if phases != [config]:
        return max(longest_sample(phase, **lengths) for phase in phases)
    if not config.objective.samples:
        return longest_prompt + longest_response + 1  # the end token
    guidance = config.objective.active_guidance
    prefix = prefix_length(longest_response, 0, config, longest_response=longest_response)
    shared = guidance is not None and guidance.continuation_budget == "shared"
    return longest_prompt + config.rollout.max_new_tokens + (0 if shared else prefix)


def ranks_per_node(parallel: ParallelConfig, nodes: int) -> int:
    """Return the number of ranks that each of `nodes` machines starts.

    Without parallel.data it is the smallest number that fills the machines evenly. Raises ConfigError if the ranks do
    not divide over the machines.
    """
    model = parallel.tensor * parallel.pipeline * parallel.context
    ranks = math.lcm(model, max(nodes, 1)) if parallel.data is None else model * parallel.data
    if nodes < 1 or ranks % nodes:
        raise ConfigError([f"parallel: tp*pp*cp*dp = {ranks} ranks do not divide over {nodes} machines"])
    return ranks // nodes
