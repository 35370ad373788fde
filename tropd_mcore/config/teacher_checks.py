"""Problems of the keys of teachers: of one that runs inside the job (`kind=megatron`), and of several.

Elsewhere: the keys of its server (`checks`), and whether its sizes can be cut as asked (`weights.architecture`).
Invariant: each problem is one line that names the keys to change. Nothing is raised.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from tropd_mcore.config.schema import Config
from tropd_mcore.config.teachers import TeacherSection, teachers_of

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
"""Names become parts of dotted keys, of metrics and of files. A number would be a place in a list."""


def teacher_problems(config: Config) -> Iterator[str]:
    """Yield every problem of the keys that only a teacher inside the job has."""
    for teacher in teachers_of(config):
        yield from _problems(config, teacher)


def names_problems(config: Config) -> Iterator[str]:
    """Yield every problem of the names in `teachers`."""
    first: dict[str, str] = {}
    for name in config.teachers:
        if not NAME.fullmatch(name):
            yield (
                f"teachers: expected names of letters, digits, - and _ that begin with a letter, found {name!r}; give "
                "this teacher another name"
            )
        other = first.setdefault(name.lower(), name)
        if other != name:
            yield f"teachers: {other!r} and {name!r} differ in case only; give one of them another name"


def several_problems(config: Config) -> Iterator[str]:
    """Yield what an objective cannot do with the section `teachers`."""
    if not config.teachers:
        return
    objective = config.objective
    if objective.self_teaching is not None:
        yield (
            f"teachers: objective.kind={objective.kind} has the student as its only teacher; remove the section, or "
            "choose another objective"
        )
    if objective.full_vocabulary_divergence is not None:
        yield (
            "teachers: objective.full_vocabulary multiplies hidden states of the teacher by its output layer inside "
            "the loss of a micro-batch, whose samples would have several teachers; set objective.full_vocabulary="
            "false, or train with one teacher"
        )


def _problems(config: Config, teacher: TeacherSection) -> Iterator[str]:
    key, section, stages = teacher.key, teacher.config, config.parallel.pipeline
    layers = section.pipeline_layers
    given = {f"{key}.pipeline_layers": layers is not None, f"{key}.offload": section.offload}
    if (why := _absent(config, teacher)) is not None:
        yield from (f"{name} has no effect: {why}; remove it" for name, is_given in given.items() if is_given)
        return
    if layers is not None and len(layers) != stages:
        yield (
            f"{key}.pipeline_layers = {list(layers)} has {len(layers)} stages, but parallel.pipeline = {stages}; "
            "give one number per stage"
        )
    if section.offload:
        yield from _offload(config, teacher)


def _absent(config: Config, teacher: TeacherSection) -> str | None:
    """Return why the job has no teacher with weights of its own; None if it has one."""
    if teacher.served:
        return f"{teacher.key}.kind=sglang runs the teacher on a server"
    if config.objective.self_teaching is not None:
        return f"objective.kind={config.objective.kind} has the student as its teacher, which moves with every step"
    return None


def _offload(config: Config, teacher: TeacherSection) -> Iterator[str]:
    objective, key = config.objective, teacher.key
    if not objective.reads_teacher:
        yield f"{key}.offload has no effect: objective.kind={objective.kind} asks no teacher; remove it"
    elif any(part.full_vocabulary_divergence is not None for part in objective.parts):
        yield (
            f"{key}.offload cannot be combined with objective.full_vocabulary, whose loss reads the teacher's output "
            "layer while the student trains; remove one of them"
        )
