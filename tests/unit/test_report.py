"""The report: self-contained, true to the run's files, and honest about what is missing."""

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tests.tiny_models import tiny_tokenizer
from tropd_mcore.errors import DataError
from tropd_mcore.evaluation.charts import Interval, Series, format_value, interval_chart, line_chart
from tropd_mcore.evaluation.evaluate import EvaluationResult, EvaluationSettings, Score
from tropd_mcore.evaluation.report import CHARTS, write_report
from tropd_mcore.evaluation.statistics import wilson_interval
from tropd_mcore.monitor.catalogue import METRICS
from tropd_mcore.train.replay import load_rollouts, save_rollouts
from tropd_mcore.train.tokens import save_token_sample
from tropd_mcore.types import Rollout, TokenTable

PROMPT, PREFIX, RESPONSE = "two & two", " one", " <b>four"
VOID = {"meta", "br"}


class Tree(HTMLParser):
    """Checks that tags are balanced; collects (class, title, text) of every token span."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.tokens: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.feed(page)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append((tag, dict(attributes)))
            if "token" in (dict(attributes).get("class") or "").split():
                self.tokens.append((dict(attributes)["class"], dict(attributes).get("title") or "", ""))

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)
        if self.tokens and self.open and "token" in (self.open[-1][1].get("class") or ""):
            kind, title, text = self.tokens[-1]
            self.tokens[-1] = kind, title, text + data


def rollout_of(tokenizer, index: int) -> Rollout:
    prompt, prefix, response = (tokenizer.encode(text) for text in (PROMPT, PREFIX, RESPONSE))
    return Rollout(
        sample_id=f"000000/p/{index}",
        prompt_id="p",
        prompt_ids=np.array(prompt, np.int32),
        prefix_ids=np.array(prefix, np.int32),
        response_ids=np.array(response, np.int32),
        behav_logp=np.zeros(len(response), np.float32),
        trust_u=np.zeros(len(response), np.float32),
        policy_version="0",
        finish_reason="stop",
        carries_prefix_loss=index == 0,
        answer="4 < 5",
    )


def table_of(rollouts: list[Rollout], outliers: dict[int, list[int]]) -> TokenTable:
    """Prefix rows of the first sample, response rows of all; `outliers`: sample -> positions in the response."""
    rows = []
    for sample, rollout in enumerate(rollouts):
        start = len(rollout.prompt_ids) + len(rollout.prefix_ids)
        if rollout.carries_prefix_loss:
            rows += [(sample, token, False, True, 0.0) for token in range(len(rollout.prompt_ids), start)]
        for position in range(len(rollout.response_ids)):
            trusted = float(position not in outliers.get(sample, []))
            rows.append((sample, start + position, True, False, trusted))
    names = ("sample_index", "token_index", "on", "off", "trusted")
    columns = {name: np.array([row[i] for row in rows]) for i, name in enumerate(names)}
    trusted = columns["trusted"]
    columns["epoch"] = np.zeros(len(rows), np.int64)
    columns["old_logp"] = np.full(len(rows), -1.5, np.float32)
    columns["teacher_logp"] = np.where(trusted > 0, -1.25, -9.75).astype(np.float32)
    columns["log_ratio"] = columns["teacher_logp"] - columns["old_logp"]
    return TokenTable(columns)


def result_of(model: str, correct: int, total: int = 40, prompts: str = "same") -> EvaluationResult:
    def score() -> Score:
        return Score(correct, total, correct / total, *wilson_interval(correct, total))

    settings = EvaluationSettings(prompts="heldout.jsonl", max_new_tokens=9)
    right = [index < correct for index in range(total)]
    return EvaluationResult(model, "ab" * 32, prompts, settings, score(), score(), 0.025, 7.5, right)


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A run of three steps with everything that a report shows."""
    run = tmp_path / "run <1>"
    student = tmp_path / "student"
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(student)
    rollouts = [rollout_of(tokenizer, index) for index in range(3)]
    run.mkdir()
    lines = []
    for step in range(3):
        values = {metric.name: 0.25 + step for metric in METRICS} | {"time/rollout": 1.0, "verifier/accuracy": None}
        lines.append(json.dumps({"step": step, **values}) + "\n")
        save_rollouts(run / "rollouts" / f"step_{step:06d}.npz", rollouts)
        save_token_sample(run / "tokens" / f"step_{step:06d}.npz", table_of(rollouts, {1: [0, 2], 2: [1]}), samples=3)
    (run / "metrics.jsonl").write_text("".join(lines))
    (run / "config.resolved.yaml").write_text(
        f"run:\n  seed: 0  # default\n  steps: 3\nstudent:\n  path: {student}\n"
        f"teacher:\n  path: {tmp_path / 'teacher'}\n"
        "objective:\n  kind: tropd\n  guidance:\n    enabled: true\n"
    )
    result_of(str(student), 10).save(run / "evaluation_before.json")
    result_of(str(run / "export"), 30).save(run / "evaluation_after.json")
    result_of(str(tmp_path / "teacher"), 39).save(run / "evaluation" / "teacher.json")
    return run


def page_of(run: Path) -> str:
    return write_report(run, load_rollouts=load_rollouts).read_text(encoding="utf-8")


def section(page: str, title: str) -> str:
    return page.split(f"<h2>{title}</h2>")[1].split("</section>")[0]


def test_the_page_is_well_formed_and_needs_nothing_from_outside(run_dir):
    page = page_of(run_dir)
    Tree(page)
    assert not re.search(r"https?:|url\(|<script|<link|<img|@import", page)
    charts = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    for svg in charts:
        ElementTree.fromstring(svg)
    assert len(charts) > len(CHARTS)


def test_the_same_run_gives_the_same_page(run_dir):
    assert page_of(run_dir) == page_of(run_dir)


def test_every_metric_of_a_chart_is_in_the_catalogue():
    known = {metric.name for metric in METRICS}
    phases = {f"time/{phase}" for phase in ("rollout", "student", "teacher", "forward_backward", "optimizer")}
    assert {line.metric for chart in CHARTS for line in chart.lines} <= known | phases


def test_the_phases_of_the_time_chart_are_those_of_the_trainer():
    source = (Path(__file__).parents[2] / "tropd_mcore" / "train" / "trainer.py").read_text()
    shown = {line.metric for chart in CHARTS for line in chart.lines if line.metric.startswith("time/")}
    assert shown <= {f"time/{phase}" for phase in re.findall(r'clock\.phase\("(\w+)"\)', source)}


def test_a_metric_without_values_is_named_and_not_drawn(run_dir):
    curves = section(page_of(run_dir), "Curves")
    assert "Not measured in this run: right answers of the rollouts." in curves
    assert "<h3>Right answers of the rollouts" not in curves
    assert curves.count("<figure>") == len(CHARTS) - 1


def test_tokens_are_marked_by_what_the_loss_made_of_them(run_dir):
    tree = Tree(section(page_of(run_dir), "Rollouts"))
    tokenizer = tiny_tokenizer()
    sizes = [len(tokenizer.encode(text)) for text in (PROMPT, PREFIX, RESPONSE)]
    legend, shown = tree.tokens[:5], tree.tokens[5:]
    assert [kind for kind, _, _ in legend] == [
        f"token {kind}" for kind in ("prompt", "prefix", "trusted", "outlier", "unscored")
    ]
    assert len(shown) == 3 * 2 * sum(sizes)
    first = shown[: sum(sizes)]  # sample 1 has the most outliers and comes first
    expected = ["prompt"] * sizes[0] + ["prefix"] * sizes[1] + ["trusted"] * sizes[2]
    for position in (0, 2):
        expected[sizes[0] + sizes[1] + position] = "outlier"
    assert [kind for kind, _, _ in first] == [f"token {kind}" for kind in expected]
    assert "".join(text for _, _, text in first) == PROMPT + PREFIX + RESPONSE
    outlier = first[sizes[0] + sizes[1]]
    assert "log-ratio -8.250, log p -1.500, log q -9.750" in outlier[1] and "trust 0" in outlier[1]
    assert "no loss here" in first[sizes[0]][1]


def test_a_sample_that_the_teacher_could_not_score_is_marked(run_dir):
    for path in (run_dir / "tokens").iterdir():
        table = dict(np.load(path))
        table["on"] = np.where(table["sample_index"] == 1, False, table["on"])
        np.savez(path, **table)
    rollouts = section(page_of(run_dir), "Rollouts")
    assert "000000/p/1" not in rollouts  # nothing of it counts, so it has no outliers and comes last
    for path in (run_dir / "tokens").iterdir():
        table = dict(np.load(path))
        keep = table["sample_index"] == 1
        np.savez(path, **{name: values[keep] for name, values in table.items()})
    assert "not scored by the teacher" in section(page_of(run_dir), "Rollouts")


def test_long_rollouts_are_cut_with_a_note(run_dir, monkeypatch):
    from tropd_mcore.evaluation import rollout_view

    monkeypatch.setattr(rollout_view, "SHOWN_TOKENS", 2)
    total = sum(len(tiny_tokenizer().encode(text)) for text in (PREFIX, RESPONSE))
    assert f"… {total - 2} more tokens" in section(page_of(run_dir), "Rollouts")


def test_evaluations_are_named_ordered_and_compared(run_dir):
    page = page_of(run_dir)
    text = section(page, "Held-out accuracy")
    positions = [text.index(name) for name in ("student before", "student after (export)", "teacher")]
    assert positions == sorted(positions)
    assert "+50.0 points" in text and "+72.5 points" in text
    assert "25.0% → 75.0%" in page and "10 and 30 of 40 held-out, greedy" in page


def test_results_that_cannot_be_compared_are_said_to_be_so(run_dir):
    result_of(str(run_dir / "export"), 30, prompts="other").save(run_dir / "evaluation_after.json")
    text = section(page_of(run_dir), "Held-out accuracy")
    assert "not comparable" in text and "+50.0" not in text


def test_settings_are_shown_as_they_are(run_dir):
    text = section(page_of(run_dir), "Settings")
    for key, value in (("run.seed", "0"), ("objective.guidance.enabled", "yes"), ("objective.kind", "tropd")):
        assert f"<th>{key}</th><td>{value}</td>" in text
    assert "seed: 0  # default" in text


def test_an_empty_run_directory_gives_a_report_of_what_is_missing(tmp_path):
    page = page_of(tmp_path)
    Tree(page)
    for words in (
        "No step has been logged",
        "No evaluation",
        "There is no metrics.jsonl",
        "No step has both",
        "config",
    ):
        assert words in page


def test_without_a_tokenizer_the_ids_are_shown_and_the_reason(run_dir):
    config = run_dir / "config.resolved.yaml"
    config.write_text(re.sub(r"path: .*student\n", "path: /nowhere\n", config.read_text()))
    rollouts = section(page_of(run_dir), "Rollouts")
    assert "Token ids instead of text: /nowhere: expected a tokenizer there" in rollouts
    ids = tiny_tokenizer().encode(PROMPT)
    assert "".join(f">{token_id} </span>" for token_id in ids[:1]) in rollouts


def test_a_line_cut_by_a_crash_is_left_out_and_a_damaged_one_is_an_error(run_dir):
    path = run_dir / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 3, "loss/tru')
    assert "Steps 0 to 2." in page_of(run_dir)
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(DataError, match=r"metrics\.jsonl:1: expected a JSON object with `step`"):
        page_of(run_dir)


@pytest.mark.parametrize("name", ["tokens", "rollouts"])
def test_damaged_arrays_are_an_error_with_the_file(run_dir, name):
    (run_dir / name / "step_000000.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(DataError, match=r"step_000000\.npz"):
        page_of(run_dir)


def test_a_run_directory_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(DataError, match="found no folder"):
        page_of(tmp_path / "missing")


def points_of(svg: str) -> list[list[tuple[float, float]]]:
    return [
        [(float(x), float(y)) for x, y in (pair.split(",") for pair in line.split())]
        for line in re.findall(r'<polyline[^>]*points="([^"]*)"', svg)
    ]


def ticks_of(svg: str) -> dict[float, float]:
    """{value: height} of the vertical axis"""
    found = re.findall(r'<text class="tick" x="[\d.]+" y="([\d.]+)" text-anchor="end">([^<]+)</text>', svg)
    return {float(text): float(y) - 4 for y, text in found}


@pytest.mark.parametrize("values", [[0.0, 1.0, 0.5], [-3e-4, 7e-4, 0.0], [1e6, 3e6, 2e6], [5.0, 5.0, 5.0], [0.0] * 3])
def test_values_are_drawn_at_the_height_that_the_ticks_give_them(values):
    svg = line_chart([0, 10, 20], [Series("a", "plain", values)], description="d")
    ticks = ticks_of(svg)
    assert 3 <= len(ticks) <= 8
    (low, y_low), (high, y_high) = min(ticks.items()), max(ticks.items())
    for value, (_, y) in zip(values, points_of(svg)[0], strict=True):
        assert y == pytest.approx(y_low + (y_high - y_low) * (value - low) / (high - low), abs=0.6)


def test_a_logarithmic_chart_has_equal_distances_for_equal_factors_and_no_place_for_zero():
    svg = line_chart([0, 1, 2, 3], [Series("a", "plain", [0.01, 1.0, 100.0, 0.0])], description="d", logarithmic=True)
    (line,) = points_of(svg)
    assert len(line) == 3
    assert line[0][1] - line[1][1] == pytest.approx(line[1][1] - line[2][1], abs=0.2)


def test_a_missing_value_leaves_a_gap_and_a_lone_one_is_a_point():
    svg = line_chart(
        list(range(7)), [Series("a", "plain", [1.0, 2.0, None, 3.0, float("nan"), 4.0, 5.0])], description="d"
    )
    assert [len(line) for line in points_of(svg)] == [2, 2]
    assert svg.count("<circle") == 1


def test_a_chart_of_one_step_or_of_nothing_is_possible():
    assert "<circle" in line_chart([4], [Series("a", "plain", [0.5])], description="d")
    assert line_chart([4], [Series("a", "plain", [None])], description="d") == ""
    assert line_chart([], [], description="d") == ""


def test_an_interval_row_spans_its_interval():
    svg = interval_chart([Interval("model <a>", 0.5, 0.25, 1.0, "trusted")], description="d")
    ElementTree.fromstring(svg)
    grid = {0.25 * i: float(x) for i, x in enumerate(re.findall(r'class="grid" x1="([\d.]+)"', svg))}
    bar = re.search(r'class="line trusted" x1="([\d.]+)" x2="([\d.]+)"', svg)
    assert (float(bar[1]), float(bar[2])) == (grid[0.25], grid[1.0])
    assert float(re.search(r'cx="([\d.]+)"', svg)[1]) == grid[0.5]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.99432, "0.994"), (-0.0031, "-0.00310"), (1234.5, "1234"), (1.2e-7, "1.20e-07"), (99.96, "100.0")],
)
def test_numbers_have_three_significant_digits(value, text):
    assert format_value(value) == text
