"""The teachers of a run: the section `teacher`, or each entry of `teachers`.

Checks of them are in `teacher_checks`. Invariants: pure functions of the configuration. A teacher's section has all of
its keys. With `teachers`, the section `teacher` itself is no teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tropd_mcore.config.fields import Dtype
from tropd_mcore.config.schema import Config, ServerConfig, TeacherConfig

DEFAULT = "default"
"""Name of the teacher of prompts that name none."""


@dataclass(frozen=True)
class TeacherSection:
    """One teacher and the place of its keys."""

    name: str | None
    """Name in `teachers`; None for the only teacher of a run without `teachers`"""
    key: str
    """Its section: `teacher`, or `teachers.<name>`"""
    config: TeacherConfig

    @property
    def path(self) -> Path:
        return self.config.path

    @property
    def path_key(self) -> str:
        """Configuration key of its folder."""
        return f"{self.key}.path"

    @property
    def served(self) -> bool:
        """Whether only servers load it, so that Megatron need not be able to build it."""
        return self.config.kind == "sglang"

    @property
    def computes_in(self) -> Dtype:
        """The dtype in which it computes, in the job or on a server."""
        served = self.config.server.dtype if self.served else None
        return served or self.config.dtype

    @property
    def servers(self) -> dict[str, ServerConfig]:
        """{section: settings} of its servers: `server`, or each entry of `servers`. Only a served teacher uses them."""
        if not self.config.servers:
            return {f"{self.key}.server": self.config.server}
        return {f"{self.key}.servers.{place}": server for place, server in enumerate(self.config.servers)}

    @property
    def label(self) -> str:
        """The teacher in the names of files and in messages: `teacher`, or `teacher-<name>`."""
        return "teacher" if self.name is None else f"teacher-{self.name}"


def teachers_of(config: Config) -> tuple[TeacherSection, ...]:
    """Return the teachers of the run, one or several."""
    if not config.teachers:
        return (TeacherSection(None, "teacher", config.teacher),)
    return tuple(TeacherSection(name, f"teachers.{name}", teacher) for name, teacher in config.teachers.items())


def names_of(config: Config) -> tuple[str, ...]:
    """Return the names that a prompt may give as its teacher; none if the run has one teacher."""
    return tuple(config.teachers)


def teacher_of(config: Config, name: str | None) -> TeacherSection:
    """Return the teacher of prompts with this `teacher`; None is that of a run with one teacher."""
    return next(teacher for teacher in teachers_of(config) if teacher.name == name)


def the_teacher(config: Config) -> TeacherSection:
    """Return the one teacher of `config`, which is that of a run with one teacher or made by `alone`."""
    (teacher,) = teachers_of(config)
    return teacher


def alone(config: Config, name: str | None) -> Config:
    """Return the configuration in which the teacher with this name is the only one, under its own keys."""
    return config if name is None else config.model_copy(update={"teachers": {name: config.teachers[name]}})


def by_path_key(config: Config) -> Mapping[str, TeacherSection]:
    """Return {configuration key of its folder: teacher}."""
    return {teacher.path_key: teacher for teacher in teachers_of(config)}


def folders_of(config: Config) -> Path | dict[str, Path]:
    """Return the folder of the teacher, or those of several by name."""
    return {name: teacher.path for name, teacher in config.teachers.items()} or config.teacher.path


def stage_layers(config: Config, key: str) -> tuple[int, ...] | None:
    """Return the given number of layers per stage of the model with this key of its folder; None = as even as
    possible."""
    teacher = by_path_key(config).get(key)
    return teacher.config.pipeline_layers if teacher is not None else None


def any_served(config: Config) -> bool:
    """Return whether a server scores for at least one teacher."""
    return any(teacher.served for teacher in teachers_of(config))
