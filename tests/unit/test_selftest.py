"""`tropd selftest`: checks that fail or lie are told in one line, with a log, and nothing is left running."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tropd_mcore.cli import main as cli
from tropd_mcore.selftest import checks, material
from tropd_mcore.selftest.checks import CHECKS, Check, Failed, Outcome, Place, execute, run_all
from tropd_mcore.selftest.report import markdown

LINE = {
    "loss/total": 0.5, "optimizer/grad_norm": 1.5, "time/step": 2.0, "time/publish": 0.1,
    "engine/difference_p99": 1e-6, "engine/difference_mean": 1e-7,
}  # fmt: skip
COMPARED = {"mean": 1e-6, "largest": 2e-6, "tokens": 127}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """The folder of a selftest whose job has ended well."""
    run = tmp_path / "run"
    for folder, content in ((tmp_path / "student", b"before"), (run / "export", b"after")):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(content)
    (run / "metrics.jsonl").write_text("".join(json.dumps(LINE) + "\n" for _ in range(material.STEPS)))
    (run / "model_checks.json").write_text(json.dumps(dict.fromkeys(("student.path", "teacher.path"), COMPARED)))
    (tmp_path / "job.log").write_text("20:00:00 I rollout.server: ready on http://127.0.0.1:4 after 18.5 s\n")
    return Place(tmp_path, "cpu", 2)


def run(name: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> str:
    """The line of one check, whose command is taken to have ended well."""
    monkeypatch.setattr(checks, "execute", lambda *arguments: None)
    check = next(check for check in CHECKS if check.name == name)
    return check.run(place, check, place.folder / f"{name}.log")[0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("job", "2 steps on 2 ranks, loss 0.500, gradient norm 1.5"),
        ("reading", "2.0e-06 (maximum) over 127 tokens"),
        ("server", "started in 18.5 s"),
        ("weights", "differ by 1.0e-07 nats (mean), 1.0e-06 (99th percentile)"),
    ],
)
def test_a_job_that_ended_well_passes_with_its_figures(
    place: Place, name: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert words in run(name, place, monkeypatch)


def lines(**changes: Any) -> str:
    return "".join(json.dumps(LINE | changes) + "\n" for _ in range(material.STEPS))


@pytest.mark.parametrize(
    ("name", "file", "content", "said"),
    [
        ("job", "run/metrics.jsonl", json.dumps(LINE) + "\n", "expected 2 steps"),
        ("job", "run/metrics.jsonl", lines(**{"loss/total": math.nan}), "finite losses"),
        ("job", "run/metrics.jsonl", lines(**{"optimizer/grad_norm": 0.0}), "finite losses and gradients"),
        ("job", "run/metrics.jsonl", "{", "metrics.jsonl cannot be read"),
        ("reading", "run/model_checks.json", json.dumps({"student.path": COMPARED}), "expected student and teacher"),
        ("reading", "run/model_checks.json", "", "cannot be read"),
        ("server", "job.log", "20:00:00 I rollout.server: starting\n", "does not say when"),
        ("weights", "run/metrics.jsonl", lines(**{"engine/difference_p99": None}), "were not compared"),
        ("weights", "run/export/model.safetensors", "before", "nothing was trained"),
        ("collectives", "collectives.log", "some warning\n", "ended without a result"),
        (
            "collectives",
            "collectives.log",
            'result: {"ranks": 1, "gigabytes_per_second": 9}',
            "1 ranks took part, not 2",
        ),
        ("loss", "loss.json", json.dumps({"cells": []}), "miss their tolerance"),
        ("loss", "loss.json", json.dumps({"cells": [{"status": "ok"}, {"status": "miss"}]}), "1 of 2 comparisons"),
    ],
)
def test_processes_that_end_well_without_the_numbers_fail_the_check(
    place: Place, name: str, file: str, content: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place.folder / file).write_text(content)
    with pytest.raises(Failed, match=said):
        run(name, place, monkeypatch)


def check(name: str, code: str, *, limit_s: float = 60.0, needs: tuple[str, ...] = ()) -> Check:
    def execute_code(_place: Place, this: Check, written: Path) -> tuple[str, dict[str, float | str]]:
        execute([sys.executable, "-c", code], written, this.limit_s)
        return "fine", {}

    return Check(name, name, limit_s, execute_code, needs)


def test_a_failed_check_stops_only_those_that_need_it_and_keeps_the_end_of_its_log(tmp_path: Path) -> None:
    plan = (
        check("first", "print('told'); raise ValueError('broken')"),
        check("second", "", needs=("first",)),
        check("third", ""),
    )
    first, second, third = run_all(Place(tmp_path, "cpu", 2), plan)
    assert (first.status, first.detail) == ("FAIL", "exit code 1: ValueError: broken") and "told" in first.log_tail
    assert (second.status, second.detail) == ("skip", "not run, because first did not pass")
    assert third.status == "ok"


def test_a_hanging_check_ends_with_its_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with a child that ignores SIGTERM, like a server that is stuck."""
    monkeypatch.setattr(checks, "STOP_S", 0.5)
    child = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    )
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]); print(p.pid); p.wait()"
    (outcome,) = run_all(Place(tmp_path, "cpu", 2), (check("stuck", code, limit_s=5.0),))
    assert outcome.status == "FAIL" and outcome.detail.startswith("did not end in 5 s")
    pids = [int(text) for text in (tmp_path / "stuck.log").read_text().split() if text.isdigit()]
    deadline = time.monotonic() + 60
    while any(map(_lives, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_every_check_that_is_needed_comes_earlier() -> None:
    for index, one in enumerate(CHECKS):
        assert set(one.needs) <= {earlier.name for earlier in CHECKS[:index]}


def test_the_report_names_what_failed_and_holds_no_secret_and_no_path(place: Place) -> None:
    outcomes = [
        Outcome("loss", "ok", "fine", 2.0),
        Outcome("job", "FAIL", "exit | 2", 3.0, log_tail=f"{place.folder}/x"),
    ]
    (place.run_dir / "logs").mkdir()
    (place.run_dir / "logs" / "rollout.log").write_text("the server's last words\n")
    environ = {
        "HOME": "/home/someone",
        "HF_TOKEN": "hf_secret",
        "NCCL_DEBUG": "INFO",
        "LD_LIBRARY_PATH": "/home/someone/l",
    }
    page = markdown(outcomes, place, 5.0, environ)
    assert page.startswith("# tropd selftest\n\nFAILED: job, in 5 s, on cpu")
    assert "| job | FAIL | 3.0 | exit \\| 2 |" in page and "$WORK/x" in page and "the server's last words" in page
    assert "NCCL_DEBUG=INFO" in page and "LD_LIBRARY_PATH=~/l" in page
    assert "hf_secret" not in page and str(place.folder) not in page


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["my.yaml"], "takes KEY=VALUE and no configuration file, found 'my.yaml'"),
        (["--device", "cuda"], "sees no GPU"),
        (["--keep", "."], "--keep .: expected a folder that does not exist yet"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["selftest", *arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert said in line


@pytest.mark.parametrize("failing", [False, True])
def test_the_command_writes_the_report_says_where_and_leaves_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, failing: bool
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(checks, "CHECKS", (check("only", "raise SystemExit(3)" if failing else ""),))
    report = tmp_path / "report.md"
    assert cli.main(["selftest", "--out", str(report)]) == int(failing)
    last = capsys.readouterr().out.splitlines()[-1]
    assert ("did not pass: only" in last) == failing and last.endswith(f"report: {report}")
    assert report.read_text().startswith("# tropd selftest") and os.listdir(tmp_path / "temporary") == []


@pytest.fixture
def lying_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An all-reduce that adds one, in every process that is started from here."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if 'TORCHELASTIC_RUN_ID' in os.environ:\n"
        "    import torch.distributed as dist\n"
        "    right = dist.all_reduce\n"
        "    def wrong(tensor, *rest, **more):\n"
        "        right(tensor, *rest, **more); tensor += 1\n"
        "    dist.all_reduce = wrong\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))


def outcome_of_collectives(folder: Path) -> Outcome:
    (outcome,) = run_all(Place(folder, "cpu", 2), [check for check in CHECKS if check.name == "collectives"])
    return outcome


def test_two_ranks_sum_right_and_the_speed_is_told(tmp_path: Path) -> None:
    outcome = outcome_of_collectives(tmp_path)
    assert outcome.status == "ok", outcome.log_tail
    assert outcome.detail.startswith("gloo between 2 ranks: sums are right, 64 MiB all-reduced at")


@pytest.mark.usefixtures("lying_torch")
def test_a_wrong_sum_is_found(tmp_path: Path) -> None:
    outcome = outcome_of_collectives(tmp_path)
    assert outcome.status == "FAIL" and outcome.detail == "WrongSum: all_reduce over 2 ranks gave 4.0, not 3.0"
