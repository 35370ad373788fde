"""Problems of the keys of a teacher that runs inside the job (`teacher.kind=megatron`).

Elsewhere: the keys of its server (`checks`), and whether its sizes can be cut as asked (`weights.architecture`).
Invariant: each problem is one line that names the keys to change. Nothing is raised.
"""

from __future__ import annotations

from collections.abc import Iterator

from tropd_mcore.config.schema import Config


def teacher_problems(config: Config) -> Iterator[str]:
    """Yield every problem of the keys that only a teacher inside the job has."""
    teacher, stages = config.teacher, config.parallel.pipeline
    if teacher.pipeline_layers is None:
        return
    if (why := _absent(config)) is not None:
        yield f"teacher.pipeline_layers has no effect: {why}; remove it"
    elif len(teacher.pipeline_layers) != stages:
        yield (
            f"teacher.pipeline_layers = {list(teacher.pipeline_layers)} has {len(teacher.pipeline_layers)} stages, but "
            f"parallel.pipeline = {stages}; give one number per stage"
        )


def _absent(config: Config) -> str | None:
    """Return why the job has no teacher with layers of its own; None if it has one."""
    if config.teacher.kind == "sglang":
        return "teacher.kind=sglang runs the teacher on a server"
    if config.objective.self_teaching is not None:
        return f"objective.kind={config.objective.kind} has the student as its teacher"
    return None
