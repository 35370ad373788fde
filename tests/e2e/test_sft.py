"""Whole jobs of supervised fine-tuning on two ranks: no server, no teacher weights, and a kill changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.e2e import jobs, replayed
from tests.e2e.replayed import PROMPTS, SAMPLES, Stage
from tests.ranks import run_on_ranks
from tropd_mcore.records.replay import load_rollouts
from tropd_mcore.types import Rollout

STEPS, END, HELD_OUT, TOPK = 3, 2, 5, 7
"""END is the end of a turn of the tiny tokenizer."""
SFT = ["run.replay=null", f"run.steps={STEPS}", "objective={kind: sft}", "data.teacher_responses=RESPONSES"]
KEYS = f"prompts: HELD_OUT, responses: ITS_RESPONSES, every: 2, limit: {HELD_OUT}, topk: {TOPK}"
MEASURED = [*SFT, f"held_out={{{KEYS}}}"]
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(6 * replayed.JOB_LIMIT_S)]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """The stage of the replays with a stored response per prompt; every third response was cut."""
    stage = replayed.set_stage(tmp_path_factory.mktemp("stage"))
    names = [json.loads(line)["id"] for line in (stage.root / "prompts.jsonl").read_text().splitlines()]
    lines = [
        {"id": name, "response_ids": [5 + number, 9, 11][: 1 + number % 3], "finished": number % 3 != 0}
        for number, name in enumerate(names)
    ]
    (stage.root / "responses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    held_out = [{"id": name, "prompt": "many apples how " * (1 + number)} for number, name in enumerate(names)]
    (stage.root / "held_out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in held_out))
    return stage


def wanted(stage: Stage, name: str, *more: str) -> list[str]:
    responses = stage.root / "responses.jsonl"
    places = {"HELD_OUT": stage.root / "held_out.jsonl", "ITS_RESPONSES": responses, "RESPONSES": responses}
    return replayed.overrides(stage, name, [*more], places)


@pytest.fixture(scope="module")
def runs(stage: Stage) -> dict[str, Path]:
    """{name: run directory}: a whole run, the same on data ranks, one that is killed in its second step, and one that
    measures no held-out responses."""
    whole, killed = wanted(stage, "whole", *MEASURED), wanted(stage, "killed", *MEASURED)
    replayed.replay(stage.config, [whole, wanted(stage, "on_data_ranks", *MEASURED, "parallel.tensor=1")])
    run_on_ranks(replayed.run_until_killed, 2, stage.config, killed, 1, timeout_s=replayed.JOB_LIMIT_S)
    replayed.replay(stage.config, [killed, wanted(stage, "unmeasured", *SFT)])
    return {name: stage.run(name) for name in ("whole", "on_data_ranks", "killed", "unmeasured")}


def loss_of(folder: Path, rollouts: list[Rollout]) -> float:
    """Mean negative log-likelihood of the teacher's tokens by transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total, count = 0.0, 0
    for rollout in rollouts:
        ids = torch.from_numpy(rollout.token_ids.astype(np.int64))
        with torch.no_grad():
            log_p = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
        tokens = len(rollout.prefix_ids)
        total -= float(log_p.gather(1, ids[1:, None])[-tokens:].sum())
        count += tokens
    return total / count


def test_the_first_loss_is_that_of_transformers_on_the_stored_responses(runs: dict[str, Path], stage: Stage) -> None:
    rollouts = load_rollouts(runs["whole"] / "rollouts" / "step_000000.npz")
    assert len(rollouts) == PROMPTS * SAMPLES and len({rollout.prompt_id for rollout in rollouts}) == len(rollouts)
    first = jobs.metrics(runs["whole"])[0]
    assert first["loss/total"] == pytest.approx(loss_of(stage.model("student"), rollouts), rel=1e-5)
    assert first["tokens/prefix"] == sum(len(rollout.prefix_ids) for rollout in rollouts)
    assert {rollout.prefix_ids[-1] == END for rollout in rollouts} == {True, False}, "an end, unless it was cut"


def test_the_loss_falls_and_nothing_of_a_student_or_a_teacher_is_reported(runs: dict[str, Path]) -> None:
    lines = jobs.metrics(runs["whole"])
    assert lines[-1]["loss/total"] < lines[0]["loss/total"]
    for line in lines:
        assert line["tokens/student"] == 0 and line["trust/tv"] is None and line["entropy/teacher"] is None
    assert not list((runs["whole"] / "logs").glob("*")) and not list((runs["unmeasured"] / "scores").glob("*"))
    tokens = np.load(runs["whole"] / "tokens" / "step_000000.npz").files
    assert "student_logp" in tokens and not {"tv", "force"} & set(tokens), "a measure without a teacher is not paid for"


def test_sft_does_not_depend_on_the_layout(runs: dict[str, Path]) -> None:
    for line, reference in zip(jobs.metrics(runs["on_data_ranks"]), jobs.metrics(runs["whole"]), strict=True):
        for metric in ("loss/total", "optimizer/grad_norm", "tokens/prefix", "held_out/forward_kl", "held_out/nll"):
            if reference[metric] is None:
                assert line[metric] is None
                continue
            assert line[metric] == pytest.approx(reference[metric], rel=1e-4), (metric, line["step"])


def test_a_killed_run_of_sft_ends_with_the_same_bits(runs: dict[str, Path]) -> None:
    for line, reference in zip(jobs.metrics(runs["killed"]), jobs.metrics(runs["whole"]), strict=True):
        for name, value in reference.items():
            assert name.startswith(jobs.NOT_REPRODUCIBLE) or line[name] == value, name


def test_the_measure_of_held_out_responses_changes_no_bit_of_training(runs: dict[str, Path]) -> None:
    for line, reference in zip(jobs.metrics(runs["unmeasured"]), jobs.metrics(runs["whole"]), strict=True):
        for name, value in line.items():
            if not name.startswith((*jobs.NOT_REPRODUCIBLE, "held_out/")):
                assert reference[name] == value, name


def test_held_out_responses_are_measured_from_the_start_on_as_by_transformers(
    runs: dict[str, Path], stage: Stage
) -> None:
    """Every second step and the last one. The teacher is loaded once and its scores stay."""
    lines = jobs.metrics(runs["whole"])
    assert [line["held_out/forward_kl"] is not None for line in lines] == [True, False, True]
    kl, nll = held_out_distance(stage)
    assert lines[0]["held_out/forward_kl"] == pytest.approx(kl, rel=1e-4)
    assert lines[0]["held_out/nll"] == pytest.approx(nll, rel=1e-5)
    assert lines[2]["held_out/nll"] != lines[0]["held_out/nll"], "the student has moved"
    assert [path.name for path in (runs["whole"] / "scores").iterdir()] == ["held_out.dp0.cp0.npz"]


def held_out_distance(stage: Stage) -> tuple[float, float]:
    """Mean KL(q || p) on the teacher's best TOPK tokens and the rest, and mean -log p, by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(stage.model(name), dtype=torch.float64) for name in ("student", "teacher")
    )
    tokenizer = AutoTokenizer.from_pretrained(stage.model("student"))
    texts, responses = (
        [json.loads(line) for line in (stage.root / name).read_text().splitlines()][:HELD_OUT]
        for name in ("held_out.jsonl", "responses.jsonl")
    )
    kl, nll, tokens = 0.0, 0.0, 0
    for text, response in zip(texts, responses, strict=True):
        prompt = tokenizer.encode(text["prompt"], add_special_tokens=False)
        answer = response["response_ids"] + ([END] if response["finished"] else [])
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            log_p, log_q = (model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for model in (student, teacher))
        top_q, top = log_q.topk(TOPK)
        top_p = log_p.gather(1, top)
        rest_q, rest_p = (torch.log1p(-part.exp().sum(1)) for part in (top_q, top_p))
        kl += float((top_q.exp() * (top_q - top_p)).sum() + (rest_q.exp() * (rest_q - rest_p)).sum())
        nll -= float(log_p.gather(1, torch.tensor(answer)[:, None]).sum())
        tokens += len(answer)
    return kl / tokens, nll / tokens
