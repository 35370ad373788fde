"""The charts of the report: which metrics each one shows, and how to read it.

This module does not draw (see `charts`, `curves_view`). Invariant: every line names a metric of `monitor.catalogue` or
a phase.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tropd_mcore.evaluation.axes import ANY, LOGARITHMIC, POSITIVE, SHARE, Scale
from tropd_mcore.evaluation.charts import Dash, Hue


@dataclass(frozen=True)
class Line:
    """A metric as one line of a chart."""

    label: str
    metric: str
    hue: Hue = "plain"
    dash: Dash = "solid"
    complement: bool = False
    """Show 1 - value."""
    only_other: bool = False
    """Leave the line out if it equals the line before it."""


@dataclass(frozen=True)
class Chart:
    """Lines that are drawn together, and how to read them."""

    title: str
    unit: str
    reading: str
    lines: tuple[Line, ...]
    scale: Scale = ANY
    sparse: bool = False
    """Measured at some steps only. The others are left out, so that lines connect the values."""
    stacked: bool = False
    """The lines are the shares of one whole, drawn as areas one above the other."""


def _by_distance(title: str, unit: str, reading: str, metric: str) -> Chart:
    """The shares of the bins of the distance to the teacher."""
    lines = tuple(Line(label, f"{metric}_{part}", hue) for label, part, hue in _BINS)
    return Chart(title, unit, reading, lines, SHARE, stacked=True)


_BINS: tuple[tuple[str, str, Hue], ...] = (
    ("below 0.01", "0_1", "part0"),
    ("0.01 to 0.1", "1_10", "part1"),
    ("0.1 to 0.5", "10_50", "part2"),
    ("0.5 to 0.9", "50_90", "part3"),
    ("0.9 and more", "90_100", "part4"),
)
"""(distance, its bin in the names of metrics, hue)"""

CHARTS = (
    Chart(
        "Loss", "nats per token",
        "Objective: the mean loss of all tokens; read this one. Surrogate: the value that is differentiated. Only its "
        "gradient has a meaning, and it can be negative.",
        (
            Line("objective", "loss/objective"),
            Line("surrogate", "loss/total", "prefix", "dotted"),
        ),
    ),
    Chart(
        "Loss by region", "nats per token",
        "The objective, averaged over the tokens of each region. The regions are defined above.",
        (
            Line("trusted", "loss/trusted", "trusted"),
            Line("outlier", "loss/outlier", "outlier", "dashed"),
            Line("prefix", "loss/prefix", "prefix", "dotted"),
        ),
    ),
    Chart(
        "Trust", "share of student tokens",
        "Trusted: the share that the gate let pass. 1 - TV: the share that it is expected to let pass (bernoulli and "
        "soft gates). Only the noise of the draws is between them; if they stay apart, the random numbers are wrong.",
        (
            Line("trusted", "trust/fraction", "trusted"),
            Line("1 - TV", "trust/tv", "plain", "dashed", complement=True),
        ),
        SHARE,
    ),
    _by_distance(
        "Tokens by distance to the teacher", "share of student tokens",
        "The distance is the total variation (tv) of the two models' next-token distributions. If much is above 0.9, "
        "the student is confident of what the teacher would not write. See docs/choosing.md.",
        "tv/tokens",
    ),
    _by_distance(
        "Force of the loss by distance to the teacher", "share of the summed gradient norms",
        "Which tokens move the student. Compare it with the chart before: distant tokens without force are mistakes "
        "that the objective does not train, and near tokens with much force are mostly noise of the sampling.",
        "force/tv",
    ),
    Chart(
        "Held-out responses of the teacher", "nats per token",
        "How far the student is from the teacher on responses that are not trained on, before the step. KL(teacher || "
        "student) falls towards 0; -log p falls towards the teacher's entropy. If they rise while the loss falls, the "
        "student forgets what the teacher would write.",
        (
            Line("KL(teacher || student)", "held_out/forward_kl", "trusted"),
            Line("-log p of the student", "held_out/nll", "plain", "dashed"),
        ),
        POSITIVE,
        sparse=True,
    ),
    Chart(
        "Mean log-ratio", "nats",
        "The mean of r. Below 0, the student gives its tokens more probability than the teacher does. At 0, the two "
        "agree.",
        (Line("all student tokens", "log_ratio/mean"), Line("trusted", "log_ratio/trusted", "trusted", "dashed")),
    ),
    Chart(
        "Learning rate", "", "The rate of the last optimizer step.",
        (Line("learning rate", "optimizer/learning_rate"),), POSITIVE,
    ),
    Chart(
        "Gradient norm", "before clipping, logarithmic",
        "A short peak is usual. If the norm jumps and stays high, lower optimizer.learning_rate.",
        (
            Line("mean of the updates", "optimizer/grad_norm"),
            Line("largest of the updates", "optimizer/grad_norm_max", "outlier", "dotted", only_other=True),
        ),
        LOGARITHMIC,
    ),
    Chart(
        "Entropy", "nats",
        "How undecided each model is about the next token. The student should approach the teacher. A student that "
        "falls far below has lost variety.",
        (Line("student", "entropy/student", "trusted"), Line("teacher", "entropy/teacher", "plain", "dashed")),
        POSITIVE,
    ),
    Chart(
        "Outlier divergence", "nats",
        "Distance to the teacher at tokens that were not trusted: forward KL over the teacher's top-k.",
        (
            Line("mean", "outlier/fkl_mean", "outlier"),
            Line("95 % quantile", "outlier/fkl_p95", "outlier", "dotted"),
        ),
    ),
    Chart(
        "Teacher prefix", "tokens, mean",
        "How many tokens of the teacher's answer the student is given before it continues. 0: it answers alone.",
        (Line("prefix length", "guidance/prefix_length", "prefix"),), POSITIVE,
    ),
    Chart(
        "Guidance schedule", "alpha", "The share of each stored teacher response that is used as a prefix.",
        (Line("alpha", "guidance/alpha", "prefix", "dashed"),), SHARE,
    ),
    Chart(
        "Right answers of the rollouts", "share of samples",
        "On training prompts, with the teacher's prefix as part of the answer. The task gets harder as the prefix "
        "shrinks, so this can fall while the student improves.",
        (
            Line("right", "verifier/accuracy", "trusted"),
            Line("without an answer", "verifier/unfinished", "outlier", "dotted"),
        ),
        SHARE,
    ),
    Chart(
        "Response length", "tokens",
        "The student's own part. It grows as the teacher's prefix shrinks.",
        (
            Line("mean", "rollout/length_mean"),
            Line("95 % quantile", "rollout/length_p95", "plain", "dotted"),
        ),
        POSITIVE,
    ),
    Chart(
        "Cut responses", "share of samples",
        "Responses that reached the token budget (rollout.max_new_tokens) before they ended.",
        (Line("cut", "rollout/truncated", "outlier"),), SHARE,
    ),
    Chart(
        "Teacher's top-k", "probability, share",
        "How much of each model's probability lies on the teacher's k best tokens, and how many of them are among the "
        "student's k best.",
        (
            Line("teacher mass", "topk/teacher_mass_mean", "plain"),
            Line("student mass", "topk/student_mass_mean", "trusted", "dashed"),
            Line("overlap", "topk/overlap", "prefix", "dotted"),
        ),
        SHARE,
    ),
    Chart(
        "Sampler against trainer", "nats, logarithmic",
        "The sampler and the trainer compute the log-prob of the same token with the same weights. Small differences "
        "are rounding. A large difference means wrong weights.",
        (
            Line("mean", "engine/difference_mean"),
            Line("99 % quantile", "engine/difference_p99", "plain", "dashed"),
            Line("largest", "engine/difference_max", "outlier", "dotted"),
        ),
        LOGARITHMIC,
    ),
    Chart(
        "Ratio to the policy at the step's start", "p / p_old, logarithmic",
        "Over all updates of the step. It is 1 at the first update.",
        (
            Line("mean", "ratio/mean", "trusted"),
            Line("largest", "ratio/max", "outlier", "dotted"),
        ),
        LOGARITHMIC,
    ),
    Chart(
        "Clipped ratios", "share of student tokens",
        "Tokens without a gradient because of PPO's clip. If there are many, make fewer updates per step.",
        (Line("clipped", "ratio/clipped", "outlier"),), SHARE,
    ),
    Chart(
        "Tokens per second", "whole step",
        "Prompt, prefix and response tokens of all samples, divided by the time of the step.",
        (Line("tokens per second", "throughput/tokens_per_second"),), POSITIVE,
    ),
)  # fmt: skip
"""In the order of the page."""

BY_TEACHER = (
    Chart(
        "Tokens by teacher", "share of the tokens with a loss",
        "Each teacher's share of the tokens that are trained on.", (), SHARE,
    ),
    Chart(
        "Loss by teacher", "nats per token",
        "The objective, averaged over each teacher's tokens. Weighted by the shares, they add up to the objective.", (),
    ),
    Chart(
        "Distance by teacher", "nats",
        "An estimate of KL(student || teacher) on the student's tokens of each teacher. If it stays high, the student "
        "does not learn from this teacher.", (),
    ),
)  # fmt: skip
"""Charts with one line per teacher, in a run with several; `TEACHER_METRICS` are their metrics, in this order."""
TEACHER_METRICS = ("share", "loss", "kl")
"""Last parts of the names of metrics, teacher/NAME/<part>."""
_TEACHER_LOOKS: tuple[tuple[Hue, Dash], ...] = tuple(
    (hue, dash) for dash in ("solid", "dashed", "dotted") for hue in ("trusted", "outlier", "prefix", "plain")
)


def charts_by_teacher(metrics: Sequence[str]) -> list[Chart]:
    """Return the charts of each of several teachers whose metrics are among `metrics`; none with one teacher."""
    found = []
    for chart, part in zip(BY_TEACHER, TEACHER_METRICS, strict=True):
        names = [name for name in metrics if re.fullmatch(rf"teacher/[^/]+/{part}", name)]
        looks = itertools.cycle(_TEACHER_LOOKS)
        lines = tuple(Line(name.split("/")[1], name, *look) for name, look in zip(names, looks, strict=False))
        found += [replace(chart, lines=lines)] if lines else []
    return found


PHASES = {
    "rollout": "rollouts",
    "server": "server start",
    "publish": "publication of weights",
    "student": "student before the update",
    "teacher": "teacher scores",
    "forward_backward": "forward and backward",
    "checkpoint": "checkpoint",
    "metrics": "metrics",
}
"""Readable names of phases (`time/<phase>`) whose metric name is not clear by itself."""
PHASE_PREFIX = "time/"
WHOLE_STEP = "time/step"
LEAST_SHARE = 0.01
"""A phase is drawn if it took at least this share of some step. Smaller phases are in the table of all metrics."""


def phase_name(metric: str) -> str:
    """Return the name of a phase on the page."""
    phase = metric.removeprefix(PHASE_PREFIX)
    return PHASES.get(phase, phase.replace("_", " "))
