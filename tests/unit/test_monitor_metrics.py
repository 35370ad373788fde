"""Every metric of the catalogue against a loop over tokens written from its description."""

import json
import math

import numpy as np
import pytest

from tropd_mcore.config.objectives.base import PolicyGradientConfig
from tropd_mcore.evaluation.chart_catalogue import CHARTS
from tropd_mcore.monitor.catalogue import METRICS, compute_metrics
from tropd_mcore.monitor.console import COLUMNS as COLUMNS_OF_CONSOLE
from tropd_mcore.monitor.jsonl import JsonLines
from tropd_mcore.monitor.record import GateState, StepRecord
from tropd_mcore.types import HeldOutDistance, OptimizerReport, Rollout, TokenTable

NAN = float("nan")
COLUMNS = [
    *("tv", "force"),
    "clipped_entries",
    *("student_logp", "rollout_logp", "teacher_logp", "log_ratio", "loss", "divergence", "advantage"),
    *("student_entropy", "teacher_entropy", "teacher_mass", "student_mass", "topk_overlap", "old_logp", "ratio"),
]


def make_rollout(index: int, prompt: int, prefix: int, response: int, reason: str) -> Rollout:
    ids = np.arange(prompt + prefix + response, dtype=np.int32) + 100 * index
    return Rollout(
        sample_id=f"000001/p{index}/0",
        prompt_id=f"p{index}",
        prompt_ids=ids[:prompt],
        prefix_ids=ids[prompt : prompt + prefix],
        response_ids=ids[prompt + prefix :],
        rollout_logp=np.zeros(response, dtype=np.float32),
        trust_u=np.zeros(response, dtype=np.float32),
        policy_version="1",
        finish_reason=reason,
        carries_prefix_loss=index == 0,
        answer=None,
    )


ROLLOUTS = [make_rollout(0, 3, 4, 23, "stop"), make_rollout(1, 2, 4, 31, "length"), make_rollout(2, 5, 0, 7, "stop")]


def make_record(*, soft: bool = False, epochs: int = 1, **changes) -> StepRecord:
    """A step whose third sample the teacher could not score, with one update per epoch."""
    generator = np.random.default_rng(5)
    rows = []
    for sample, rollout in enumerate(ROLLOUTS):
        start = len(rollout.prompt_ids)
        for token in range(start, len(rollout.token_ids)):
            on = token >= start + len(rollout.prefix_ids)
            if on or rollout.carries_prefix_loss:
                for epoch in range(epochs):
                    rows.append((sample, token, on and sample != 2, not on and sample != 2, epoch))
    columns = {name: generator.normal(size=len(rows)).astype(np.float32) for name in COLUMNS}
    columns["log_ratio"] *= 9
    columns["tv"] = np.abs(columns["tv"]).clip(0, 1) ** 2
    columns["tv"][::7] = NAN
    columns["tv"][1::7] = 1.0
    columns["force"] = np.abs(columns["force"])
    columns["teacher_entropy"][::3] = NAN
    columns["sample_index"], columns["token_index"] = (np.array([row[i] for row in rows]) for i in (0, 1))
    columns["on"], columns["off"], columns["epoch"] = (np.array([row[i] for row in rows]) for i in (2, 3, 4))
    columns["impossible"] = generator.random(len(rows)) > 0.9
    columns["excluded"] = generator.integers(0, 4, len(rows)).astype(np.float32)
    columns["clipped"] = (generator.random(len(rows)) > 0.7).astype(np.float32)
    trusted = generator.random(len(rows))
    columns["trusted"] = (trusted if soft else (trusted > 0.4).astype(np.float32)) * columns["on"]
    values = {
        "table": TokenTable(columns),
        "rollouts": ROLLOUTS,
        "updates": [
            OptimizerReport(
                grad_norm=1.5 + epoch, learning_rate=2e-6 + epoch, loss=0.25 - epoch, token_count=58 + epoch
            )
            for epoch in range(epochs)
        ],
        "alpha": 0.75,
        "phase": 1,
        "timings": {"step": 2.0, "rollout": 1.25, "held_out": 0.5},
        "held_out": HeldOutDistance(0.25, 0.5, 0.75, 1.5, 40, 2, 3),
        "accuracy": 2 / 3,
        "unfinished": 1 / 3,
        "masked_rollouts": 2,
        "sampler_gate": GateState(p99_bound=0.05, off_in_a_row=2, warnings=7),
        "special_ids": frozenset({10, 110, 111}),
    }
    return StepRecord(**(values | changes))


def rows_of(record: StepRecord) -> list[dict]:
    names = list(record.table.columns)
    return [dict(zip(names, row, strict=True)) for row in zip(*record.table.columns.values(), strict=True)]


def mean(pairs) -> float:
    """Weighted mean of (value, weight) in float64, without NaN values. NaN if there is no weight."""
    pairs = [(float(value), float(weight)) for value, weight in pairs if weight > 0 and not math.isnan(value)]
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total else NAN


def shares_by_distance(on: list[dict]) -> dict[str, float]:
    """Of the tokens with a distance: the share in each bin, and the share of the summed force."""
    known = [row for row in on if not math.isnan(row["tv"])]
    force = sum(float(row["force"]) for row in known)
    found = {}
    for low, high in ((0, 1), (1, 10), (10, 50), (50, 90), (90, 100)):
        part = [r for r in known if low <= 100 * r["tv"] and (100 * r["tv"] < high or high == 100)]
        found[f"tv/tokens_{low}_{high}"] = len(part) / len(known)
        found[f"force/tv_{low}_{high}"] = sum(float(row["force"]) for row in part) / force
    assert all(found.values()), "a bin is empty"
    return found


def expected_metrics(record: StepRecord) -> dict[str, float]:
    updated = [row for row in rows_of(record) if row["on"]]
    on = [row for row in updated if row["epoch"] == 0]
    off = [row for row in rows_of(record) if row["off"] and row["epoch"] == 0]
    reports = record.updates
    several = len(reports) > 1
    trusted = [(row, float(row["trusted"])) for row in on]
    outlier = [(row, 1 - float(row["trusted"])) for row in on if row["trusted"] < 1]
    kl = [float(row["divergence"]) for row, _ in outlier]
    engine = [float(row["old_logp"]) - float(row["rollout_logp"]) for row in on]
    lengths = [23, 31, 7]
    special = [row for row in on if ROLLOUTS[row["sample_index"]].token_ids[row["token_index"]] in (10, 110, 111)]
    assert special

    def over(part, name):
        return mean((row[name], weight) for row, weight in part)

    student, prefix = [(row, 1) for row in on], [(row, 1) for row in off]
    return {
        "loss/total": sum(report.loss * report.token_count for report in reports)
        / sum(report.token_count for report in reports),
        "loss/objective": sum(float(row["loss"]) for row in on + off) / len(on + off),
        "loss/trusted": over(trusted, "loss"),
        "loss/outlier": over(outlier, "loss"),
        "loss/prefix": over(prefix, "loss"),
        "trust/fraction": over(student, "trusted"),
        "trust/tv": mean((1 - min(math.exp(row["log_ratio"]), 1), 1) for row in on),
        "tv/mean": over(student, "tv"),
        **shares_by_distance(on),
        "log_ratio/mean": over(student, "log_ratio"),
        "log_ratio/trusted": over(trusted, "log_ratio"),
        "log_ratio/outlier": over(outlier, "log_ratio"),
        "log_ratio/prefix": over(prefix, "log_ratio"),
        "log_ratio/min": min(float(row["log_ratio"]) for row in on),
        "log_ratio/special_extreme": mean((row["log_ratio"] < -10, 1) for row in special),
        "outlier/fkl_mean": over(outlier, "divergence"),
        "outlier/fkl_p95": float(np.percentile(np.array(kl), 95)),
        "outlier/fkl_max": max(kl),
        "outlier/fkl_negative": mean((row["divergence"] < 0, weight) for row, weight in outlier),
        "topk/teacher_mass_mean": over(student, "teacher_mass"),
        "topk/teacher_mass_min": min(float(row["teacher_mass"]) for row in on),
        "topk/student_mass_mean": over(student, "student_mass"),
        "topk/student_mass_min": min(float(row["student_mass"]) for row in on),
        "topk/clipped_entries": over(student, "clipped_entries"),
        "topk/overlap": over(student, "topk_overlap"),
        "advantage/trusted": mean((abs(row["advantage"]), weight) for row, weight in trusted),
        "advantage/outlier": mean((abs(row["advantage"]), weight) for row, weight in outlier),
        "advantage/prefix": mean((abs(row["advantage"]), 1) for row in off),
        "entropy/student": over(student, "student_entropy"),
        "entropy/teacher": over(student, "teacher_entropy"),
        "tokens/student": 54.0,
        "tokens/trusted": sum(weight for _, weight in trusted),
        "tokens/outlier": sum(weight for _, weight in outlier),
        "tokens/prefix": 4.0,
        "tokens/total": 30 + 37 + 12.0,
        "teacher/masked_samples": 1.0,
        "teacher/impossible_tokens": sum(bool(row["impossible"]) for row in on + off),
        "teacher/excluded_candidates": sum(float(row["excluded"]) for row in on + off),
        "guidance/alpha": 0.75,
        "guidance/prefix_length": 8 / 3,
        "rollout/masked_samples": 2.0,
        "rollout/length_mean": sum(lengths) / 3,
        "rollout/length_p50": 23.0,
        "rollout/length_p95": float(np.percentile(lengths, 95)),
        "rollout/length_max": 31.0,
        "rollout/truncated": 1 / 3,
        "rollout/eos": 2 / 3,
        "verifier/accuracy": 2 / 3,
        "verifier/unfinished": 1 / 3,
        "held_out/forward_kl": 0.25,
        "held_out/sampled_kl": 0.5,
        "held_out/nll": 1.5,
        "held_out/teacher_mass": 0.75,
        "held_out/tokens": 40.0,
        "held_out/unscored": 2.0,
        "engine/kl": -sum(engine) / len(engine),
        "engine/difference_mean": sum(map(abs, engine)) / len(engine),
        "engine/difference_p99": float(np.percentile(np.abs(np.array(engine)), 99)),
        "engine/difference_max": max(map(abs, engine)),
        "gates/sampler_share": sum(abs(value) > 0.05 for value in engine) / len(engine),
        "gates/sampler_off": 2.0,
        "gates/sampler_warnings": 7.0,
        "engine/ratio_mean": sum(map(math.exp, engine)) / len(engine),
        "engine/ratio_max": math.exp(max(engine)),
        "engine/corrected": NAN,
        "ratio/mean": mean((row["ratio"], 1) for row in updated) if several else NAN,
        "ratio/max": max(float(row["ratio"]) for row in updated) if several else NAN,
        "ratio/clipped": mean((row["clipped"], 1) for row in updated) if several else NAN,
        "ratio/difference_mean": mean((abs(float(row["student_logp"]) - float(row["old_logp"])), 1) for row in updated)
        if several
        else NAN,
        "optimizer/updates": len(reports),
        "optimizer/grad_norm": sum(report.grad_norm for report in reports) / len(reports),
        "optimizer/grad_norm_max": max(report.grad_norm for report in reports),
        "optimizer/learning_rate": reports[-1].learning_rate,
        "optimizer/token_count": sum(report.token_count for report in reports),
        "phase/index": 1.0,
        "throughput/tokens_per_second": 79 / (2 - 0.5),
        "time/step": 2.0,
        "time/held_out": 0.5,
        "time/rollout": 1.25,
    }


@pytest.mark.parametrize(("soft", "epochs"), [(False, 1), (True, 1), (False, 3)])
def test_every_metric_equals_a_loop_over_tokens(soft, epochs):
    record = make_record(soft=soft, epochs=epochs)
    found, expected = compute_metrics(record), expected_metrics(record)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6, nan_ok=True), name


def test_an_empty_step_gives_nan_for_means_and_zero_for_counts_only():
    empty = make_record(table=TokenTable({}), rollouts=[], accuracy=None, unfinished=None, held_out=None)
    found = compute_metrics(empty)
    counts = {"tokens/student", "tokens/trusted", "tokens/outlier", "tokens/prefix", "tokens/total"}
    given = {
        "rollout/masked_samples",
        "teacher/masked_samples",
        "teacher/impossible_tokens",
        "guidance/alpha",
        "gates/sampler_off",
        "gates/sampler_warnings",
        "phase/index",
        "loss/total",
        "time/step",
        "time/rollout",
        "time/held_out",
    }
    for name, value in found.items():
        if name.startswith("optimizer/") or name in given or name == "throughput/tokens_per_second":
            continue
        assert (value == 0) if name in counts else math.isnan(value), name


def report(grad_norm: float, token_count: int, learning_rate: float = 1e-3) -> OptimizerReport:
    return OptimizerReport(grad_norm=grad_norm, learning_rate=learning_rate, loss=0.25, token_count=token_count)


def test_a_mini_batch_without_a_token_does_not_count_as_an_optimizer_step():
    found = compute_metrics(make_record(updates=[report(2.0, 30), report(0.0, 0), report(4.0, 10)]))
    assert found["optimizer/updates"] == 2 and found["optimizer/token_count"] == 40
    assert found["optimizer/grad_norm"] == 3.0 and found["optimizer/grad_norm_max"] == 4.0
    assert found["loss/total"] == 0.25


def test_a_step_without_an_optimizer_step_reports_zero_updates_tokens_and_norms(tmp_path):
    found = compute_metrics(make_record(updates=[report(0.0, 0, 3e-4)] * 2))
    names = ("updates", "grad_norm", "grad_norm_max", "token_count", "learning_rate")
    assert [found[f"optimizer/{name}"] for name in names] == [0, 0, 0, 0, 3e-4] and found["loss/total"] == 0
    sink = JsonLines(tmp_path / "metrics.jsonl", 0)
    sink.write(0, found)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=lambda text: pytest.fail(text))["optimizer/grad_norm"] == 0


def test_a_region_without_tokens_is_nan_and_the_others_are_not():
    record = make_record()
    record.table.columns["trusted"][:] = record.table["on"]
    found = compute_metrics(record)
    assert math.isnan(found["outlier/fkl_mean"]) and math.isnan(found["loss/outlier"])
    assert math.isnan(found["outlier/fkl_p95"]) and found["tokens/outlier"] == 0
    assert found["trust/fraction"] == 1.0 and not math.isnan(found["loss/trusted"])


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ({"mismatch": "tis", "tis_cap": 1.5}, lambda p, s: p / s > 1.5),
        ({"mismatch": "icepop"}, lambda p, s: not 0.5 <= p / s <= 5.0),
        ({"mismatch": "mask"}, lambda p, s: p - s < -0.2),
    ],
)
def test_the_corrected_fraction_counts_the_tokens_whose_weight_was_changed(settings, changed):
    record = make_record(policy_gradient=PolicyGradientConfig(**settings))
    on = [row for row in rows_of(record) if row["on"]]
    probabilities = [(math.exp(row["old_logp"]), math.exp(row["rollout_logp"])) for row in on]
    expected = sum(changed(student, sampler) for student, sampler in probabilities) / len(on)
    assert 0 < expected < 1
    assert compute_metrics(record)["engine/corrected"] == pytest.approx(expected)


def test_one_minus_the_trusted_fraction_agrees_with_the_tv_estimate_under_the_bernoulli_gate():
    count = 40_000
    generator = np.random.default_rng(0)
    log_ratio = generator.normal(size=count) - 0.5
    trusted = np.log(generator.random(count)) < log_ratio
    columns = {"on": np.ones(count, bool), "off": np.zeros(count, bool), "trusted": trusted, "log_ratio": log_ratio}
    columns |= {name: np.zeros(count, int) for name in ("sample_index", "token_index", "epoch")}
    found = compute_metrics(make_record(table=TokenTable(columns)))
    assert 1 - found["trust/fraction"] == pytest.approx(found["trust/tv"], abs=0.01)


def test_the_ratio_is_measured_even_with_a_single_update():
    ratio = PolicyGradientConfig(ratio="ppo_clip")
    assert not math.isnan(compute_metrics(make_record(policy_gradient=ratio))["ratio/mean"])


def test_console_and_report_show_only_metrics_that_exist():
    known = {metric.name for metric in METRICS} | {"time/step"}
    assert {column.metric for column in COLUMNS_OF_CONSOLE} <= known
    drawn = {line.metric for chart in CHARTS for line in chart.lines}
    assert {name for name in drawn if not name.startswith("time/")} <= known


def test_metric_names_are_unique_and_each_says_unit_denominator_and_meaning():
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert metric.unit and metric.over and metric.description and metric.name.count("/") == 1


def test_without_the_sampler_gate_its_metrics_are_nan():
    found = compute_metrics(make_record(sampler_gate=None))
    for name in ("gates/sampler_share", "gates/sampler_off", "gates/sampler_warnings"):
        assert math.isnan(found[name]), name
    assert found["engine/difference_p99"] > 0
