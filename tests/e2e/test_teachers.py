"""Whole jobs with two teachers on two kinds of prompts, on two ranks: numbers by transformers, resume, refusals."""

from __future__ import annotations

import json
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.e2e import jobs, replayed
from tests.e2e.replayed import PROMPTS, SAMPLES, Stage
from tests.ranks import run_on_ranks
from tropd_mcore.config.schema import ServerConfig
from tropd_mcore.errors import TropdError
from tropd_mcore.records.replay import load_rollouts
from tropd_mcore.serving.process import ServerSpec
from tropd_mcore.serving.supervisor import SupervisedServer
from tropd_mcore.types import Rollout

END, HELD_OUT, TOPK = 2, 5, 9
FOLDERS = {"math": "teacher", "code": "reference"}
"""Name of a teacher -> its folder on the stage."""
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(8 * replayed.JOB_LIMIT_S)]


def teacher_of(prompt_id: str) -> str:
    """Three of four prompts of a step have the teacher `math`, so the two have uneven shares."""
    return "code" if prompt_id.endswith("p1") else "math"


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """The stage of the replays, whose prompts name a teacher, with a stored response to each of them."""
    stage = replayed.set_stage(tmp_path_factory.mktemp("stage"))
    prompts = [json.loads(line) for line in (stage.root / "prompts.jsonl").read_text().splitlines()]
    write(stage.root / "prompts.jsonl", [{**line, "teacher": teacher_of(line["id"])} for line in prompts])
    held_out = [
        {"id": line["id"], "prompt": "many apples how " * (1 + number), "teacher": teacher_of(line["id"])}
        for number, line in enumerate(prompts)
    ]
    write(stage.root / "held_out.jsonl", held_out)
    responses = [
        {"id": line["id"], "response_ids": [5 + number, 9, 11][: 1 + number % 3], "finished": number % 3 != 0}
        for number, line in enumerate(prompts)
    ]
    write(stage.root / "responses.jsonl", responses)
    return stage


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def wanted(stage: Stage, name: str, *more: str) -> list[str]:
    responses = stage.root / "responses.jsonl"
    measured = f"prompts: {stage.root / 'held_out.jsonl'}, responses: {responses}, every: 2, limit: {HELD_OUT}"
    return replayed.overrides(
        stage,
        name,
        [
            f"teachers={{math: {{}}, code: {{path: {stage.model('reference')}, offload: true}}}}",
            f"held_out={{{measured}, topk: {TOPK}}}",
            "gates.sampler_logprob=false",  # the rollouts of the second step are those of the first student
            *more,
        ],
        {"RESPONSES": responses},
    )


@pytest.fixture(scope="module")
def runs(stage: Stage) -> dict[str, Path]:
    """{name: run directory}: a whole run, the same on data ranks and on stages, one that is killed in its second step,
    one of supervised fine-tuning, and one that is fine-tuned at its first step and scored at its second."""
    whole, killed = wanted(stage, "whole"), wanted(stage, "killed")
    plain = ["parallel.tensor=1"]
    replayed.replay(stage.config, [whole, wanted(stage, "data", *plain)])
    replayed.replay(stage.config, [wanted(stage, "stages", *plain, "parallel.pipeline=2")])
    run_on_ranks(replayed.run_until_killed, 2, stage.config, killed, 1, timeout_s=replayed.JOB_LIMIT_S)
    sft = [
        "run.replay=null",
        "objective={kind: sft}",
        "data.teacher_responses=RESPONSES",
        "teachers.code.offload=false",
    ]
    phases = [
        "data.teacher_responses=RESPONSES",
        "objective={kind: phases, phases: [{objective: {kind: sft}, until: {step: 1}}, "
        "{objective: {kind: gkd, topk: 9}}]}",
    ]
    replayed.replay(stage.config, [killed, wanted(stage, "sft", *sft), wanted(stage, "phases", *phases)])
    return {name: stage.run(name) for name in ("whole", "data", "stages", "killed", "sft", "phases")}


@lru_cache
def model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def log_probs(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """log p of each next token, float64 [tokens - 1, V]."""
    with torch.no_grad():
        found: torch.Tensor = model(folder)(ids[None]).logits[0, :-1].log_softmax(-1)
    return found


def kl_of(stage: Stage, rollouts: list[Rollout], folder: str) -> list[float]:
    """log p - log q of each response token, q being the model in `folder`."""
    found: list[float] = []
    for rollout in rollouts:
        ids = torch.from_numpy(rollout.token_ids.astype(np.int64))
        tokens, target = len(rollout.response_ids), ids[1:, None]
        p, q = (log_probs(stage.model(name), ids).gather(1, target)[-tokens:, 0] for name in ("student", folder))
        found += (p - q).tolist()
    return found


def test_the_first_step_has_the_numbers_of_each_teacher_by_transformers(runs: dict[str, Path], stage: Stage) -> None:
    """The loss of opd is the estimate of the reverse KL itself."""
    rollouts = stage.rollouts()[0]
    assert len(rollouts) == PROMPTS * SAMPLES
    by_teacher = {name: [rollout for rollout in rollouts if teacher_of(rollout.prompt_id) == name] for name in FOLDERS}
    counts = {name: sum(len(rollout.response_ids) for rollout in found) for name, found in by_teacher.items()}
    first = jobs.metrics(runs["whole"])[0]
    for name, folder in FOLDERS.items():
        kl = kl_of(stage, by_teacher[name], folder)
        assert len(kl) == counts[name]
        assert first[f"teacher/{name}/share"] == pytest.approx(counts[name] / sum(counts.values()), rel=1e-12)
        assert first[f"teacher/{name}/kl"] == pytest.approx(np.mean(kl), abs=2e-5)
        assert first[f"teacher/{name}/loss"] == pytest.approx(np.mean(kl), abs=2e-5)
        other = next(each for each in FOLDERS.values() if each != folder)
        assert first[f"teacher/{name}/kl"] != pytest.approx(np.mean(kl_of(stage, by_teacher[name], other)), abs=1e-2)


@pytest.mark.parametrize("name", ["whole", "data", "stages", "sft", "phases"])
def test_the_losses_of_the_teachers_weighted_by_their_shares_add_up_to_the_loss(
    runs: dict[str, Path], name: str
) -> None:
    for line in jobs.metrics(runs[name]):
        parts = [line[f"teacher/{teacher}/share"] * line[f"teacher/{teacher}/loss"] for teacher in FOLDERS]
        assert sum(parts) == pytest.approx(line["loss/objective"], rel=1e-9)
        assert sum(line[f"teacher/{teacher}/share"] for teacher in FOLDERS) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["data", "stages"])
def test_two_teachers_do_not_depend_on_the_layout(runs: dict[str, Path], name: str) -> None:
    measures = ["loss/total", "optimizer/grad_norm", "held_out/forward_kl", "entropy/teacher", "topk/teacher_mass_mean"]
    measures += [f"teacher/{teacher}/{what}" for teacher in FOLDERS for what in ("share", "loss", "kl")]
    for line, reference in zip(jobs.metrics(runs[name]), jobs.metrics(runs["whole"]), strict=True):
        for metric in measures:
            assert line[metric] == (None if reference[metric] is None else pytest.approx(reference[metric], rel=1e-3))


def test_a_killed_run_with_two_teachers_ends_with_the_same_bits(runs: dict[str, Path]) -> None:
    for line, reference in zip(jobs.metrics(runs["killed"]), jobs.metrics(runs["whole"]), strict=True):
        for name, value in reference.items():
            assert name.startswith(jobs.NOT_REPRODUCIBLE) or line[name] == value, name


def test_held_out_responses_are_compared_with_the_teacher_of_their_prompt(runs: dict[str, Path], stage: Stage) -> None:
    first = jobs.metrics(runs["whole"])[0]
    assert first["held_out/forward_kl"] == pytest.approx(held_out_kl(stage, FOLDERS), rel=1e-4)
    swapped = {"math": FOLDERS["code"], "code": FOLDERS["math"]}
    assert first["held_out/forward_kl"] != pytest.approx(held_out_kl(stage, swapped), rel=1e-2)
    assert jobs.metrics(runs["sft"])[0]["held_out/forward_kl"] == pytest.approx(first["held_out/forward_kl"], rel=1e-4)


def held_out_kl(stage: Stage, folders: dict[str, str]) -> float:
    """Mean KL(q || p) on the best TOPK tokens of each prompt's teacher and the rest, by transformers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stage.model("student"))
    prompts, responses = (
        [json.loads(line) for line in (stage.root / name).read_text().splitlines()][:HELD_OUT]
        for name in ("held_out.jsonl", "responses.jsonl")
    )
    total, count = 0.0, 0
    for prompt, response in zip(prompts, responses, strict=True):
        end = [END] if response["finished"] else []
        answer = [*response["response_ids"], *end]
        ids = torch.tensor([*tokenizer.encode(prompt["prompt"], add_special_tokens=False), *answer])
        q = log_probs(stage.model(folders[prompt["teacher"]]), ids)[-len(answer) :]
        p = log_probs(stage.model("student"), ids)[-len(answer) :]
        best = q.topk(TOPK)
        inside = best.values.exp()
        rest_q, rest_p = 1 - inside.sum(1), 1 - p.gather(1, best.indices).exp().sum(1)
        kl = (inside * (best.values - p.gather(1, best.indices))).sum(1) + rest_q * (rest_q / rest_p).log()
        total, count = total + float(kl.sum()), count + len(answer)
    return total / count


def test_stored_rollouts_and_inputs_record_the_teachers(runs: dict[str, Path], stage: Stage) -> None:
    """The run that sampled the rollouts had one teacher; the teachers are those of this run's prompts."""
    assert {rollout.teacher for rollout in stage.rollouts()[0]} == {None}
    for run in ("whole", "sft"):
        found = load_rollouts(runs[run] / "rollouts" / "step_000000.npz")
        assert found and [each.teacher for each in found] == [teacher_of(each.prompt_id) for each in found]
    inputs = json.loads((runs["whole"] / "inputs.json").read_text())
    assert inputs["models"].keys() == {"student.path", "teachers.math.path", "teachers.code.path"}
    compared = json.loads((runs["whole"] / "model_checks.json").read_text())
    assert compared.keys() == {"student.path", "teachers.math.path", "teachers.code.path"}


def refusal(config: Path, overrides: list[str]) -> str:
    try:
        replayed.run_jobs(config, [overrides])
    except TropdError as error:
        return str(error)
    return "trained"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            "teachers.code.path=STUDENT",
            ["teachers.code.path: ", "content changed", "refused: the steps so far learned from another teacher"],
        ),
        (
            "teachers={math: {}, code: {path: REFERENCE}, more: {}}",
            ["teachers.more: no prompt of", "remove the entry, or name it in the field `teacher`"],
        ),
        (
            "teachers={math: {}}",
            ["prompts.jsonl:2: prompt 's0p1': teacher 'code' is not in `teachers`; expected one of math"],
        ),
        ("teachers={}", ["prompt 's0p0': names the teacher 'math', but the configuration has no `teachers`"]),
        (
            "teachers={math: {}, Code: {path: REFERENCE}}",
            ["teacher 'code' is not in `teachers`; did you mean 'Code'? Expected one of math, Code"],
        ),
        ("teachers.math.path=/nowhere", ["teachers.math.path: model folder /nowhere: not found"]),
    ],
    ids=["another folder", "idle", "unknown", "none configured", "case", "missing folder"],
)
def test_a_resume_with_other_teachers_is_refused_in_a_line_with_their_key(
    runs: dict[str, Path], stage: Stage, change: str, words: list[str]
) -> None:
    """A liar in front of every border; nothing of the run changes."""
    for word, name in (("STUDENT", "student"), ("REFERENCE", "reference")):
        change = change.replace(word, str(stage.model(name)))
    before = (runs["whole"] / "config.resolved.yaml").read_bytes()
    wrong = wanted(stage, "whole", "run.steps=3", change)
    (found,) = run_on_ranks(refusal, 1, stage.config, [*wrong, "parallel.tensor=1"], timeout_s=replayed.JOB_LIMIT_S)
    assert all(word in found for word in words), found
    assert (runs["whole"] / "config.resolved.yaml").read_bytes() == before


def test_a_teacher_with_another_vocabulary_is_refused_by_its_own_key_and_can_be_excluded(stage: Stage) -> None:
    from transformers import AutoTokenizer

    further = stage.model("further")
    shutil.copytree(stage.model("reference"), further)
    tokenizer = AutoTokenizer.from_pretrained(further)
    tokenizer.add_tokens(["<a>", "<b>"])
    tokenizer.save_pretrained(further)
    fresh = [*wanted(stage, "fresh"), "parallel.tensor=1", f"teachers.code.path={further}", "run.steps=1"]
    (found,) = run_on_ranks(refusal, 1, stage.config, fresh, timeout_s=replayed.JOB_LIMIT_S)
    assert f"teachers.code.path={further} adds 2 tokens" in found and "teachers.code.extra_tokens=exclude" in found
    assert "teachers.math" not in found
    fresh.append("teachers.code.extra_tokens=exclude")
    (found,) = run_on_ranks(refusal, 1, stage.config, fresh, timeout_s=replayed.JOB_LIMIT_S)
    assert found == "trained"
    (line,) = jobs.metrics(stage.run("fresh"))
    assert line["teacher/excluded_candidates"] is not None


SERVED = ["teachers.code.kind=sglang", "teachers.code.offload=false", "teachers.code.server.max_total_tokens=2048"]


def test_a_served_and_an_in_process_teacher_share_a_step(runs: dict[str, Path], stage: Stage) -> None:
    """The job starts the server of the one. Both score their own rows as two teachers in the job do."""
    replayed.replay(stage.config, [wanted(stage, "served", *SERVED)])
    for line, reference in zip(jobs.metrics(stage.run("served")), jobs.metrics(runs["whole"]), strict=True):
        assert line["teacher/masked_samples"] == 0
        for name in FOLDERS:
            assert line[f"teacher/{name}/share"] == reference[f"teacher/{name}/share"]
            for what in ("loss", "kl"):
                assert line[f"teacher/{name}/{what}"] == pytest.approx(reference[f"teacher/{name}/{what}"], abs=2e-4)
    logs = stage.run("served") / "logs"
    assert (logs / "teacher-code.log").stat().st_size and not list(logs.glob("teacher-math*"))
    record = json.loads((stage.run("served") / "teacher-code.json").read_text())
    assert record["readings"].keys() == {"teachers.code.path", "student.path"} and record["verified"] == replayed.STEPS


def test_a_server_of_the_other_teacher_is_refused_with_the_key_of_the_teacher(stage: Stage, tmp_path: Path) -> None:
    spec = ServerSpec(
        key="teachers.code.server",
        model_key="teachers.code.path",
        model_path=stage.model("reference"),
        config=ServerConfig(dtype="float32", max_total_tokens=2048, start_timeout_s=600.0),
        device="cpu",
        run_dir=tmp_path,
        name="elsewhere",
        extra_env={"TROPD_SERVER_KEY": ""},
    )
    with SupervisedServer(spec) as server:
        lie = ["teachers.math.kind=sglang", f"teachers.math.server.url={server.client.url}", "parallel.tensor=1"]
        job = wanted(stage, "lied to", *lie)
        (found,) = run_on_ranks(refusal, 1, stage.config, job, timeout_s=replayed.JOB_LIMIT_S)
    assert "gates.teacher_identity: teachers.math.server (" in found
    assert f"serves other weights than teachers.math.path={stage.model('teacher')}" in found
    assert "Correct teachers.math.server.url or teachers.math.path" in found
