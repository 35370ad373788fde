"""The metrics of each teacher in a run with several: their names, meaning, and how they are computed.

The metrics of every run are in `catalogue`, whose definitions and symbols hold here too. Invariant: a run with one
teacher has none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tropd_mcore.monitor.record import Described, StepRecord

SUPERVISED = "student tokens and teacher-prefix tokens with a loss"


@dataclass(frozen=True)
class TeacherMetric(Described):
    """One number per step and teacher, in a run with several. `name` has NAME in place of the teacher's name."""

    compute: Callable[[StepRecord, str], float]


def of_teacher(metric: str, name: str) -> str:
    """Return the name of a teacher's metric."""
    return metric.replace("NAME", name)


def teacher_metrics(record: StepRecord) -> dict[str, float]:
    """Return {name: value} of the metrics of each teacher of the run; NaN where undefined."""
    return {
        of_teacher(metric.name, name): metric.compute(record, name)
        for name in record.teachers
        for metric in TEACHER_METRICS
    }


def _teacher_share(record: StepRecord, name: str) -> float:
    regions = (record.student, record.prefix)
    total = sum(rows.size for rows in regions)
    return sum(record.of_teacher(rows, name).size for rows in regions) / total if total else float("nan")


def _teacher_loss(record: StepRecord, name: str) -> float:
    parts = [record.of_teacher(rows, name) for rows in (record.student, record.prefix)]
    rows = sum(part.size for part in parts)
    return float(sum(part["loss"].sum() for part in parts) / rows) if rows else float("nan")


def _teacher_kl(record: StepRecord, name: str) -> float:
    rows = record.of_teacher(record.student, name)
    return rows.mean(-rows["log_ratio"])


# fmt: off
TEACHER_METRICS: tuple[TeacherMetric, ...] = (
    TeacherMetric("teacher/NAME/share", "1", SUPERVISED, "share of the tokens whose teacher is NAME",
                  _teacher_share),
    TeacherMetric("teacher/NAME/loss", "nats", f"{SUPERVISED}, of NAME",
                  "mean value of the objective; weighted by the shares, the losses add up to loss/objective",
                  _teacher_loss),
    TeacherMetric("teacher/NAME/kl", "nats", "student tokens of NAME",
                  "mean -r, an estimate of the reverse KL, KL(p || q), q being this teacher", _teacher_kl),
)
"""For each teacher of `teachers`; none in a run with one teacher."""
# fmt: on
