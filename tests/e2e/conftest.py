"""The tiny example, built once, and one finished run of it with which several tests compare."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e import jobs

STEPS, HELD_OUT = 6, 7


@pytest.fixture(scope="session")
def example() -> Path:
    """Folder of the tiny example. It is kept between test runs and rebuilt when its code changes."""
    folder = jobs.REPOSITORY / "models" / "arithmetic-tiny"
    folder.parent.mkdir(exist_ok=True)
    with (folder.parent / ".tiny.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run(
            [sys.executable, "-m", "examples.make_models", str(folder), "--tiny"],
            cwd=jobs.REPOSITORY,
            env=jobs.environment(),
            check=True,
            timeout=jobs.LIMIT_S,
        )
        subprocess.run(
            [
                *[sys.executable, "-m", "tropd_mcore.cli.main", "prefixes", str(jobs.CONFIG), *paths(folder)],
                *["--max-new-tokens", "48", f"run.dir={folder / 'prefixes'}"],
            ],
            cwd=jobs.REPOSITORY,
            env=jobs.environment(),
            check=True,
            timeout=jobs.LIMIT_S,
        )
    return folder


def paths(example: Path) -> list[str]:
    """Overrides that name the files of an example."""
    return [
        f"student.path={example / 'student'}",
        f"teacher.path={example / 'teacher'}",
        f"data.prompts={example / 'train.jsonl'}",
        f"data.teacher_responses={example / 'teacher_responses.jsonl'}",
    ]


def held_out(example: Path, folder: Path) -> str:
    """Override that measures held-out prompts with the teacher's responses to other prompts, which fit as well."""
    prompts, responses = (
        [json.loads(line) for line in (example / name).read_text().splitlines()]
        for name in ("heldout.jsonl", "teacher_responses.jsonl")
    )
    lines = [{**response, "id": prompt["id"]} for prompt, response in zip(prompts[:HELD_OUT], responses, strict=False)]
    path = folder / "heldout_responses.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    keys = f"prompts: {example / 'heldout.jsonl'}, responses: {path}, every: 4, limit: {HELD_OUT}, topk: 16"
    return f"held_out={{{keys}}}"


@pytest.fixture(scope="session")
def settings(example: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that turn the quickstart's configuration into a short run of the tiny example."""
    return [
        *paths(example),
        held_out(example, tmp_path_factory.mktemp("held_out")),
        f"run.steps={STEPS}",
        "run.checkpoint_every=2",
        "rollout.prompts_per_step=8",
    ]


@pytest.fixture(scope="session")
def finished_run(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of an uninterrupted run at TP=2."""
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    jobs.run(run_dir, *settings)
    return run_dir
