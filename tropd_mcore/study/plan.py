"""Reads the YAML file of a study and lists its cells.

This module does not run anything. Invariants: an unknown key is an error. All problems are reported together, each with
its place in the file. Every cell has its own name, and its settings are accepted by the configuration's own checks.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tropd_mcore.config.loader import load
from tropd_mcore.config.schema import Config
from tropd_mcore.config.yaml_reader import parse_yaml
from tropd_mcore.errors import ConfigError

NAME = re.compile(r"[a-z0-9]+(?:[_.-][a-z0-9]+)*")
"""What a pair, an objective, a variant and a study may be called: these words become names of files."""
BEFORE = "before"
"""Name, in place of an objective's, of the cell that evaluates a student as it was made."""

Values = dict[str, Any]
"""Dotted key of the configuration -> value. In a text, `{seed}` is the cell's seed and `{folder}` the pair's folder."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Evaluation(_Strict):
    """How every student is evaluated."""

    prompts: str
    """JSONL file of held-out prompts with answers; `{seed}` and `{folder}` are replaced"""
    samples: int = Field(4, ge=0)
    """Sampled answers per prompt in addition to the greedy one"""


class Pair(_Strict):
    """A student and its teacher."""

    label: str
    """Its name on the page"""
    folder: str = ""
    """What `{folder}` stands for in other texts, such as the folder of its models; `{seed}` is replaced"""
    settings: Values
    prepare: list[str] = []
    """Commands that make what the settings name; each does nothing if it is there. `{overrides}` is replaced by the
    pair's settings as key=value"""


class Objective(_Strict):
    """What a student is trained with."""

    label: str
    """Its name on the page"""
    settings: Values
    by_pair: dict[str, Values] = {}
    """Settings of one pair alone, such as a learning rate; they come last"""


class Group(_Strict):
    """Cells: every pair with every objective, every variant and every seed."""

    label: str
    """Its heading on the page"""
    note: str = ""
    """What a reader must know of this group, such as that it has one seed"""
    pairs: list[str]
    objectives: list[str]
    seeds: list[int] = Field(min_length=1)
    settings: Values = {}
    variants: dict[str, Values] = {}
    """Name -> settings, after those of the objective. Without variants there is one run per seed"""


class Plan(_Strict):
    """The file of a study."""

    name: str
    title: str
    config: str
    """Recipe that every run begins with"""
    runs: str
    """Folder of the run directories; it may be removed when the results are there"""
    results: str
    """Folder of the result files, one per run"""
    page: str
    """Page that is written from the results"""
    images: str
    """Folder of the page's pictures"""
    reference: str
    """Objective that the others are compared with, seed by seed"""
    evaluation: Evaluation
    settings: Values = {}
    """Of every run; those of pair, objective and group come after them"""
    pairs: dict[str, Pair]
    objectives: dict[str, Objective]
    groups: dict[str, Group]


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    name: str
    group: str
    pair: str
    objective: str
    """`before`: the student as it was made, which is evaluated and not trained"""
    variant: str
    """"" if the group has none"""
    seed: int
    config: str
    overrides: tuple[str, ...]
    """key=value, without the server's address"""
    prepare: tuple[tuple[str, ...], ...]
    prompts: str
    samples: int
    run_dir: str

    @property
    def is_trained(self) -> bool:
        return self.objective != BEFORE

    def load(self) -> Config:
        """Return the configuration of this cell. Raises ConfigError."""
        return load(self.config, list(self.overrides), tell=False)[0]  # the same lines for every cell


@dataclass(frozen=True)
class Study:
    """A plan and its cells, in the order in which they run."""

    plan: Plan
    path: Path
    cells: tuple[Cell, ...]

    def result(self, cell: Cell) -> Path:
        """Return the file of a cell's result."""
        return Path(self.plan.results) / f"{cell.name}.json"


def read_study(path: Path) -> Study:
    """Read the file of a study. Raises ConfigError with all problems of the file and of its cells' settings.

    Files that the settings name are not looked at: a pair's `prepare` may make them later.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError([f"{path}: cannot read the study: {reason}"]) from error
    document = parse_yaml(text, str(path))
    try:
        plan = Plan.model_validate(document.value)
    except ValidationError as error:
        raise ConfigError([*document.problems, *_explained(error, path, document.lines)]) from None
    problems = [*document.problems, *(f"{path}: {problem}" for problem in _problems(plan))]
    if problems:
        raise ConfigError(problems)
    cells = tuple(_cells(plan))
    problems = list(_wrong_cells(cells))
    if problems:
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    return Study(plan, path, cells)


def _explained(error: ValidationError, path: Path, lines: dict[str, int]) -> Iterator[str]:
    for detail in error.errors(include_url=False):
        key = ".".join(str(part) for part in detail["loc"])
        parents = [key.rsplit(".", cut)[0] for cut in range(key.count(".") + 1)]
        line = next((f":{lines[each]}" for each in parents if each in lines), "")
        found = f", found {detail['input']!r}" if detail["type"] not in ("missing", "extra_forbidden") else ""
        yield f"{path}{line}: {key or 'the file'}: {detail['msg'].lower()}{found}"


def _problems(plan: Plan) -> Iterator[str]:
    """Yield what is wrong between the parts of a plan."""
    named: list[tuple[str, list[str]]] = [
        ("pairs", list(plan.pairs)),
        ("objectives", list(plan.objectives)),
        ("groups", list(plan.groups)),
        *((f"groups.{name}.variants", list(group.variants)) for name, group in plan.groups.items()),
    ]
    for section, names in named:
        for name in names:
            if not NAME.fullmatch(name) or name == BEFORE:
                yield (
                    f"{section}: {name!r} is no name for a file; expected small letters and digits, joined by - _ or . "
                    f"(and not {BEFORE!r})"
                )
    for name, objective in plan.objectives.items():
        for pair in objective.by_pair.keys() - plan.pairs.keys():
            yield f"objectives.{name}.by_pair: no pair {pair!r}; expected one of {', '.join(plan.pairs)}"
    for name, group in plan.groups.items():
        asked_of = (("pairs", group.pairs, list(plan.pairs)), ("objectives", group.objectives, list(plan.objectives)))
        for key, asked, known in asked_of:
            for each in asked:
                if each not in known:
                    yield f"groups.{name}.{key}: {each!r} is not defined; expected some of {', '.join(known)}"
        if len(set(group.seeds)) < len(group.seeds):
            yield f"groups.{name}.seeds: {group.seeds} has a seed twice"
    if plan.reference not in plan.objectives:
        yield f"reference: no objective {plan.reference!r}; expected one of {', '.join(plan.objectives)}"


def _cells(plan: Plan) -> Iterator[Cell]:
    """Yield the cells: for each pair and seed of a group first the student as it is, then its objectives."""
    seen: set[str] = set()
    for group_name, group in plan.groups.items():
        for seed in group.seeds:
            for pair in group.pairs:
                for objective in (BEFORE, *group.objectives):
                    for variant in ("",) if objective == BEFORE else group.variants or ("",):
                        cell = _cell(plan, group_name, pair, objective, variant, seed)
                        if objective != BEFORE or cell.name not in seen:
                            yield cell
                        seen.add(cell.name)


def _cell(plan: Plan, group_name: str, pair: str, objective: str, variant: str, seed: int) -> Cell:
    group, two = plan.groups[group_name], plan.pairs[pair]
    name = "-".join(filter(None, (pair, objective, variant, f"seed{seed}")))
    run_dir = f"{plan.runs}/{name}"
    chosen = plan.objectives.get(objective)
    values = {
        **plan.settings,
        **two.settings,
        **(chosen.settings if chosen else {}),
        **(group.settings if chosen else {}),
        **(chosen.by_pair.get(pair, {}) if chosen else {}),
        **group.variants.get(variant, {}),
        "run.dir": run_dir,
    }
    words = {"{folder}": two.folder, "{seed}": str(seed)}  # in this order: a folder may have the seed in its name
    overrides = tuple(override(key, value, words) for key, value in values.items())
    prepared = {**plan.settings, **two.settings, "run.dir": f"{plan.runs}/prepare"}
    of_pair = tuple(override(key, value, words) for key, value in prepared.items())
    return Cell(
        name=name,
        group=group_name,
        pair=pair,
        objective=objective,
        variant=variant,
        seed=seed,
        config=plan.config,
        overrides=overrides,
        prepare=tuple(_command(line, words, of_pair) for line in two.prepare),
        prompts=_filled(plan.evaluation.prompts, words),
        samples=plan.evaluation.samples,
        run_dir=run_dir,
    )


def _command(line: str, words: Mapping[str, str], overrides: tuple[str, ...]) -> tuple[str, ...]:
    parts = shlex.split(_filled(line, words))
    return tuple(each for part in parts for each in (overrides if part == "{overrides}" else (part,)))


def _filled(text: str, words: Mapping[str, str]) -> str:
    for name, value in words.items():
        text = text.replace(name, value)
    return text


def override(key: str, value: Any, words: Mapping[str, str]) -> str:
    """Write a value as YAML on one line: what `tropd train` reads back as the same value."""
    return f"{key}={_as_yaml(value, words)}"


def _as_yaml(value: Any, words: Mapping[str, str]) -> str:
    if isinstance(value, str):
        return _filled(value, words)
    if isinstance(value, bool) or value is None:
        return "null" if value is None else str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_as_yaml(each, words)}" for name, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_as_yaml(each, words) for each in value) + "]"
    return str(value)


def _wrong_cells(cells: tuple[Cell, ...]) -> Iterator[str]:
    """Yield the problems of the cells' settings, each once, and the names that two cells share."""
    told: set[str] = set()
    names: dict[str, Cell] = {}
    for cell in cells:
        if cell.name in names and names[cell.name].overrides != cell.overrides:
            yield f"two cells are called {cell.name}: in the groups {names[cell.name].group} and {cell.group}"
        names[cell.name] = cell
        try:
            cell.load()
        except ConfigError as error:
            for problem in error.problems:
                if problem not in told:
                    yield f"{cell.name}: {problem}"
                told.add(problem)
