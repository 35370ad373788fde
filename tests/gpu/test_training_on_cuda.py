"""`tropd train` on a GPU: replayed rollouts, a Megatron teacher, bfloat16; killed in the middle, it resumes."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.e2e import jobs, replayed

HAS_ENGINE = importlib.util.find_spec("transformer_engine") is not None
LIMIT_S = 240.0
pytestmark = [
    pytest.mark.skipif(
        not (torch.cuda.is_available() and HAS_ENGINE), reason="needs a GPU, and Transformer Engine for PyTorch"
    ),
    pytest.mark.timeout(3 * LIMIT_S),
]
STEPS, KILLED_AFTER = 8, 3
ON_GPU = [
    "platform.kind=cuda",
    "parallel.tensor=1",
    "student.dtype=bfloat16",
    "teacher.dtype=bfloat16",
    "objective={kind: tropd, outlier: {topk: 9}, guidance: {enabled: false}}",
    "optimizer.learning_rate=1.0e-4",
    "optimizer.overlap_grad_reduce=true",
    "optimizer.overlap_param_gather=true",
    "gates.longest_sequence=true",
    "run.checkpoint_every=2",
    "run.export_at_end=true",
]
EXACTLY = ("tokens/", "optimizer/learning_rate", "optimizer/token_count")


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> replayed.Stage:
    return replayed.set_stage(tmp_path_factory.mktemp("stage"), steps=STEPS, dtype=torch.bfloat16)


def environment() -> dict[str, str]:
    """That of a user; where this interpreter finds its packages, the job finds them."""
    return jobs.environment(PYTHONPATH=os.pathsep.join([str(jobs.REPOSITORY), os.environ.get("PYTHONPATH", "")]))


@contextlib.contextmanager
def job(stage: replayed.Stage, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """The command of a user, with its output in <run>.log; killed at the end if it still runs."""
    run = stage.run(name)
    run.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tropd_mcore.cli.main", "train", str(stage.config), f"run.dir={run}", *ON_GPU]
    with run.with_suffix(".log").open("ab") as log:
        process = subprocess.Popen(
            command, env=environment(), stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            jobs.kill(process)


def finish(stage: replayed.Stage, name: str) -> Path:
    """Run a job to its end; returns its run directory."""
    with job(stage, name) as process:
        code = process.wait(LIMIT_S)
    output = stage.run(name).with_suffix(".log").read_text(errors="replace")
    assert code == 0, output[-8000:]
    print(output[-3000:])
    return stage.run(name)


@pytest.fixture(scope="module")
def whole(stage: replayed.Stage) -> Path:
    """The run that nothing disturbed."""
    return finish(stage, "whole")


def test_every_step_has_finite_numbers_and_the_export_is_a_model_that_moved(whole: Path, stage: replayed.Stage) -> None:
    lines = jobs.metrics(whole)
    assert [line["step"] for line in lines] == list(range(STEPS))
    for line in lines:
        assert math.isfinite(line["loss/total"]) and 0.0 < line["optimizer/grad_norm"] < 100.0
    before = AutoModelForCausalLM.from_pretrained(stage.model("student"), dtype=torch.bfloat16).state_dict()
    after = AutoModelForCausalLM.from_pretrained(whole / "export", dtype=torch.bfloat16).state_dict()
    assert before.keys() == after.keys()
    assert all(weight.isfinite().all() for weight in after.values())
    moved = [name for name, weight in before.items() if not torch.equal(weight, after[name])]
    assert len(moved) > len(before) // 2


def test_a_killed_run_resumes_with_the_curve_of_the_one_that_was_not(
    whole: Path, stage: replayed.Stage, record_property: Callable[[str, object], None]
) -> None:
    run = stage.run("killed")
    with job(stage, "killed") as process:
        deadline = time.monotonic() + LIMIT_S
        while len(jobs.metrics(run)) < KILLED_AFTER:
            assert process.poll() is None and time.monotonic() < deadline, "it ended, or did not begin"
            time.sleep(0.01)
        jobs.kill(process)
    done = len(jobs.metrics(run))
    assert done < STEPS, "it was too late to kill it"
    finish(stage, "killed")
    expected, found = jobs.curve(whole), jobs.curve(run)
    assert [line["step"] for line in found] == list(range(STEPS))
    record_property("killed after", done)
    record_property("bit for bit", expected == found)
    far: list[Any] = []
    for line, reference in zip(found, expected, strict=True):
        assert line.keys() == reference.keys()
        for name, value in reference.items():
            tolerance = 0.0 if name.startswith(EXACTLY) else 0.02
            if isinstance(value, float) and not math.isclose(line[name], value, rel_tol=tolerance, abs_tol=tolerance):
                far.append((line["step"], name, line[name], value))
    assert not far
