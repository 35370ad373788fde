"""Findings of `tropd doctor` about the resources and servers that a configuration needs, beyond the checks of a start.

This module does not check files and data (`checks_of_start`). Invariant: an estimated number is marked as an estimate
and says what it counts.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from math import prod
from pathlib import Path

import psutil

from tropd_mcore.cli.findings import Finding
from tropd_mcore.config.derived import (
    is_rollout,
    ranks_per_node,
    rollout_servers,
    started_servers,
    used_router,
    used_servers,
)
from tropd_mcore.config.schema import Config, RouterConfig, ServerConfig
from tropd_mcore.config.server_checks import gpus_of
from tropd_mcore.config.teachers import TeacherSection, any_served, teachers_of
from tropd_mcore.errors import ConfigError, ServerError, TropdError
from tropd_mcore.serving.interpreter import ask, ask_router
from tropd_mcore.train.preflight_machine import one_per_interpreter
from tropd_mcore.train.start_checks import State
from tropd_mcore.weights.architecture import Architecture, layers_of_stages

GIB = 2**30
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
MOMENT_BYTES = 8
"""Bytes per parameter in the optimizer: two float32 moments."""
MAIN_BYTES = 4
"""Bytes per parameter of a float32 main weight (of a bfloat16 student), gradient or average."""
ENTRY_BYTES = 8
"""Bytes of a stored candidate: token id as int32, log-prob as float32."""
LOG_PROB_BYTES = 4
"""Bytes of the stored log-prob of one of the student's candidates."""
ROW_BYTES = 13
"""Bytes of a scored token beside its candidates: log-prob, tail, entropy (4 each) and a mark."""
CROWDED = 0.8
"""Share of the memory above which weights and optimizer leave little for activations."""


def servers(config: Config) -> Iterator[Finding]:
    """Check that servers at a URL answer /health. Tell what the interpreter of a server to start has."""
    first = one_per_interpreter(config)
    for key, server in used_servers(config).items():
        if server.url is not None or key in first:
            yield from _server(key, server)
    if (router := used_router(config)) is not None:
        yield from _router(config, router)


def _router(config: Config, router: RouterConfig) -> Iterator[Finding]:
    """The version of a router to start; the workers of one that runs."""
    from tropd_mcore.serving.router import KEY, Router, RouterSpec, key_of_fleet

    try:
        if router.url is None:
            version = ask_router(router.python, key=KEY)
            yield Finding("ok", KEY, f"{router.python or 'this interpreter'}: smg {version}")
            return
        servers = rollout_servers(config)
        spec = RouterSpec(router, config.rollout.server, config.run.dir, key_of_fleet(router, servers))
        running = Router(spec)
        running.wait_ready()
        running.check([server.url for server in servers.values() if server.url is not None])
    except ServerError as error:
        if router.url is not None:
            yield Finding("FAIL", KEY, str(error))
        return  # the checks of a start report a router that cannot be started
    yield Finding("ok", KEY, f"{router.url} has exactly the servers of rollout.servers")


def _server(key: str, server: ServerConfig) -> Iterator[Finding]:
    if server.url is None:
        if server.python is not None:
            yield from _interpreter(key, server.python)
        return
    from tropd_mcore.serving.client import SglangClient

    try:
        answers = SglangClient(server.url, server, key=key).healthy()
    except TropdError:
        return  # an API key is not set: the checks of a start report it
    if answers:
        yield Finding("ok", key, f"{server.url} answers /health")
    else:
        yield Finding("FAIL", key, f"{key}.url={server.url} does not answer /health; start it, or correct the url")


def _interpreter(key: str, python: Path) -> Iterator[Finding]:
    try:
        yield Finding("ok", key, f"{python}: {ask(python, key=f'{key}.python')}")
    except ServerError:
        return  # the checks of a start report it


def resources(state: State, nodes: int = 1) -> Iterator[Finding]:
    """Check the disk for checkpoints and export, and the memory of this machine, one of `nodes`, for weights, gradients
    and optimizer.

    Yields nothing if the models could not be read.
    """
    if not state.has("models"):
        return
    yield _disk(state.config, parameters(state.student))
    if (scores := score_bytes(state.config)) > 0:
        yield _disk_of_scores(state.config, scores)
    try:
        here = ranks_per_node(state.config.parallel, nodes)
    except ConfigError:
        return  # ranks do not divide over the machines: the checks of a start report it
    yield from _memory(state, here, here * nodes)


def parameters(arch: Architecture) -> int:
    """Return the number of parameters of a model."""
    from tropd_mcore.weights.families import hf_weight_plan

    return sum(prod(shape) for _, shape in hf_weight_plan(arch))


def checkpoint_bytes(config: Config, count: int) -> int:
    """Return the size of a checkpoint of a student of `count` parameters: weights, main weights, moments, average."""
    own = DTYPE_BYTES[config.student.dtype]
    main = MAIN_BYTES if config.student.dtype != "float32" else 0
    average = DTYPE_BYTES[config.teacher.dtype] if config.objective.self_teaching is not None else 0
    return count * (own + main + MOMENT_BYTES + average)


def _disk(config: Config, count: int) -> Finding:
    one = checkpoint_bytes(config, count)
    # The new checkpoint is complete before the oldest is removed, and so is the new export.
    needed = one * (config.run.keep_checkpoints + 1)
    if config.run.export_at_end:
        needed += 2 * count * DTYPE_BYTES[config.student.dtype]
    free = shutil.disk_usage(_existing(config.run.dir)).free
    detail = (
        f"{free / GIB:.1f} GiB free for {config.run.dir}; about {needed / GIB:.2f} GiB for "
        f"{config.run.keep_checkpoints + 1} checkpoints of {count:,} parameters and the export"
    )
    if free >= needed:
        return Finding("ok", "disk", detail)
    return Finding("warn", "disk", f"{detail}; lower run.keep_checkpoints or set run.dir to a place with room")


def score_bytes(config: Config) -> int:
    """Return the largest size of the teacher's scores on disk, if every response has the longest length."""
    run, objective = config.run, config.objective
    if not objective.stores_scores or run.replay is not None:
        return 0
    rows = config.rollout.prompts_per_step * config.rollout.samples_per_prompt * config.rollout.max_new_tokens
    steps = run.steps if run.keep_scores is None else run.keep_scores + 1
    if any_served(config):
        steps = max(steps, run.checkpoint_every + 1)  # all since the last checkpoint
    own = LOG_PROB_BYTES * objective.student_candidates
    return min(steps, run.steps) * rows * (ENTRY_BYTES * objective.teacher_topk + own + ROW_BYTES)


def _disk_of_scores(config: Config, needed: int) -> Finding:
    free = shutil.disk_usage(_existing(config.run.dir)).free
    detail = (
        f"{free / GIB:.1f} GiB free for {config.run.dir}; up to {needed / GIB:.2f} GiB for the teacher's scores of "
        f"the steps that are kept, with {config.objective.teacher_topk} candidates per token"
    )
    if free >= needed:
        return Finding("ok", "disk for scores", detail)
    remedy = "lower run.keep_scores or run.checkpoint_every, or set run.dir to a place with room"
    return Finding("warn", "disk for scores", f"{detail}; {remedy}")


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def rank_bytes(state: State, ranks: int) -> int:
    """Return the estimated bytes per rank of weights, gradients and optimizer, without activations and logits."""
    config, parallel = state.config, state.config.parallel
    shard = parallel.tensor * parallel.pipeline
    replicas = max(ranks // shard, 1)
    student = parameters(state.student)
    own = DTYPE_BYTES[config.student.dtype]
    state_bytes = MOMENT_BYTES + (MAIN_BYTES if config.student.dtype != "float32" else 0)
    state_bytes //= replicas if config.optimizer.distributed else 1
    total = student * (own + MAIN_BYTES + state_bytes)
    if config.objective.self_teaching is not None:
        total += student * DTYPE_BYTES[config.teacher.dtype]
    if "objective.reference" in state.models:
        total += parameters(state.in_job("objective.reference")) * own
    return total // shard + teacher_bytes(state)


def teacher_bytes(state: State, *, offloaded: bool | None = None) -> int:
    """Return the bytes of the teachers in the job, each on the rank that has most of its layers.

    `offloaded` counts only those that are kept in host memory (teacher.offload), or only the others.
    """
    if state.config.objective.self_teaching is not None:
        return 0
    return sum(
        _teacher_bytes(state, teacher)
        for teacher in teachers_of(state.config)
        if not teacher.served and offloaded in (None, teacher.config.offload)
    )


def _teacher_bytes(state: State, section: TeacherSection) -> int:
    parallel, teacher = state.config.parallel, state.in_job(section.path_key)
    stages = section.config.pipeline_layers or layers_of_stages(teacher.num_layers, parallel.pipeline)
    whole = parameters(teacher) * DTYPE_BYTES[section.config.dtype]
    return whole * max(stages) // (teacher.num_layers * parallel.tensor)


def _memory(state: State, here: int, ranks: int) -> Iterator[Finding]:
    """The memory of this machine, which runs `here` of the job's `ranks`."""
    each = rank_bytes(state, ranks)
    what = f"about {each / GIB:.2f} GiB per rank for weights, gradients and optimizer, without activations"
    gpu = gpu_bytes() if state.platform == "cuda" else None
    if gpu is not None:
        room = gpu - _of_server(state, gpu)
        yield _room("GPU memory", what, each, room, "raise parallel.tensor or parallel.pipeline")
        if (hosted := teacher_bytes(state, offloaded=True)) > 0:
            keys = " or ".join(f"{each.key}.offload" for each in teachers_of(state.config) if each.config.offload)
            yield _host_memory(hosted, here, keys)
    elif state.platform == "cpu":
        room = psutil.virtual_memory().available // here
        yield _room("memory", f"{what}, {here} ranks here", each, room, "launch fewer ranks here")


def _of_server(state: State, gpu: int) -> int:
    """The most bytes that rollout servers take of one GPU with `gpu` bytes, as far as their settings say."""
    from tropd_mcore.weights.gpu_memory import server_memory

    taken: dict[int, float] = {0: 0.0}
    for key, server in started_servers(state.config).items():
        if not is_rollout(key) or server.release_memory or server.node:
            continue
        if server.max_total_tokens is not None:
            size: float = sum(server_memory(state.student, server, state.config.student.dtype).values())
        else:
            size = gpu * (server.mem_fraction or 0.0)
        for place in gpus_of(server):
            taken[place] = taken.get(place, 0.0) + size
    return int(max(taken.values()))


def _host_memory(each: int, here: int, keys: str) -> Finding:
    """The host memory for the weights of teachers that are on the GPUs only while they score (`keys`)."""
    room = psutil.virtual_memory().available // here
    what = f"about {each / GIB:.2f} GiB of the teacher's weights per rank, pinned, {here} ranks here"
    return _room("host memory", what, each, room, f"set {keys}=false, or launch fewer ranks here")


def _room(name: str, what: str, needed: int, room: int, remedy: str) -> Finding:
    detail = f"{what}; {room / GIB:.1f} GiB available"
    if needed > room:
        return Finding("FAIL", name, f"{detail}; {remedy}, or choose smaller models")
    if needed > CROWDED * room:
        return Finding("warn", name, f"{detail}, which leaves little for activations; {remedy}")
    return Finding("ok", name, detail)


def gpu_bytes() -> int | None:
    """Return the memory of the smallest GPU that torch sees, in bytes; None if it sees none."""
    import torch

    if not torch.cuda.is_available():
        return None
    count = torch.cuda.device_count()
    return min(int(torch.cuda.get_device_properties(index).total_memory) for index in range(count))
