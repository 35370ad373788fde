"""Problems of the keys of a teacher that runs inside the job (`teacher.kind=megatron`).

Elsewhere: the keys of its server (`checks`), and whether its sizes can be cut as asked (`weights.architecture`).
Invariant: each problem is one line that names the keys to change. Nothing is raised.
"""

from __future__ import annotations

from collections.abc import Iterator

from tropd_mcore.config.schema import Config


def teacher_problems(config: Config) -> Iterator[str]:
    """Yield every problem of the keys that only a teacher inside the job has."""
    layers, stages = config.teacher.pipeline_layers, config.parallel.pipeline
    given = {"teacher.pipeline_layers": layers is not None, "teacher.offload": config.teacher.offload}
    if (why := _absent(config)) is not None:
        yield from (f"{key} has no effect: {why}; remove it" for key, is_given in given.items() if is_given)
        return
    if layers is not None and len(layers) != stages:
        yield (
            f"teacher.pipeline_layers = {list(layers)} has {len(layers)} stages, but parallel.pipeline = {stages}; "
            "give one number per stage"
        )
    if config.teacher.offload:
        yield from _offload(config)


def _absent(config: Config) -> str | None:
    """Return why the job has no teacher with weights of its own; None if it has one."""
    if config.teacher.kind == "sglang":
        return "teacher.kind=sglang runs the teacher on a server"
    if config.objective.self_teaching is not None:
        return f"objective.kind={config.objective.kind} has the student as its teacher, which moves with every step"
    return None


def _offload(config: Config) -> Iterator[str]:
    objective = config.objective
    if not objective.reads_teacher:
        yield f"teacher.offload has no effect: objective.kind={objective.kind} asks no teacher; remove it"
    elif objective.full_vocabulary_divergence is not None:
        yield (
            "teacher.offload cannot be combined with objective.full_vocabulary, whose loss reads the teacher's output "
            "layer while the student trains; remove one of them"
        )
