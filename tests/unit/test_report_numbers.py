"""The numbers of the report, recomputed from metrics.jsonl independently of the report."""

import json
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest

from tests.report_run import page_of, result_of, write_run
from tropd_mcore.evaluation.headline import comparable_windows, sentences
from tropd_mcore.evaluation.run_records import read_run

STEPS = 50


def write_metrics(run: Path, prefix: np.ndarray, **series: np.ndarray) -> None:
    with (run / "metrics.jsonl").open("w") as stream:
        for step, length in enumerate(prefix):
            values = {name.replace("__", "/"): float(values[step]) for name, values in series.items()}
            stream.write(json.dumps({"step": step, "guidance/prefix_length": float(length), **values}) + "\n")


@pytest.fixture
def run_dir(tmp_path) -> Path:
    return write_run(tmp_path)


def tile(page: str, title: str) -> tuple[str, str]:
    found = re.search(rf'<div class="tile"><span>{title}</span><b>(.*?)</b><small>(.*?)</small>', page)
    return unescape(found[1]), unescape(found[2])


def lines_of(page: str, title: str) -> dict[str, list[float | None]]:
    figure = re.search(rf"<h3>{title} .*?</figure>", page)[0]
    plot = json.loads(unescape(re.search(r'data-plot="([^"]*)"', figure)[1]))
    return {line["label"]: line["values"] for line in plot["lines"]}


def test_tiles_compare_only_windows_of_the_same_prefix_length(run_dir):
    """Trust falls as the prefix shrinks but rises at each length. Comparing first with last would look like a loss."""
    generator = np.random.default_rng(0)
    prefix = np.array([30.0] * 10 + [20.0] * 5 + [0.0] * 35)
    trust = generator.random(STEPS)
    write_metrics(run_dir, prefix, trust__fraction=trust, log_ratio__mean=-trust)
    page = page_of(run_dir)
    value, note = tile(page, "Trusted tokens")
    assert value == f"{np.mean(trust[15:20]):.1%} → {np.mean(trust[45:50]):.1%}"
    assert note == "steps 15 to 19 → steps 45 to 49, prefixes of about 0 tokens in both"
    value, _ = tile(page, "Mean log-ratio")
    assert value == f"{-np.mean(trust[15:20]):+.3f} → {-np.mean(trust[45:50]):+.3f}"


def test_a_tile_without_a_comparable_window_says_so(run_dir):
    prefix = np.linspace(40, 0, STEPS)
    accuracy = np.linspace(1.0, 0.7, STEPS)
    write_metrics(run_dir, prefix, verifier__accuracy=accuracy)
    value, note = tile(page_of(run_dir), "Right rollouts")
    assert value == f"{accuracy[45:].mean():.1%}" and "→" not in value
    assert note == "steps 45 to 49, prefixes of 1.6 tokens; not comparable with the start (38.4 tokens given)"


def test_tiles_of_a_run_without_guidance_compare_from_its_first_step_on(run_dir):
    trust = np.linspace(0.5, 0.9, STEPS)
    write_metrics(run_dir, np.zeros(STEPS), trust__fraction=trust)
    value, note = tile(page_of(run_dir), "Trusted tokens")
    assert value == f"{trust[:5].mean():.1%} → {trust[45:].mean():.1%}" and note.startswith(
        "steps 0 to 4 → steps 45 to 49"
    )


def test_the_windows_of_a_tile_never_overlap(run_dir):
    for count in (1, 2, 3, 19, 20, 21):
        write_metrics(run_dir, np.zeros(count), trust__fraction=np.zeros(count))
        windows = comparable_windows(read_run(run_dir, token_steps=0))
        assert windows.last.stop == count
        assert (windows.first is None) == (count == 1)
        assert windows.first is None or windows.first.stop <= windows.last.start


def test_the_points_of_the_curves_are_the_values_of_the_metrics_file(run_dir):
    generator = np.random.default_rng(1)
    tv, trust, rate = generator.random(STEPS), generator.random(STEPS), 1e-4 * generator.random(STEPS)
    write_metrics(run_dir, np.zeros(STEPS), trust__fraction=trust, trust__tv=tv, optimizer__learning_rate=rate)
    page = page_of(run_dir)
    lines = lines_of(page, "Trust")
    assert lines["trusted"] == pytest.approx(trust, rel=1e-4) and lines["1 - TV"] == pytest.approx(1 - tv, rel=1e-4)
    assert lines_of(page, "Learning rate")["learning rate"] == pytest.approx(rate, rel=1e-4)


def test_the_summary_starts_with_held_out_accuracy_and_claims_no_more_than_its_interval(run_dir):
    page = page_of(run_dir)
    value, note = tile(page, "Held-out accuracy")
    assert value == f"{10 / 40:.1%} → {30 / 40:.1%}" and note.endswith("10 of 40, then 30 of 40")
    assert page.index("<span>Held-out accuracy") < page.index("<span>Trusted tokens")

    def words(after: int) -> str:
        result_of(str(run_dir / "export"), after).save(run_dir / "evaluation_after.json")
        return " ".join(sentences(read_run(run_dir, token_steps=0)))

    assert "The student is better than before" in words(30)
    assert "neither better nor worse beyond chance" in words(11)
    assert "The student is worse than before" in words(0)
    (run_dir / "evaluation_after.json").unlink()
    assert "is unknown" in " ".join(sentences(read_run(run_dir, token_steps=0)))


def test_the_summary_states_measured_progress_and_problems(run_dir):
    write_metrics(
        run_dir,
        np.zeros(20),
        rollout__truncated=np.full(20, 0.25),
        teacher__masked_samples=np.array([2.0] + [0.0] * 19),
        gates__sampler_off=np.array([0.0] * 17 + [1.0, 2.0, 3.0]),
    )
    text = (run_dir / "config.resolved.yaml").read_text()
    (run_dir / "config.resolved.yaml").write_text(text.replace("steps: 3", "steps: 100"))
    words = " ".join(sentences(read_run(run_dir, token_steps=0)))
    for sentence in (
        "20 of 100 steps are done. The run is still going, or it was stopped.",
        "25.0% of the responses in steps 18 to 19 were cut by the token budget.",
        "2 samples were left out because the teacher gave no scores for them.",
        "In 3 steps, sampler and trainer differed by more than the bounds of the gate.",
    ):
        assert sentence in words
