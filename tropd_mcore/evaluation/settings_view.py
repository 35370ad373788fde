"""The section with the settings of a run, or with the differences between the settings of several runs.

This module does not check settings (see `config`). Invariant: values are shown as the run recorded them.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from tropd_mcore.evaluation.run_records import RunRecords

NOTHING = "not there"
"""Shown if a run does not have a setting."""
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
"""Settings shown above the whole configuration, if the run has them."""


def settings_section(runs: Sequence[RunRecords]) -> str:
    """Return the section with the settings of one run, or with the differences between several."""
    if len(runs) > 1:
        return f"<section><h2>Settings that differ</h2>{_differences(runs)}{_whole(runs)}</section>"
    (run,) = runs
    if not run.settings:
        return '<section><h2>Settings</h2><p class="note">There is no config.resolved.yaml.</p></section>'
    rows = "".join(
        f"<tr><th>{escape(key)}</th><td>{escape(_text(run, key))}</td></tr>"
        for key in (*KEY_SETTINGS, *_teacher_settings(run), *_phase_settings(run))
        if key in run.settings
    )
    return f'<section><h2>Settings</h2><table class="settings"><tbody>{rows}</tbody></table>{_whole(runs)}</section>'


def _teacher_settings(run: RunRecords) -> list[str]:
    """The kind and the folder of each of several teachers."""
    return [key for key in run.settings if key.startswith("teachers.") and key.split(".")[2:] in (["kind"], ["path"])]


def _phase_settings(run: RunRecords) -> list[str]:
    """The objective and the given ends of each phase."""
    keys = [key for key in run.settings if key.startswith("objective.phases.")]
    kinds = [key for key in keys if key.endswith(".objective.kind")]
    ends = [key for key in keys if ".until." in key and run.settings[key] is not None]
    return sorted([*kinds, *ends], key=lambda key: int(key.split(".")[2]))


def _differences(runs: Sequence[RunRecords]) -> str:
    keys = sorted({key for run in runs for key in run.settings})
    differing = [key for key in keys if len({_text(run, key) for run in runs}) > 1]
    if not differing:
        return '<p class="note">The runs have the same settings.</p>'
    heads = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    rows = "".join(
        f"<tr><th>{escape(key)}</th>{''.join(f'<td>{escape(_text(run, key))}</td>' for run in runs)}</tr>"
        for key in differing
    )
    table = f"<table><thead><tr><th>key</th>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div class="scroll card">{table}</div>'


def _whole(runs: Sequence[RunRecords]) -> str:
    return "".join(
        f"<details><summary>Whole configuration{f' of {escape(run.name)}' if len(runs) > 1 else ''}</summary>"
        f"<pre>{escape(run.config_text)}</pre></details>"
        for run in runs
        if run.config_text
    )


def _text(run: RunRecords, key: str) -> str:
    """A value as text; NOTHING if the run does not have the key."""
    if key not in run.settings:
        return NOTHING
    value = run.settings[key]
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)
