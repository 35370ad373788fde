"""`tropd study` with real jobs and real servers: nothing is run twice, and the same two servers serve every cell."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e import jobs
from tests.e2e.conftest import paths

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * jobs.LIMIT_S)]


def write_plan(folder: Path, example: Path) -> Path:
    """A plan of one pair, two objectives that work, and one whose run fails."""
    settings = dict(override.split("=", 1) for override in paths(example))
    settings |= {"run.seed": "{seed}", "run.steps": 2, "run.checkpoint_every": 1, "rollout.prompts_per_step": 4}
    settings |= {"rollout.servers": [{}, {}]}
    heldout = folder / "heldout.jsonl"
    heldout.write_text("".join((example / "heldout.jsonl").read_text().splitlines(keepends=True)[:8]))
    wrong = {"objective.kind": "sft", "data.teacher_responses": str(folder / "nowhere.jsonl")}
    plan: dict[str, Any] = {
        "name": "small",
        "title": "A small study",
        "config": str(jobs.CONFIG),
        "runs": str(folder / "runs"),
        "results": str(folder / "results"),
        "page": str(folder / "docs" / "study.md"),
        "images": str(folder / "docs" / "images"),
        "reference": "opd",
        "evaluation": {"prompts": str(heldout), "samples": 2},
        "settings": settings,
        "pairs": {"tiny": {"label": "tiny pair", "settings": {}, "prepare": [f"touch {folder / 'prepared'}"]}},
        "objectives": {
            "opd": {"label": "OPD", "settings": {"objective.kind": "opd"}},
            "wrong": {"label": "wrong", "settings": wrong},
            "fkl": {"label": "forward KL", "settings": {"objective.kind": "gkd", "objective.divergence": "fkl"}},
        },
        "groups": {
            "main": {"label": "One seed", "pairs": ["tiny"], "objectives": ["opd", "wrong", "fkl"], "seeds": [3]}
        },
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(plan, sort_keys=False))
    return path


def study(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tropd_mcore.cli.main", "study", str(path), *options]
    return subprocess.run(
        command, cwd=jobs.REPOSITORY, env=jobs.environment(), capture_output=True, text=True, timeout=jobs.LIMIT_S
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, example: Path) -> Path:
    """The folder of a study that was interrupted during the training of its first objective, and then run."""
    folder = tmp_path_factory.mktemp("study")
    path = write_plan(folder, example)
    command = [sys.executable, "-m", "tropd_mcore.cli.main", "study", str(path)]
    log = folder / "runs" / "tiny-opd-seed3" / "metrics.jsonl"
    process = subprocess.Popen(
        command,
        cwd=jobs.REPOSITORY,
        env=jobs.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + jobs.LIMIT_S
    while not log.is_file() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=jobs.LIMIT_S)
    assert process.returncode == 128 + signal.SIGTERM, err[-2000:]
    assert "Traceback" not in err
    assert [file.name for file in (folder / "results").iterdir()] == ["tiny-before-seed3.json"]
    done = study(path)
    (folder / "out.txt").write_text(done.stdout)
    (folder / "err.txt").write_text(done.stderr)
    (folder / "code.txt").write_text(str(done.returncode))
    return folder


def test_a_failed_run_does_not_stop_the_others_and_is_named_at_the_end(place: Path) -> None:
    assert (place / "code.txt").read_text() == "1", (place / "err.txt").read_text()[-3000:]
    lines = (place / "out.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == [
        "[2 of 4] tiny-opd-seed3",
        "[3 of 4] failed",
        "[4 of 4] tiny-fkl-seed3",
    ]
    assert "tropd train ended with exit code 2" in lines[1] and "nowhere.jsonl" in lines[1]
    assert lines[3] == "1 of 3 runs failed: tiny-wrong-seed3; the same command runs them again"


def test_the_same_servers_serve_every_cell(place: Path) -> None:
    err = (place / "err.txt").read_text()
    assert [err.count(f"rollout server, {number} of 2: starting ") for number in (1, 2)] == [1, 1]
    logs = sorted((place / "runs" / "logs").glob("study-*.log"))
    assert len(logs) == 2 and all("POST /generate" in log.read_text(errors="replace") for log in logs)
    assert not list((place / "runs").glob("tiny-*/logs/*.log")), "no command started a server of its own"


def test_a_result_says_how_to_repeat_it_and_what_came_out(place: Path) -> None:
    found = json.loads((place / "results" / "tiny-fkl-seed3.json").read_text())
    assert [command.split()[:2] for command in found["commands"]] == [
        ["tropd", "train"],
        ["tropd", "eval"],
        ["tropd", "study"],
    ]
    assert "url" not in " ".join(found["commands"]), "the address of a server that is gone is of no use"
    assert found["steps"] == 2 and len(found["accuracy"]["greedy_correct"]) == 8
    assert len(found["curves"]["verifier/accuracy"]) == 2
    assert found["counts"]["student"] > 0
    assert (place / "prepared").is_file()


def test_an_interrupted_run_continued_where_it_was(place: Path) -> None:
    log = (place / "runs" / "tiny-opd-seed3" / "study.log").read_text()
    assert log.count("$ tropd train") == 2
    assert "resum" in log.split("$ tropd train")[2]


def test_what_is_finished_is_not_run_again_and_the_page_is_written(place: Path) -> None:
    begun = time.monotonic()
    listed = study(place / "study.yaml", "--list")
    assert listed.returncode == 0 and listed.stdout.count("done") == 3 and listed.stdout.count("missing") == 1
    assert study(place / "study.yaml", "--missing").stdout == "tiny-wrong-seed3\n"
    again = study(place / "study.yaml", "--only", "tiny-fkl-seed3", "tiny-before-seed3")
    assert (again.returncode, again.stdout) == (0, "")
    assert time.monotonic() - begun < jobs.LIMIT_S
    assert study(place / "study.yaml", "--page").returncode == 0
    page = (place / "docs" / "study.md").read_text()
    assert "| OPD | 1 |" in page and "| forward KL | 1 |" in page
    unknown = study(place / "study.yaml", "--only", "tiny-kto")
    assert unknown.returncode == 2 and "has no cell or group 'tiny-kto'" in unknown.stderr
