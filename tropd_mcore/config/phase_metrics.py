"""The metrics that can end a phase, with their ranges and what they need.

The metrics themselves are in `monitor.catalogue`, which this module cannot import; a test compares the names. A metric
is here if a repeated step gives the same value and the value says something about the progress of training. Times,
throughput and the counts of a launch are not: a resumed run would end its phase at another step.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass

from tropd_mcore.config.schema import Config
from tropd_mcore.config.teachers import teachers_of

Lack = Callable[[Config, bool], str | None]
"""Returns why the metric has no value in a phase with this configuration; None if it has one. The second argument says
whether this phase or a later one reads the teacher's scores, so that the teacher can be asked."""


@dataclass(frozen=True)
class PhaseMetric:
    """One metric: its smallest and largest possible value, what it needs, and how often it is measured."""

    lowest: float = -math.inf
    highest: float = math.inf
    lack: Lack = lambda config, asked: None
    every: Callable[[Config], int] = lambda config: 1
    """Steps between two values."""


def _student(config: Config, asked: bool) -> str | None:
    if config.objective.samples:
        return None
    return f"is measured on answers of the student, and objective.kind={config.objective.kind} samples none"


def _compared(config: Config, asked: bool) -> str | None:
    if not config.objective.reads_teacher:
        return f"needs scores of the teacher, and objective.kind={config.objective.kind} reads none"
    return _student(config, asked)


def _prefix(config: Config, asked: bool) -> str | None:
    if not config.objective.has_prefix_loss:
        return f"is measured on tokens of the teacher with a loss, and objective.kind={config.objective.kind} has none"
    return None


def _teacher_entropy(config: Config, asked: bool) -> str | None:
    if (served := _served(config)) is not None:
        return f"needs the teacher's whole distribution, which {served}=sglang does not give"
    return _compared(config, asked)


def _served(config: Config) -> str | None:
    """The key of the kind of the first served teacher; None if there is none."""
    return next((f"{teacher.key}.kind" for teacher in teachers_of(config) if teacher.served), None)


def _overlap(config: Config, asked: bool) -> str | None:
    if not config.monitor.topk_overlap:
        return "is not measured with monitor.topk_overlap=false"
    return _compared(config, asked)


def _verdicts(config: Config, asked: bool) -> str | None:
    return "needs a verifier, and verifier.kind=none" if config.verifier.kind == "none" else _student(config, asked)


def _distance(config: Config, asked: bool) -> str | None:
    if not config.monitor.force:
        return "is not measured with monitor.force=false"
    return _compared(config, asked)


def _held_out(config: Config, asked: bool) -> str | None:
    return "is not measured without the section held_out" if config.held_out is None else None


def _held_out_kl(config: Config, asked: bool) -> str | None:
    if config.held_out is not None and (served := _served(config)) is not None and not asked:
        return f"needs scores of the teacher, and with {served}=sglang no phase from here on asks it"
    return _held_out(config, asked)


def _held_out_every(config: Config) -> int:
    return 1 if config.held_out is None else config.held_out.every


PHASE_METRICS: dict[str, PhaseMetric] = {
    "loss/total": PhaseMetric(),
    "loss/objective": PhaseMetric(),
    "loss/prefix": PhaseMetric(lack=_prefix),
    "trust/tv": PhaseMetric(0.0, 1.0, _compared),
    "tv/mean": PhaseMetric(0.0, 1.0, _distance),
    "held_out/forward_kl": PhaseMetric(lowest=0.0, lack=_held_out_kl, every=_held_out_every),
    "held_out/nll": PhaseMetric(lowest=0.0, lack=_held_out, every=_held_out_every),
    "log_ratio/mean": PhaseMetric(lack=_compared),
    "entropy/student": PhaseMetric(lowest=0.0, lack=_student),
    "entropy/teacher": PhaseMetric(lowest=0.0, lack=_teacher_entropy),
    "topk/overlap": PhaseMetric(0.0, 1.0, _overlap, lambda config: config.monitor.topk_overlap_every),
    "verifier/accuracy": PhaseMetric(0.0, 1.0, _verdicts),
    "rollout/length_mean": PhaseMetric(lowest=0.0, lack=_student),
    "rollout/truncated": PhaseMetric(0.0, 1.0, _student),
    "rollout/eos": PhaseMetric(0.0, 1.0, _student),
    "optimizer/grad_norm": PhaseMetric(lowest=0.0),
}
"""Name -> metric."""


def near(name: str) -> str:
    """Return what to write instead of an unknown name."""
    tails = {known.partition("/")[2]: known for known in PHASE_METRICS}
    close = difflib.get_close_matches(name, PHASE_METRICS, n=1, cutoff=0.6)
    close = close or [tails[tail] for tail in difflib.get_close_matches(name.rpartition("/")[2], tails, n=1)]
    return f"did you mean {close[0]}?" if close else f"expected one of {', '.join(PHASE_METRICS)}"
