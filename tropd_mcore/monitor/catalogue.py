"""Every metric of a step, declared once: name, unit, what it is taken over, meaning, and how it is computed.

This module does not write metrics (see `monitor`). Invariants: a metric that has nothing to measure is NaN, never 0. No
metric depends on the layout, the packing or the micro-batch split, because the token table does not.

Throughout, p is the student, q the teacher, and r = log q(x) - log p(x) in nats: positive if the teacher gives the
token more probability. FKL is the top-k forward KL. p_old is the student before the first update of the step. If a step
has several updates, a metric over tokens counts each token once, as the first epoch saw it, unless it is taken over all
updates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tropd_mcore.monitor.distance import BINS
from tropd_mcore.monitor.record import Described, Region, StepRecord, Values
from tropd_mcore.monitor.teacher_metrics import TEACHER_METRICS, teacher_metrics
from tropd_mcore.objectives.parts.mismatch import mismatch_weight

Compute = Callable[[StepRecord], float]

STUDENT = "student tokens"
TRUSTED = "trusted student tokens"
OUTLIER = "distrusted student tokens"
PREFIX = "teacher-prefix tokens with a loss"
UPDATED = "student tokens of all updates"
SAMPLES = "samples"
HELD_OUT = "tokens of held-out teacher responses"
STEP = "the step"

EXTREME_LOG_RATIO = -10.0
"""r, in nats, below which a special token suggests that chat templates or end tokens differ."""


@dataclass(frozen=True)
class Metric(Described):
    """One number per step."""

    compute: Compute


PHASES = {
    "step": "the whole step, from the previous line to this one: all phases below and the time between them",
    "server": "waiting until the rollout server is ready, at the first step and after a restart",
    "publish": "sending the student's weights to the rollout server and checking that they arrived",
    "rollout": "sampling the responses, or reading stored ones",
    "pack": "packing samples into micro-batches",
    "verifier": "checking the answers",
    "teacher": "scoring by the teacher, in this process or on its server",
    "student": "the student's log-probs before the first update, if the objective needs them",
    "context": "the numbers that the objective takes from the whole batch",
    "held_out": "measuring the distance to the teacher on held-out responses",
    "forward_backward": "forward and backward passes",
    "gates": "comparing the log-probs of sampler and trainer",
    "optimizer": "optimizer steps",
    "metrics": "gathering the tokens of all ranks; computing and writing the previous step's line and its tokens",
    "checkpoint": "the checkpoint after the previous step, whose line had been written already",
}
"""Phase -> what its seconds, `time/<phase>`, are spent on. A line omits phases that took less than 1 ms."""


def compute_metrics(record: StepRecord) -> dict[str, float]:
    """Return {name: value} of every metric, of those of each of several teachers, and of every timing (`time/<phase>`,
    seconds); NaN where undefined."""
    values = {metric.name: metric.compute(record) for metric in METRICS}
    values |= teacher_metrics(record)
    return values | {f"time/{phase}": float(seconds) for phase, seconds in record.timings.items()}


def _mean(region: str, column: str) -> Compute:
    def compute(record: StepRecord) -> float:
        rows: Region = getattr(record, region)
        return rows.mean(rows[column])

    return compute


def _abs_mean(region: str, column: str) -> Compute:
    def compute(record: StepRecord) -> float:
        rows: Region = getattr(record, region)
        return rows.mean(np.abs(rows[column]))

    return compute


def _quantile(region: str, column: str, fraction: float) -> Compute:
    def compute(record: StepRecord) -> float:
        rows: Region = getattr(record, region)
        return rows.quantile(rows[column], fraction)

    return compute


def _below(region: str, column: str, limit: float) -> Compute:
    def compute(record: StepRecord) -> float:
        rows: Region = getattr(record, region)
        values = rows[column]
        return rows.mean(np.where(np.isnan(values), np.nan, values < limit))

    return compute


def _size(region: str) -> Compute:
    return lambda record: float(getattr(record, region).size)


def _over_samples(values: Callable[[StepRecord], Sequence[float]], fraction: float | None = None) -> Compute:
    """Mean (or quantile) over samples; NaN without samples."""

    def compute(record: StepRecord) -> float:
        samples = np.array(values(record), dtype=np.float64)
        if not len(samples):
            return float("nan")
        return float(samples.mean() if fraction is None else np.quantile(samples, fraction))

    return compute


def _response_lengths(record: StepRecord) -> list[float]:
    return [float(len(rollout.response_ids)) for rollout in record.rollouts]


def _prefix_lengths(record: StepRecord) -> list[float]:
    return [float(len(rollout.prefix_ids)) for rollout in record.rollouts]


def _finished(reason: str) -> Callable[[StepRecord], list[float]]:
    return lambda record: [float(rollout.finish_reason == reason) for rollout in record.rollouts]


def _tv(record: StepRecord) -> float:
    student = record.student
    return student.mean(1.0 - np.exp(np.minimum(student["log_ratio"], 0.0)))


def _ratio(values: Callable[[Region], float]) -> Compute:
    """A metric of the ratio p / p_old; NaN if the ratio is always 1, with one update and no ratio in the loss."""

    def compute(record: StepRecord) -> float:
        if len(record.updates) == 1 and record.policy_gradient.ratio == "none":
            return float("nan")
        return values(record.updated)

    return compute


def _loss_total(record: StepRecord) -> float:
    count = sum(update.token_count for update in record.updates)
    return sum(update.loss * update.token_count for update in record.updates) / count if count else 0.0


def _over_updates(values: Callable[[Sequence[float]], float], name: str) -> Compute:
    """A metric over the optimizer steps that were made or, if there was none, over the reports that stand for them."""
    return lambda record: float(values([getattr(update, name) for update in record.made or record.updates]))


def _mean_of(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _last_of(values: Sequence[float]) -> float:
    return values[-1]


def _masked_samples(record: StepRecord) -> float:
    columns = record.table.columns
    if not columns:
        return 0.0
    scored = columns["on"].astype(bool) | columns["off"].astype(bool)
    samples = columns["sample_index"]
    return float(len(np.unique(samples)) - len(np.unique(samples[scored])))


def _impossible_tokens(record: StepRecord) -> float:
    return float(sum(np.nansum(part["impossible"]) for part in (record.student, record.prefix)))


def _excluded_candidates(record: StepRecord) -> float:
    counts = np.concatenate([part["excluded"] for part in (record.student, record.prefix)])
    return float(np.nansum(counts)) if not np.isnan(counts).all() else float("nan")


def _engine_log_ratio(record: StepRecord) -> Values:
    return record.student["old_logp"] - record.student["rollout_logp"]


def _engine_kl(record: StepRecord) -> float:
    return record.student.mean(-_engine_log_ratio(record))


def _engine_difference(fraction: float | None) -> Compute:
    def compute(record: StepRecord) -> float:
        difference = np.abs(_engine_log_ratio(record))
        return record.student.mean(difference) if fraction is None else record.student.quantile(difference, fraction)

    return compute


def _engine_above(record: StepRecord) -> float:
    if record.sampler_gate is None:
        return float("nan")
    above = np.abs(_engine_log_ratio(record)) > record.sampler_gate.p99_bound
    return record.student.mean(above.astype(np.float64))


def _sampler_gate(name: str) -> Compute:
    return lambda record: float("nan" if record.sampler_gate is None else getattr(record.sampler_gate, name))


def _engine_ratio(fraction: float | None) -> Compute:
    def compute(record: StepRecord) -> float:
        ratio = np.exp(np.minimum(_engine_log_ratio(record), 700.0))  # the largest exponent float64 can hold
        return record.student.mean(ratio) if fraction is None else record.student.quantile(ratio, fraction)

    return compute


def _corrected(record: StepRecord) -> float:
    """Fraction of student tokens whose weight the correction of `objective.policy_gradient.mismatch` changed."""
    settings = record.policy_gradient
    if settings.mismatch == "off":
        return float("nan")
    bounds = settings.model_dump(include={"tis_cap", "icepop_low", "icepop_high", "mask_below"})
    columns = [torch.from_numpy(record.student[name]) for name in ("old_logp", "rollout_logp")]
    weight = mismatch_weight(*columns, mode=settings.mismatch, **bounds)
    plain = torch.ones_like(weight)
    if settings.mismatch != "mask":
        plain = mismatch_weight(*columns, mode="tis", **(bounds | {"tis_cap": float("inf")}))
    return record.student.mean((weight != plain).double().numpy())


def _objective(record: StepRecord) -> float:
    rows = record.student.size + record.prefix.size
    total = record.student["loss"].sum() + record.prefix["loss"].sum()
    return float(total / rows) if rows else float("nan")


def _total_tokens(record: StepRecord) -> float:
    return float(sum(len(rollout.token_ids) for rollout in record.rollouts))


def _tokens_per_second(record: StepRecord) -> float:
    seconds = record.timings.get("step", 0.0) - record.timings.get("held_out", 0.0)
    return _total_tokens(record) / seconds if seconds > 0 else float("nan")


def _accuracy(record: StepRecord) -> float:
    return float("nan") if record.accuracy is None else float(record.accuracy)


def _held_out(name: str) -> Compute:
    return lambda record: float("nan" if record.held_out is None else getattr(record.held_out, name))


def _unfinished(record: StepRecord) -> float:
    return float("nan") if record.unfinished is None else float(record.unfinished)


# fmt: off
METRICS: tuple[Metric, ...] = (
    Metric("loss/total", "nats", STEP, "the loss that is differentiated: weighted surrogate / token count",
           _loss_total),
    Metric("loss/objective", "nats", f"{STUDENT} and {PREFIX}",
           "mean value of the objective itself, not of the surrogate", _objective),
    Metric("loss/trusted", "nats", TRUSTED, "mean objective: the reverse-KL estimate -r", _mean("trusted", "loss")),
    Metric("loss/outlier", "nats", OUTLIER, "mean objective of the outlier term", _mean("outlier", "loss")),
    Metric("loss/prefix", "nats", PREFIX, "mean objective of the prefix loss, beta times r", _mean("prefix", "loss")),
    Metric("trust/fraction", "1", STUDENT, "mean trust weight; expected to equal 1 - trust/tv",
           _mean("student", "trusted")),
    Metric("trust/tv", "1", STUDENT, "mean of 1 - min(q/p, 1), an estimate of the total variation distance", _tv),
    Metric("tv/mean", "1", STUDENT, "mean total variation distance of p and q on the teacher's top-k and the rest, a "
           "lower bound", _mean("student", "tv")),
    *(Metric(f"tv/tokens_{part.name}", "1", STUDENT, f"share of tokens with a distance tv {part.words}",
             part.share_of_tokens) for part in BINS),
    *(Metric(f"force/tv_{part.name}", "1", STUDENT,
             f"share of the loss's force that tokens with a distance tv {part.words} have", part.share_of_force)
      for part in BINS),
    Metric("log_ratio/mean", "nats", STUDENT, "mean r; an estimate of minus the reverse KL, -KL(p || q)",
           _mean("student", "log_ratio")),
    Metric("log_ratio/trusted", "nats", TRUSTED, "mean r", _mean("trusted", "log_ratio")),
    Metric("log_ratio/outlier", "nats", OUTLIER, "mean r", _mean("outlier", "log_ratio")),
    Metric("log_ratio/prefix", "nats", PREFIX, "mean r; an estimate of the forward KL, KL(q || p)",
           _mean("prefix", "log_ratio")),
    Metric("log_ratio/min", "nats", STUDENT, "smallest r", _quantile("student", "log_ratio", 0.0)),
    Metric("log_ratio/special_extreme", "1", "student tokens that are special tokens",
           "fraction with r < -10; such tokens suggest that chat templates or end tokens differ",
           _below("special", "log_ratio", EXTREME_LOG_RATIO)),
    Metric("outlier/fkl_mean", "nats", OUTLIER, "mean top-k forward KL", _mean("outlier", "divergence")),
    Metric("outlier/fkl_p95", "nats", OUTLIER, "95th percentile of the top-k forward KL",
           _quantile("outlier", "divergence", 0.95)),
    Metric("outlier/fkl_max", "nats", OUTLIER, "largest top-k forward KL", _quantile("outlier", "divergence", 1.0)),
    Metric("outlier/fkl_negative", "1", OUTLIER, "fraction whose (truncated) top-k forward KL is negative",
           _below("outlier", "divergence", 0.0)),
    Metric("topk/teacher_mass_mean", "1", STUDENT, "mean total probability that the teacher gives its top-k",
           _mean("student", "teacher_mass")),
    Metric("topk/teacher_mass_min", "1", STUDENT, "lowest total probability that the teacher gives its top-k",
           _quantile("student", "teacher_mass", 0.0)),
    Metric("topk/student_mass_mean", "1", STUDENT, "mean total probability that the student gives the teacher's top-k",
           _mean("student", "student_mass")),
    Metric("topk/student_mass_min", "1", STUDENT, "lowest total probability that the student gives the teacher's top-k",
           _quantile("student", "student_mass", 0.0)),
    Metric("topk/clipped_entries", "entries", STUDENT, "mean number of entries clipped by entry_clip (opsd)",
           _mean("student", "clipped_entries")),
    Metric("topk/overlap", "1", STUDENT, "mean share of the teacher's top-k that is in the student's top-k, every "
           "monitor.topk_overlap_every steps",
           _mean("student", "topk_overlap")),
    Metric("advantage/trusted", "nats", TRUSTED, "mean |advantage|", _abs_mean("trusted", "advantage")),
    Metric("advantage/outlier", "nats", OUTLIER, "mean |advantage|", _abs_mean("outlier", "advantage")),
    Metric("advantage/prefix", "nats", PREFIX, "mean |advantage|", _abs_mean("prefix", "advantage")),
    Metric("ratio/mean", "1", UPDATED, "mean p / p_old, with p_old the student before the first update of the step",
           _ratio(lambda rows: rows.mean(rows["ratio"]))),
    Metric("ratio/max", "1", UPDATED, "largest p / p_old", _ratio(lambda rows: rows.quantile(rows["ratio"], 1.0))),
    Metric("ratio/clipped", "1", UPDATED, "fraction whose gradient is 0 because of PPO's clip",
           _ratio(lambda rows: rows.mean(rows["clipped"]))),
    Metric("ratio/difference_mean", "nats", UPDATED, "mean |log p - log p_old|",
           _ratio(lambda rows: rows.mean(np.abs(rows["student_logp"] - rows["old_logp"])))),
    Metric("entropy/student", "nats", STUDENT, "mean entropy of p over the full vocabulary",
           _mean("student", "student_entropy")),
    Metric("entropy/teacher", "nats", STUDENT, "mean entropy of q over the full vocabulary",
           _mean("student", "teacher_entropy")),
    Metric("tokens/student", "tokens", STEP, "student tokens with a loss", _size("student")),
    Metric("tokens/trusted", "tokens", STEP, "sum of trust weights", _size("trusted")),
    Metric("tokens/outlier", "tokens", STEP, "sum of distrust weights", _size("outlier")),
    Metric("tokens/prefix", "tokens", STEP, "teacher-prefix tokens with a loss", _size("prefix")),
    Metric("tokens/total", "tokens", STEP, "prompt, prefix and response tokens of all samples", _total_tokens),
    Metric("teacher/masked_samples", "samples", STEP,
           "samples that the teacher could not score; for a self-teacher, samples without a solution", _masked_samples),
    Metric("teacher/impossible_tokens", "tokens", f"{STUDENT} and {PREFIX}",
           "tokens whose teacher probability is 0 (log q = -inf); they count with log q = -50",
           _impossible_tokens),
    Metric("teacher/excluded_candidates", "candidates", f"{STUDENT} and {PREFIX}",
           "teacher candidates that only its tokenizer has, left out by teacher.extra_tokens=exclude",
           _excluded_candidates),
    Metric("guidance/alpha", "1", STEP, "fraction of a teacher response that is used as prefix, by the schedule",
           lambda record: record.alpha),
    Metric("guidance/prefix_length", "tokens", SAMPLES, "mean length of the teacher prefix",
           _over_samples(_prefix_lengths)),
    Metric("rollout/length_mean", "tokens", SAMPLES, "mean response length", _over_samples(_response_lengths)),
    Metric("rollout/length_p50", "tokens", SAMPLES, "median response length", _over_samples(_response_lengths, 0.5)),
    Metric("rollout/length_p95", "tokens", SAMPLES, "95th percentile of the response length",
           _over_samples(_response_lengths, 0.95)),
    Metric("rollout/length_max", "tokens", SAMPLES, "largest response length", _over_samples(_response_lengths, 1.0)),
    Metric("rollout/masked_samples", "samples", STEP, "samples for which the rollout server returned no usable result",
           lambda record: float(record.masked_rollouts)),
    Metric("rollout/truncated", "1", SAMPLES, "fraction of responses that were cut by the token budget",
           _over_samples(_finished("length"))),
    Metric("rollout/eos", "1", SAMPLES, "fraction of responses that ended by themselves",
           _over_samples(_finished("stop"))),
    Metric("verifier/accuracy", "1", "judged samples", "fraction whose answer is correct", _accuracy),
    Metric("verifier/unfinished", "1", "judged samples",
           "fraction without an answer because the response was cut or is still in a thinking block", _unfinished),
    Metric("held_out/forward_kl", "nats", HELD_OUT,
           "mean KL(q || p) on the teacher's top-k and the rest, a lower bound; the student from before the step",
           _held_out("forward_kl")),
    Metric("held_out/sampled_kl", "nats", HELD_OUT,
           "mean r, the estimate of KL(q || p) from the stored tokens alone", _held_out("sampled_kl")),
    Metric("held_out/nll", "nats", HELD_OUT, "mean -log p; KL(q || p) plus the teacher's entropy, which is constant",
           _held_out("nll")),
    Metric("held_out/teacher_mass", "1", HELD_OUT,
           "mean total probability that the teacher gives its top-k; at 1, held_out/forward_kl is exact",
           _held_out("teacher_mass")),
    Metric("held_out/tokens", "tokens", STEP, "held-out tokens that were measured", _held_out("tokens")),
    Metric("held_out/unscored", "tokens", STEP,
           "held-out tokens without scores of the teacher, which are in held_out/nll only", _held_out("unscored")),
    Metric("engine/kl", "nats", STUDENT, "mean sampler minus trainer log-prob, an estimate of KL(sampler || trainer)",
           _engine_kl),
    Metric("engine/difference_mean", "nats", STUDENT, "mean |sampler - trainer log-prob|", _engine_difference(None)),
    Metric("engine/difference_p99", "nats", STUDENT, "99th percentile of |sampler - trainer log-prob|",
           _engine_difference(0.99)),
    Metric("engine/difference_max", "nats", STUDENT, "largest |sampler - trainer log-prob|", _engine_difference(1.0)),
    Metric("gates/sampler_share", "1", STUDENT,
           "fraction whose |sampler - trainer log-prob| exceeds the bound gates.sampler_logprob_p99", _engine_above),
    Metric("engine/ratio_mean", "1", STUDENT, "mean trainer probability / sampler probability", _engine_ratio(None)),
    Metric("engine/ratio_max", "1", STUDENT, "largest trainer probability / sampler probability", _engine_ratio(1.0)),
    Metric("engine/corrected", "1", STUDENT, "fraction whose weight objective.policy_gradient.mismatch changed",
           _corrected),
    Metric("gates/sampler_off", "steps", "steps in a row",
           "number of steps whose mean, 99th percentile or share of |sampler - trainer log-prob| is above its bound",
           _sampler_gate("off_in_a_row")),
    Metric("gates/sampler_warnings", "steps", "the launch",
           "number of steps whose largest |sampler - trainer log-prob| is above its bound", _sampler_gate("warnings")),
    Metric("optimizer/updates", "1", STEP, "number of optimizer steps; none is made if no token counts",
           lambda record: float(len(record.made))),
    Metric("optimizer/grad_norm", "1", "optimizer steps",
           "mean global gradient norm before clipping; 0 if there was no optimizer step",
           _over_updates(_mean_of, "grad_norm")),
    Metric("optimizer/grad_norm_max", "1", "optimizer steps",
           "largest global gradient norm before clipping; 0 if there was no optimizer step",
           _over_updates(max, "grad_norm")),
    Metric("optimizer/learning_rate", "1", STEP, "learning rate of the last optimizer step",
           _over_updates(_last_of, "learning_rate")),
    Metric("optimizer/token_count", "tokens", STEP, "denominator of the loss, summed over optimizer steps",
           _over_updates(sum, "token_count")),
    Metric("phase/index", "1", STEP, "place of the step's phase in objective.phases, from 0; no value without phases",
           lambda record: float("nan" if record.phase is None else record.phase)),
    Metric("throughput/tokens_per_second", "tokens/s", STEP,
           "tokens/total divided by the seconds of the whole step without those of the phase held_out",
           _tokens_per_second),
)
# fmt: on

DESCRIBED: tuple[Described, ...] = (*METRICS, *TEACHER_METRICS)
"""Every metric, also those of each of several teachers."""
