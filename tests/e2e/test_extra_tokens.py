"""Whole jobs with a teacher that only adds tokens: refused with the key, or trained without them and counted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tests.e2e import jobs, replayed
from tests.e2e.replayed import Stage
from tests.ranks import run_on_ranks
from tropd_mcore.errors import DataError

TOPK = 9
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3 * replayed.JOB_LIMIT_S)]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """The teacher `further` has names for some of the ids that are padding in `teacher`."""
    stage = replayed.set_stage(tmp_path_factory.mktemp("stage"))
    shutil.copytree(stage.model("teacher"), stage.model("further"))
    tokenizer = AutoTokenizer.from_pretrained(stage.model("further"))
    tokenizer.add_tokens(["<a>", "<b>", "<c>", "<d>"])
    tokenizer.save_pretrained(stage.model("further"))
    return stage


def excluded_ids(stage: Stage) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(stage.model("further"))
    return tokenizer.convert_tokens_to_ids(["<a>", "<b>", "<c>", "<d>"])


def settings(stage: Stage, teacher: str, *more: str) -> list[str]:
    objective = f"objective={{kind: opd, topk: {TOPK}}}"
    return [f"run.dir={stage.run(teacher)}", objective, f"teacher.path={stage.model(teacher)}", *more]


def refusal(config: Path, overrides: list[str]) -> str:
    """The output of the job."""
    try:
        replayed.run_jobs(config, [overrides])
    except DataError as error:
        return str(error)
    return "trained"


def test_a_teacher_that_adds_tokens_is_refused_on_every_rank_and_the_error_names_the_key(stage: Stage) -> None:
    found = run_on_ranks(refusal, 2, stage.config, settings(stage, "further"), timeout_s=replayed.JOB_LIMIT_S)
    assert len(set(found)) == 1 and "adds 4 tokens ('<a>' 3" in found[0]
    assert "teacher.extra_tokens=exclude" in found[0] and not (stage.run("further") / "metrics.jsonl").exists()


def test_with_exclude_the_run_trains_without_the_added_tokens_and_counts_their_top_k_places(stage: Stage) -> None:
    excluded = torch.tensor(excluded_ids(stage))
    wanted = [settings(stage, "further", "teacher.extra_tokens=exclude"), settings(stage, "teacher")]
    replayed.replay(stage.config, wanted)
    found, plain = jobs.metrics(stage.run("further")), jobs.metrics(stage.run("teacher"))
    for step, rollouts in enumerate(stage.rollouts()):
        best = torch.cat([replayed.log_probs(stage.model("further"), one).topk(TOPK).indices for one in rollouts])
        assert found[step]["teacher/excluded_candidates"] == int(torch.isin(best, excluded).sum()) > 0
        assert plain[step]["teacher/excluded_candidates"] is None
        assert found[step]["topk/teacher_mass_mean"] < plain[step]["topk/teacher_mass_mean"]
        assert found[step]["tokens/student"] == plain[step]["tokens/student"]
