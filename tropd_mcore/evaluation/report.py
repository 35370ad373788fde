"""report.html of a run: what it was told, how it went, how good the student became, and what its rollouts look like.

Not for live monitoring (see `monitor`). Invariants: one file that needs nothing from outside; what a run did not leave
behind is said in its place; the same run directory gives the same file, byte for byte.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from tropd_mcore.data.chat import Renderer
from tropd_mcore.errors import DataError
from tropd_mcore.evaluation.charts import Dash, Hue, Series, format_value, legend_mark, line_chart
from tropd_mcore.evaluation.evaluation_view import evaluation_section, headline
from tropd_mcore.evaluation.rollout_view import LEGEND, TokenTexts, rollout_html, samples_to_show
from tropd_mcore.evaluation.run_records import LoadRollouts, RunRecords, read_run
from tropd_mcore.files import publish_text

TOKEN_STEPS = 3
"""Steps whose rollouts are shown: the first, one in the middle, the last."""
SAMPLES_PER_STEP = 2


@dataclass(frozen=True)
class Line:
    """A metric as one line of a chart."""

    label: str
    metric: str
    hue: Hue = "plain"
    dash: Dash = "solid"
    complement: bool = False
    """Show 1 - value."""


@dataclass(frozen=True)
class Chart:
    """What is drawn together, and how to read it."""

    title: str
    unit: str
    reading: str
    lines: tuple[Line, ...]
    logarithmic: bool = False


CHARTS = (
    Chart(
        "Loss by region", "nats a token", "The value of the objective, not the surrogate that is differentiated.",
        (
            Line("trusted", "loss/trusted", "trusted"),
            Line("outlier", "loss/outlier", "outlier", "dashed"),
            Line("prefix", "loss/prefix", "prefix", "dotted"),
        ),
    ),
    Chart(
        "Trust", "share of student tokens", "The two lines agree in expectation; a gap points at the gate.",
        (
            Line("trusted", "trust/fraction", "trusted"),
            Line("1 - total variation", "trust/tv", "plain", "dashed", complement=True),
        ),
    ),
    Chart(
        "Mean log-ratio", "nats", "log q - log p on student tokens: minus the reverse KL. 0 is the teacher's equal.",
        (Line("all student tokens", "log_ratio/mean"), Line("trusted", "log_ratio/trusted", "trusted", "dashed")),
    ),
    Chart(
        "Gradient norm", "before clipping, logarithmic", "A jump that stays is a step that was too long.",
        (Line("gradient norm", "optimizer/grad_norm"),), logarithmic=True,
    ),
    Chart(
        "Entropy", "nats", "The aim is the teacher's entropy, not the largest or the smallest.",
        (Line("student", "entropy/student", "trusted"), Line("teacher", "entropy/teacher", "plain", "dashed")),
    ),
    Chart(
        "Outlier divergence", "nats", "Top-k forward KL where the student's token was not trusted.",
        (
            Line("mean", "outlier/fkl_mean", "outlier"),
            Line("95 % quantile", "outlier/fkl_p95", "outlier", "dotted"),
        ),
    ),
    Chart(
        "Teacher prefix", "tokens, mean l", "What the student continues; it falls to 0 as guidance ends.",
        (Line("prefix length", "guidance/prefix_length", "prefix"),),
    ),
    Chart(
        "Guidance schedule", "alpha", "The guided share of each stored teacher response.",
        (Line("alpha", "guidance/alpha", "prefix", "dashed"),),
    ),
    Chart(
        "Right answers of the rollouts", "share of samples", "Sampled on training prompts, teacher prefix included.",
        (Line("verifier accuracy", "verifier/accuracy", "trusted"),),
    ),
    Chart(
        "Response length", "tokens", "The student's own part. Growth with more truncation is a warning.",
        (
            Line("mean", "rollout/length_mean"),
            Line("95 % quantile", "rollout/length_p95", "plain", "dotted"),
        ),
    ),
    Chart(
        "Truncated responses", "share of samples", "Cut by the token budget.",
        (Line("truncated", "rollout/truncated", "outlier"),),
    ),
    Chart(
        "Teacher's top-k", "probability, share", "Mass of both models on the teacher's top-k, and its overlap.",
        (
            Line("teacher mass", "topk/teacher_mass_mean", "plain"),
            Line("student mass", "topk/student_mass_mean", "trusted", "dashed"),
            Line("overlap", "topk/overlap", "prefix", "dotted"),
        ),
    ),
    Chart(
        "Sampler and trainer", "nats, logarithmic", "Difference of their log-probs: numerics, or wrong weights.",
        (
            Line("mean", "engine/difference_mean"),
            Line("99 %", "engine/difference_p99"),
            Line("largest", "engine/difference_max", "outlier", "dotted"),
        ),
        logarithmic=True,
    ),
    Chart(
        "Ratio to the policy of the step's start", "p / p_old", "Over all updates of the step; 1 before the first one.",
        (
            Line("mean", "ratio/mean", "trusted"),
            Line("largest", "ratio/max", "outlier", "dotted"),
        ),
        logarithmic=True,
    ),
    Chart(
        "Clipped ratios", "share of student tokens",
        "Tokens whose gradient PPO's clip holds at 0: many ask for fewer updates.",
        (Line("clipped", "ratio/clipped", "outlier"),),
    ),
    Chart(
        "Seconds by phase", "s, logarithmic", "Where the time of a step goes; the first one starts the servers.",
        (
            Line("rollout", "time/rollout"),
            Line("student before", "time/student", "trusted", "dashed"),
            Line("teacher", "time/teacher", "prefix", "dashed"),
            Line("forward and backward", "time/forward_backward", "trusted"),
            Line("optimizer", "time/optimizer", "outlier", "dotted"),
        ),
        logarithmic=True,
    ),
)  # fmt: skip
"""In the order of the page."""

KEY_SETTINGS = (
    "student.path", "student.dtype", "teacher.kind", "teacher.path", "teacher.dtype", "data.prompts",
    "data.teacher_responses", "run.steps", "run.seed", "rollout.prompts_per_step", "rollout.samples_per_prompt",
    "rollout.max_new_tokens", "rollout.temperature", "rollout.top_p", "objective.kind", "objective.trust.mode",
    "objective.outlier.mode", "objective.outlier.topk", "objective.outlier.norm", "objective.outlier.weight",
    "objective.guidance.enabled", "objective.guidance.beta", "objective.guidance.schedule",
    "objective.guidance.min_continuation", "objective.policy_gradient.ratio",
    "objective.policy_gradient.mini_batches", "objective.policy_gradient.epochs", "objective.policy_gradient.mismatch",
    "loss.form", "loss.backend", "loss.aggregation",
    "optimizer.learning_rate", "optimizer.schedule", "optimizer.weight_decay", "optimizer.clip_grad_norm",
    "parallel.tensor", "parallel.pipeline", "parallel.context", "parallel.data", "verifier.kind",
)  # fmt: skip
"""Shown above the whole configuration, where the run has them."""


def write_report(run_dir: Path, *, load_rollouts: LoadRollouts) -> Path:
    """Write <run_dir>/report.html and return its path. `load_rollouts` reads a file of <run_dir>/rollouts.

    Raises DataError where `run_dir` is no folder or a file in it is damaged.
    """
    run = read_run(run_dir, load_rollouts, token_steps=TOKEN_STEPS)
    style = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    name = escape(run_dir.resolve().name)
    sections = "".join((_header(run, name), evaluation_section(run), _curves(run), _rollouts(run), _settings(run)))
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>TrOPD run {name}</title><style>{style}</style></head><body><main>{sections}</main></body></html>\n"
    )
    path = run_dir / "report.html"
    publish_text(path, page)
    return path


def _header(run: RunRecords, name: str) -> str:
    steps = run.steps
    span = f"Steps {steps[0]} to {steps[-1]}." if steps else "No step has been logged."
    models = " ← ".join(
        escape(Path(str(run.settings[key])).name) for key in ("student.path", "teacher.path") if key in run.settings
    )
    tiles = [headline(run), *(_change_tile(run, *tile) for tile in _TILES)]
    shown = "".join(f'<div class="tile"><span>{title}</span><b>{value}</b><small>{note}</small></div>'
                    for title, value, note in filter(None, tiles))  # fmt: skip
    return f'<header><h1>{name}</h1><p>{models}. {span}</p><div class="tiles">{shown}</div></header>'


_TILES = (
    ("Trusted tokens", "trust/fraction", "{:.1%}", ""),
    ("Mean log-ratio", "log_ratio/mean", "{:+.3f}", ", nats"),
    ("Right rollouts", "verifier/accuracy", "{:.1%}", ", teacher prefix included"),
    ("Tokens a second", "throughput/tokens_per_second", "{:,.0f}", ""),
)
"""(title, metric, format, remark)"""


def _change_tile(run: RunRecords, title: str, metric: str, form: str, remark: str) -> tuple[str, str, str] | None:
    """A metric at the start and at the end: means over the first and the last tenth of the steps."""
    values = [value for value in run.series(metric) if value is not None and math.isfinite(value)]
    if not values:
        return None
    count = max(1, len(values) // 10)
    first, last = (sum(part) / count for part in (values[:count], values[-count:]))
    over = "step" if count == 1 else f"{count} steps"
    return title, f"{form.format(first)} → {form.format(last)}", f"first and last {over}{remark}"


def _curves(run: RunRecords) -> str:
    if not run.metrics:
        return _section("Curves", '<p class="note">There is no metrics.jsonl, or no step in it.</p>')
    drawn = [(chart, _chart(run, chart)) for chart in CHARTS]
    missing = [chart.title.lower() for chart, html in drawn if not html]
    note = f'<p class="note">Not measured in this run: {escape(", ".join(missing))}.</p>' if missing else ""
    return _section("Curves", f'<div class="charts">{"".join(html for _, html in drawn)}</div>{note}')


def _chart(run: RunRecords, chart: Chart) -> str:
    """The figure of one chart; empty where none of its metrics has a value."""
    series = []
    for line in chart.lines:
        values = run.series(line.metric)
        if line.complement:
            values = [None if value is None else 1.0 - value for value in values]
        if any(value is not None for value in values):
            series.append(Series(line.label, line.hue, values, line.dash))
    svg = line_chart(run.steps, series, description=f"{chart.title} over the steps", logarithmic=chart.logarithmic)
    if not svg:
        return ""
    legend = "".join(
        f"<li>{legend_mark(line.hue, line.dash)}{escape(line.label)} <b>{_last(line.values)}</b></li>"
        for line in series
    )
    return (
        f'<figure><figcaption><h3>{escape(chart.title)} <span class="unit">{escape(chart.unit)}</span></h3>'
        f'<ul class="lines">{legend}</ul></figcaption>{svg}<p class="reading">{escape(chart.reading)}</p></figure>'
    )


def _last(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return format_value(known[-1])


def _rollouts(run: RunRecords) -> str:
    if not run.tokens:
        text = (
            "No step has both its token values and its rollouts: monitor.token_samples or run.keep_rollouts is off, "
            "or the files were removed."
        )
        return _section("Rollouts", f'<p class="note">{text}</p>')
    token_texts, note = _token_texts(run)
    parts = [LEGEND, note]
    for tokens in run.tokens:
        shown = [rollout_html(tokens, sample, token_texts) for sample in samples_to_show(tokens, SAMPLES_PER_STEP)]
        parts.append(f'<h3>Step {tokens.step}</h3><div class="rollouts">{"".join(shown)}</div>')
    return _section("Rollouts", "".join(parts))


def _token_texts(run: RunRecords) -> tuple[TokenTexts, str]:
    """How ids become text: by the student's tokenizer, or not at all with a note that says why."""

    def numbers(ids: Sequence[int]) -> list[str]:
        return [f"{token_id} " for token_id in ids]

    folder = run.settings.get("student.path")
    if not isinstance(folder, str):
        return numbers, '<p class="note">Token ids instead of text: the run has no student.path.</p>'
    try:
        texts: Callable[[Sequence[int]], list[str]] = Renderer(Path(folder)).token_texts
    except DataError as error:
        return numbers, f'<p class="note">Token ids instead of text: {escape(str(error))}</p>'
    return texts, ""


def _settings(run: RunRecords) -> str:
    if not run.settings:
        return _section("Settings", '<p class="note">There is no config.resolved.yaml.</p>')
    rows = "".join(
        f"<tr><th>{escape(key)}</th><td>{escape(_setting(run.settings[key]))}</td></tr>"
        for key in KEY_SETTINGS
        if key in run.settings
    )
    whole = f"<details><summary>Whole configuration</summary><pre>{escape(run.config_text)}</pre></details>"
    return _section("Settings", f'<table class="settings"><tbody>{rows}</tbody></table>{whole}')


def _setting(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"
