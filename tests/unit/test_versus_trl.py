"""The benchmark beside TRL: timings, tables, refusals, and the result file on disk. TRL itself is not needed."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.versus import pair
from benchmarks.versus.limits import swap_two_tokens, trl_printed
from benchmarks.versus.process_tree import Measured, Sample, measure, parse_stat
from benchmarks.versus.settings import DIVERGENCES, Settings, our_config
from benchmarks.versus.tables import BEGIN, END, check_form, read, spread, tables, with_tables
from benchmarks.versus.timings import PARTS, Clock, first_at_target, read_lines, seconds, seconds_per_step
from benchmarks.versus_trl import PAGE, RESULT, Refused, main, trl_versions
from examples.arithmetic.settings import ModelSettings
from tests.tiny_models import write_tiny_model
from tropd_mcore.config.loader import load

SETTINGS = Settings(
    student="s", teacher="t", prompts="p.jsonl", loss="reverse_kl", steps=8, seed=3, threads=1, export_every=4
)


def line(number: int, **phases: float) -> dict[str, float]:
    return {"step": number, **{f"time/{name}": value for name, value in phases.items()}}


LINES = [
    line(0, step=31.0, server=25.0, publish=1.0, rollout=2.0, teacher=1.0, forward_backward=1.5, optimizer=0.25),
    line(1, step=4.0, rollout=1.0, publish=0.5, teacher=0.5, forward_backward=1.0, optimizer=0.25, gates=0.25),
    line(2, step=9.0, checkpoint=3.0, rollout=2.0, teacher=0.5, forward_backward=2.0, optimizer=0.25, pack=1.0),
]


def measured() -> Measured:
    """One CPU-second per second, but two while weights are written (from 45 to 48 s)."""
    timeline = [
        Sample(0.0, 0.0, 10, 0),
        Sample(45.0, 45.0, 30, 20),
        Sample(48.0, 51.0, 40, 0),
        Sample(60.0, 63.0, 90, 90),
    ]
    marks = [Sample(41.0, 41.0), Sample(45.0, 45.0), Sample(54.0, 57.0)]
    return Measured(exit_code=0, marks=marks, timeline=timeline)


def test_the_parts_of_a_step_add_up_without_server_start_and_written_weights() -> None:
    assert seconds(LINES[0]) == {"rollout": 3.0, "teacher": 1.0, "forward_backward": 1.5, "optimizer": 0.25,
                                 "rest": 0.25, "step": 6.0}  # fmt: skip
    found = seconds_per_step(LINES)
    assert found == {
        "rollout": 1.75,
        "teacher": 0.5,
        "forward_backward": 1.5,
        "optimizer": 0.25,
        "rest": 1.0,
        "step": 5.0,
    }
    assert sum(found[part] for part in PARTS) == found["step"]
    with pytest.raises(ValueError, match="expected 2 steps or more, because the first one warms up; found 1"):
        seconds_per_step(LINES[:1])


def test_the_clock_starts_with_the_first_step_and_stops_while_weights_are_written() -> None:
    clock = Clock(LINES, measured())
    assert (clock.start_up.wall_s, clock.start_up.cpu_s) == (35.0, 35.0)
    assert (clock.until(1).wall_s, clock.until(1).cpu_s) == (6.0, 6.0)
    assert (clock.until(3).wall_s, clock.until(3).cpu_s) == (6.0 + 4.0 + 6.0, 57.0 - 35.0 - 6.0)
    assert clock.cpu_s_per_step() == 5.0
    assert clock.peaks() == (40, 20), "what follows the last step is the checkpoint at the end"


def test_a_step_without_a_mark_or_without_seconds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a mark for each of 2 steps, found 3"):
        Clock(LINES[:2], measured())
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in LINES))
    assert read_lines(path) == LINES
    path.write_text(json.dumps({"step": 1, "time/step": 1.0}) + "\n")
    with pytest.raises(ValueError, match=r"line 1: expected step 0 with time/step, found \['step', 'time/step'\]"):
        read_lines(path)


def test_the_target_is_reached_at_the_first_evaluation_that_has_it() -> None:
    evaluations = [{"step": 4, "right": 79, "count": 100}, {"step": 8, "right": 80, "count": 100}]
    assert first_at_target(evaluations, 0.8) == 8
    assert first_at_target(evaluations, 0.81) is None and first_at_target([], 0.5) is None


def test_all_processes_of_a_command_are_measured_and_its_lines_are_timed(tmp_path: Path) -> None:
    """The work is done by a process in a session of its own, whose parent ends before it does."""
    work = "import time; end = time.process_time() + 0.6\nwhile time.process_time() < end: pass"
    launch = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {work!r}], start_new_session=True)"
    program = (
        "import subprocess, sys, time\n"
        f"subprocess.run([sys.executable, '-c', {launch!r}])\n"
        "open('metrics.jsonl', 'w').write('{}\\n')\n"
        "time.sleep(1.6)\n"
    )
    found = measure(
        [sys.executable, "-c", program], watched=tmp_path / "metrics.jsonl", log=tmp_path / "log",
        environment=os.environ, cwd=tmp_path, limit_s=60,
    )  # fmt: skip
    assert found.exit_code == 0 and len(found.marks) == 1
    assert found.timeline[-1].cpu_s >= 0.55, (tmp_path / "log").read_text()
    assert max(sample.rss_bytes for sample in found.timeline) > 2**22
    stopped = measure(
        [sys.executable, "-c", "import time; time.sleep(60)"], watched=tmp_path / "no", log=tmp_path / "log",
        environment=os.environ, cwd=tmp_path, limit_s=0.3,
    )  # fmt: skip
    assert stopped.exit_code is None


def test_the_name_of_a_process_does_not_shift_the_fields_of_its_stat() -> None:
    fields = ["S", "7", *["0"] * 9, "100", "50", "25", "25", *["0"] * 6, "3", "0"]
    found = parse_stat(f"12 (a) b (c) {' '.join(fields)}")
    assert (found.parent, found.cpu_s) == (7, 200 / os.sysconf("SC_CLK_TCK"))
    assert found.rss_bytes == 3 * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("loss", DIVERGENCES)
def test_our_configuration_says_what_the_settings_say(loss: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(our_config(replace(SETTINGS, loss=loss), tmp_path / "run")))
    config = load(path, [])[0]
    assert (config.run.steps, config.run.seed, config.run.checkpoint_every) == (8, 3, 4)
    assert config.objective.full_vocabulary_divergence is not None
    assert config.objective.full_vocabulary_divergence.name == DIVERGENCES[loss][0]
    assert config.optimizer.learning_rate == SETTINGS.learning_rate and not config.data.shuffle
    SETTINGS.write(tmp_path / "settings.json")
    assert Settings.read(tmp_path / "settings.json") == SETTINGS


def python(tmp_path: Path, answer: str) -> str:
    """A program that answers as the Python of some environment."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\necho '{answer}'\n")
    path.chmod(0o755)
    return str(path)


def test_an_environment_without_a_tested_trl_is_refused_with_the_tested_range(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"has no trl \(tested with TRL >= 1.16, < 1.17\); install it with: .* -m pip"):
        trl_versions(python(tmp_path, '{"torch": "2.13.0"}'))
    for wrong in ("0.29.1", "1.15.0", "1.17.0", "2.0"):
        with pytest.raises(Refused, match=f"has trl {wrong} .tested with TRL >= 1.16, < 1.17"):
            trl_versions(python(tmp_path, json.dumps({"trl": wrong})))
    assert trl_versions(python(tmp_path, '{"trl": "1.16.2"}')) == {"trl": "1.16.2"}
    with pytest.raises(Refused, match="expected a Python, found: No such file"):
        trl_versions(str(tmp_path / "nowhere"))


def test_this_environment_is_asked_for_its_versions_like_any_other() -> None:
    with pytest.raises(Refused, match="has no trl"):
        trl_versions(sys.executable)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "--trl-python is missing"),
        (["--trl-python", "p", "--parts", "small,big"], "--parts: expected small, large or limits, found big"),
        (["--trl-python", "p", "--models", "nowhere"], "--models nowhere: expected the folder that"),
        (
            ["--trl-python", "p", "--models", ".", "--student", "him"],
            "--student him: expected a model folder in .",
        ),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_line(
    arguments: list[str],
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["versus_trl", *arguments])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "example.json").write_text("{}")
    assert main() == 2
    assert capsys.readouterr().err.startswith(f"error: {problem}")


def test_the_first_exception_is_kept_and_not_its_consequence() -> None:
    stderr = (
        "[rank1]: Traceback (most recent call last):\n[rank1]: ValueError: no ranks\n"
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n"
    )
    assert trl_printed(1, "", stderr) == "ValueError: no ranks"
    assert trl_printed(1, "", "killed\n") == "killed"
    assert trl_printed(0, "a\ntrained 4 steps\n", "warning") == "trained 4 steps"


def test_two_tokens_of_a_tokenizer_change_places(tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"3": 5, "7": 9, "a": 1}}}))
    swapped = json.loads((swap_two_tokens(folder, tmp_path / "swapped") / "tokenizer.json").read_text())
    assert swapped["model"]["vocab"] == {"3": 9, "7": 5, "a": 1}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student and a teacher with different numbers of padding rows."""
    folder = tmp_path_factory.mktemp("models")
    for role, tied in (("student", True), ("teacher", False)):
        write_tiny_model(folder / role, tied=tied)
        model = AutoModelForCausalLM.from_pretrained(folder / role)
        model.resize_token_embeddings(model.config.vocab_size + (8 if tied else 16))
        model.save_pretrained(folder / role)
    (folder / "example.json").write_text('{"content_hash": "1"}')
    return folder


@torch.no_grad()
def test_a_trimmed_model_has_the_rows_of_the_tokenizer_and_the_same_logits(models: Path, tmp_path: Path) -> None:
    for role in pair.ROLES:
        before = AutoModelForCausalLM.from_pretrained(models / role)
        after = AutoModelForCausalLM.from_pretrained(pair.trim(models, tmp_path) / role)
        rows = len(AutoTokenizer.from_pretrained(tmp_path / role))
        assert after.config.vocab_size == rows < before.config.vocab_size
        ids = torch.arange(rows)[None, :40]
        assert torch.equal(after(ids).logits, before(ids).logits[..., :rows])


def test_folders_made_from_other_models_are_made_again(models: Path, tmp_path: Path) -> None:
    written = (pair.trim(models, tmp_path) / "student" / "config.json").stat().st_mtime_ns
    assert (pair.trim(models, tmp_path) / "student" / "config.json").stat().st_mtime_ns == written
    again = pair.trim(models, tmp_path, student="teacher")
    student, teacher = ((again / role / "model.safetensors").read_bytes() for role in pair.ROLES)
    assert student == teacher


def test_the_fillers_of_the_synthetic_tokenizer_change_no_text(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = ModelSettings(hidden_size=16, num_layers=1, intermediate_size=32, vocab_size=700, tied=True, head_dim=64)
    monkeypatch.setattr(pair, "SYNTHETIC", dict.fromkeys(pair.ROLES, shape))
    folder = pair.synthesize(models, tmp_path) / "student"
    filled, plain = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(models / "student")
    assert len(filled) == 700 == AutoModelForCausalLM.from_pretrained(folder).config.vocab_size
    assert filled.encode("What is 12 + 7?") == plain.encode("What is 12 + 7?")


def result() -> dict[str, Any]:
    """A result of two repetitions of one cell."""
    runs = [
        {
            "pair": "small", "loss": "reverse_kl", "system": system, "repeat": repeat, "start_up": {},
            "seconds": dict.fromkeys(PARTS, 0.25 + repeat) | {"step": 1.25 + repeat}, "cpu_s_per_step": 2.0,
            "rss_bytes": 2**30, "pss_bytes": 2**29, "evaluations": [{"step": 4, "right": 8, "count": 10}],
            "to_target": {"step": 4, "cpu_s": 5.0, "wall_s": 6.0, "cpu_with_start_up_s": 7.0,
                          "wall_with_start_up_s": 8.0} if system == "ours" else None,
        }
        for system in ("ours", "trl") for repeat in (0, 1)
    ]  # fmt: skip
    limit = {"name": "n", "asked": "a | b", "trl": {"printed": "ValueError: no"}, "ours": {"printed": "trained"}}
    return {
        "command": "",
        "machine": {"cores": 2, "processor": "X", "commit": "abc", "date": "2026-11-27"},
        "versions": {"trl": {"trl": "1.16.0", "torch": "2"}, "ours": {"torch": "3"}},
        "settings": {},
        "models": {},
        "target": 0.8,
        "student": "student",
        "before": {"student": {"right": 4, "count": 9}, "teacher": {"right": 8, "count": 9}},
        "runs": runs,
        "limits": [limit],
        "same_loss": [
            {
                "loss": "reverse_kl",
                "ours": {"loss": 0.5, "gradient_norm": 1.0},
                "trl": {"loss": 0.25, "gradient_norm": 2.0},
            }
        ],
    }


def test_the_tables_show_medians_with_their_range_and_a_target_that_was_not_reached() -> None:
    shown = tables(result())
    assert "2 cores of X, commit abc, 2026-11-27; TRL 1.16.0 with torch 2, tropd_mcore with torch 3." in shown
    assert "student 4 of 9, teacher 8 of 9." in shown
    assert "| reverse KL | tropd_mcore | 2 of 2 | 4 (4 to 4) | 5 (5 to 5) | 6 (6 to 6) |" in shown
    assert "| reverse KL | TRL | 0 of 2 | - | - |" in shown
    assert "| small | reverse KL | TRL | 0.75 | 0.75 | 0.75 | 0.75 | 0.75 | 1.75 (1.25 to 2.25) | 2 (2 to 2) |" in shown
    assert "| reverse KL | 0.5 | 0.25 | 1 | 2 |" in shown
    assert "| a \\| b | `ValueError: no` | `trained` |" in shown
    assert spread([3.0, 1.0, 200.0]) == "3 (1 to 200)"


def test_a_result_of_another_form_is_refused() -> None:
    wrong = result()
    del wrong["runs"][0]["rss_bytes"]
    with pytest.raises(ValueError, match="in runs, found no rss_bytes"):
        check_form(wrong)
    wrong = result()
    wrong["runs"][0]["seconds"].pop("teacher")
    with pytest.raises(ValueError, match=r"found none of \['teacher'\]"):
        check_form(wrong)
    wrong = result()
    wrong["runs"].pop()
    with pytest.raises(ValueError, match="as many runs of each trainer, found {'ours': 2, 'trl': 1}"):
        check_form(wrong)
    with pytest.raises(ValueError, match="once each in the page, found 0 and 1"):
        with_tables(f"text {END}", result())


def test_the_page_has_the_tables_of_the_result_on_disk() -> None:
    text = PAGE.read_text()
    assert text.count(BEGIN) == text.count(END) == 1, "the place of the tables"
    if RESULT.exists():
        assert with_tables(text, read(RESULT)) == text, "run: python -m benchmarks.versus_trl --docs"
