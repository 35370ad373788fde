"""The report as a page: self-contained, consistent with the run's files, and explicit about missing data."""

import base64
import hashlib
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.report_run import Tree, page_of, result_of, section, write_run
from tropd_mcore.cli.main import main
from tropd_mcore.errors import DataError
from tropd_mcore.evaluation.chart_catalogue import CHARTS, PHASES
from tropd_mcore.evaluation.metrics_view import MetricNote
from tropd_mcore.monitor.catalogue import METRICS


@pytest.fixture
def run_dir(tmp_path) -> Path:
    return write_run(tmp_path)


def test_the_report_is_well_formed_and_self_contained(run_dir):
    page = page_of(run_dir)
    Tree(page)
    outside = page.replace("http://www.w3.org/2000/svg", "")  # the XML namespace of SVG, not a link
    assert not re.search(r"https?:|url\(|<link|<img|@import|\bsrc=|fetch\(|XMLHttp|import\(|localStorage", outside)
    charts = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    for svg in charts:
        ElementTree.fromstring(svg)
    assert len(charts) > len(CHARTS)


def test_the_content_security_policy_allows_only_the_hashes_of_the_reports_script_and_style(run_dir):
    page = page_of(run_dir)
    policy = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', page)[1]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "*" not in policy
    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not re.search(r"<[^>]* (style|on\w+)=", page), "what the policy forbids would be ignored"


def test_names_and_texts_of_the_run_are_escaped_in_the_report(run_dir):
    page = page_of(run_dir)
    assert "<h1>run &lt;1&gt;</h1>" in page and "run <1>" not in page
    evil = '</script><script>alert(1)</script><img src=x onerror="x">'
    config = run_dir / "config.resolved.yaml"
    config.write_text(config.read_text() + f"rollout:\n  top_p: '{evil}'\n")
    metrics = run_dir / "metrics.jsonl"
    lines = [{**json.loads(line), evil: 1.0, f"time/{evil}": 1.0} for line in metrics.read_text().splitlines()]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = page_of(run_dir)
    Tree(page)
    assert evil not in page and page.count("<script>") == 1 and "<img" not in page


def test_the_same_run_gives_the_same_report(run_dir):
    assert page_of(run_dir) == page_of(run_dir)


def test_the_terms_of_the_report_are_defined_on_it(run_dir):
    text = section(page_of(run_dir), "Curves")
    for word in ("p, q", "log-ratio r", "trusted", "outlier", "prefix", "TV", "entropy H"):
        assert f"<dt>{word}</dt><dd>" in text
    assert "docs/method.md" in text


def test_every_metric_of_a_chart_is_in_the_catalogue():
    known = {metric.name for metric in METRICS}
    assert {line.metric for chart in CHARTS for line in chart.lines} <= known
    lines = [chart.lines for chart in CHARTS]
    assert all(not parts[0].only_other for parts in lines), "there is no line before the first"
    drawn = {line.metric for part in lines for line in part}
    assert {"optimizer/learning_rate", "loss/objective", "loss/total"} <= drawn


def test_the_phases_named_in_the_report_are_those_of_the_trainer():
    sources = (Path(__file__).parents[2] / "tropd_mcore").rglob("*.py")
    phases = {name for path in sources for name in re.findall(r'clock\.phase\("(\w+)"\)', path.read_text())}
    assert set(PHASES) <= phases


def test_a_metric_without_values_is_named_and_not_drawn(run_dir):
    curves = section(page_of(run_dir), "Curves")
    assert "Not measured in this run: " not in curves  # verifier/unfinished is there
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["verifier/unfinished"] = None
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves = section(page_of(run_dir), "Curves")
    assert "Not measured in this run: right answers of the rollouts." in curves
    assert "<h3>Right answers of the rollouts" not in curves


def with_times(run_dir: Path, **changes) -> None:
    lines = []
    for step in range(10):
        times = {f"time/{name}": value(step) for name, value in changes.items() if value(step) is not None}
        lines.append(json.dumps({"step": step, "time/step": 10.0, "time/rollout": 6.0, **times}) + "\n")
    (run_dir / "metrics.jsonl").write_text("".join(lines))


def test_every_phase_of_a_run_is_drawn_except_those_with_only_noise(run_dir):
    """Two milliseconds in some steps were once dots and dashes of a phase `student before`."""
    with_times(
        run_dir,
        student=lambda step: 0.002 if step % 3 == 0 else None,
        checkpoint=lambda step: 2.0 if step == 9 else None,
        publish=lambda step: 1.0,
        something_new=lambda step: 0.5,
    )
    figure = re.search(r"<figure><figcaption><h3>Seconds by phase.*?</figure>", section(page_of(run_dir), "Curves"))[0]
    for name in ("rollouts", "checkpoint", "publication of weights", "something new"):
        assert name in figure
    assert "student before" not in figure and figure.count("<circle") == 1
    bars = re.search(r"<h3>Where the time went.*?</figure>", section(page_of(run_dir), "Curves"))[0]
    for text in ("rollouts", "60.0% · 6 s", "10.0% · 1 s", "2.0% · 2 s in 1 steps", "not in a phase", "23.0%"):
        assert f">{text}<" in bars
    table = section(page_of(run_dir), "All metrics")
    assert "<code>time/student</code>" in table


def test_every_metric_is_in_the_table_with_its_meaning(run_dir):
    notes = {metric.name: MetricNote(metric.unit, metric.over, metric.description) for metric in METRICS}
    table = section(page_of(run_dir, notes=notes), "All metrics")
    for metric in METRICS:
        assert f"<code>{metric.name}</code>" in table
    row = re.search(r"<tr><th><code>trust/tv</code>.*?</tr>", table)[0]
    assert "total variation" in row
    assert "<td>0.250</td><td>2.25</td><td>0.250</td><td>2.25</td><td>1.25</td><td>3</td>" in row
    assert "<td>&ndash;</td>" in re.search(r"<tr><th><code>verifier/accuracy</code>.*?</tr>", table)[0]


def test_evaluations_are_named_ordered_and_compared(run_dir):
    text = section(page_of(run_dir), "Held-out accuracy")
    positions = [text.index(name) for name in ("student before", "student after (export)", "teacher")]
    assert positions == sorted(positions)
    assert "+50.0 points" in text and "+72.5 points" in text


def test_evaluations_that_cannot_be_compared_are_marked_as_such(run_dir):
    result_of(str(run_dir / "export"), 30, prompts="other").save(run_dir / "evaluation_after.json")
    page = page_of(run_dir)
    text = section(page, "Held-out accuracy")
    assert "not comparable" in text and "+50.0" not in text
    assert "were measured differently" in page and "The student is better" not in page


def test_the_report_shows_every_setting_with_its_value(run_dir):
    text = section(page_of(run_dir), "Settings")
    for key, value in (("run.seed", "0"), ("objective.guidance.enabled", "yes"), ("objective.kind", "tropd")):
        assert f"<th>{key}</th><td>{value}</td>" in text
    assert "seed: 0  # default" in text


def test_the_report_of_a_run_that_has_just_started_lists_what_is_missing(tmp_path):
    (tmp_path / "config.resolved.yaml").write_text("run:\n  steps: 3\n")
    page = page_of(tmp_path)
    Tree(page)
    for words in ("No step has been logged", "No evaluation", "There is no metrics.jsonl", "No step has both"):
        assert words in page


def test_the_report_of_a_run_with_only_evaluations_shows_them(tmp_path):
    result_of("m", 10).save(tmp_path / "evaluation_before.json")
    assert "10 of 40" in section(page_of(tmp_path), "Held-out accuracy")


def test_a_report_of_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"found none of config\.resolved\.yaml, metrics\.jsonl, evaluation_\*\.json"):
        page_of(tmp_path)
    with pytest.raises(DataError, match="found no folder"):
        page_of(tmp_path / "missing")


def test_a_metrics_line_cut_by_a_crash_is_skipped_and_a_damaged_one_is_an_error(run_dir):
    path = run_dir / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 3, "loss/tru')
    assert "over 3 steps" in page_of(run_dir)
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(DataError, match=r"metrics\.jsonl:1: expected a JSON object with `step`"):
        page_of(run_dir)


@pytest.mark.parametrize("text", [b"run: [1", b"\xff\xfe"])
def test_a_damaged_configuration_gives_a_one_line_error(run_dir, text):
    (run_dir / "config.resolved.yaml").write_bytes(text)
    with pytest.raises(DataError, match=r"config\.resolved\.yaml: cannot be read as") as caught:
        page_of(run_dir)
    assert "\n" not in str(caught.value)


def test_the_out_option_writes_nothing_into_the_run_directory(run_dir, tmp_path, capsys):
    before = sorted(run_dir.rglob("*"))
    out = tmp_path / "page.html"
    assert main(["report", str(run_dir), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n" and "<h2>Curves</h2>" in out.read_text()
    assert sorted(run_dir.rglob("*")) == before


@pytest.mark.parametrize(
    ("out", "words"), [(".", "found the folder"), ("run <1>/metrics.jsonl/c.html", "set --out to a place")]
)
def test_an_output_that_cannot_be_written_gives_a_one_line_error_that_names_the_option(
    run_dir, tmp_path, capsys, out, words
):
    assert main(["report", str(run_dir), "--out", str(tmp_path / out)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert words in line and "--out" in line


def test_several_runs_are_compared_in_one_report(run_dir, tmp_path):
    other = write_run(tmp_path, "other")
    config = other / "config.resolved.yaml"
    config.write_text(config.read_text().replace("seed: 0", "seed: 7"))
    lines = (other / "metrics.jsonl").read_text().splitlines()[:2]
    (other / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page = page_of(run_dir, compare=[other])
    Tree(page)
    chart = re.search(r"<figure><figcaption><h3>Trust .*?</figure>", page)[0]
    for run in ("run &lt;1&gt;", "other"):
        for line in ("trusted", "1 - TV"):
            assert f"{run}: {line} " in chart
    lengths = [len(points.split()) for points in re.findall(r'points="([^"]*)"', chart)]
    assert sorted(lengths) == [2, 2, 3, 3]
    differing = section(page, "Settings that differ")
    assert "<tr><th>run.seed</th><td>0</td><td>7</td></tr>" in differing
    assert "student.path" not in differing.split("<details>")[0]
    assert page.count("25.0% → 75.0%") == 2 and "<h2>Rollouts of run &lt;1&gt;</h2>" in page


def test_runs_of_the_same_name_are_distinguished_and_the_same_run_twice_is_refused(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "again" / run_dir.name)
    page = page_of(run_dir, compare=[tmp_path / "again" / run_dir.name])
    assert "again/run &lt;1&gt;" in page
    with pytest.raises(DataError, match="named twice"):
        page_of(run_dir, compare=[run_dir])
    with pytest.raises(DataError, match="at most 5 runs"):
        page_of(run_dir, compare=[tmp_path / str(index) for index in range(6)])


def test_the_report_of_a_long_run_has_a_bounded_size_and_says_what_it_omits(run_dir):
    (first, *_) = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    names = [name for name in first if name != "step"]

    def write(count: int) -> int:
        with (run_dir / "metrics.jsonl").open("w") as stream:
            for step in range(count):
                values = {name: 0.5 + (step * 7919 + index) % 1000 / 3000 for index, name in enumerate(names)}
                stream.write(json.dumps({"step": step, **values}) + "\n")
        page = page_of(run_dir)
        if count > 800:
            assert f"Each chart draws about 800 of the {count} steps" in page
        return len(page)

    assert write(4000) < 1.3 * write(1600) < 3_000_000
