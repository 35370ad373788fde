"""Whole jobs with the real rollout server: they finish, resume after a kill, and do not depend on the layout."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e import jobs
from tests.e2e.conftest import HELD_OUT, STEPS
from tropd_mcore.config.schema import ServerConfig
from tropd_mcore.serving.process import ServerSpec
from tropd_mcore.serving.supervisor import SupervisedServer
from tropd_mcore.serving.wire import ScoringRequest, TokenScores

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(jobs.TEST_LIMIT_S)]

SAME_STEP = {"rel": 5e-5, "abs": 1e-6}
"""Difference of loss (nats) and gradient norm between layouts, float32. Each test session samples new rollouts. If
token gradients cancel, their rounding remains: 3e-7 to 1.2e-5 of the norm were seen."""
SAME_CURVE = {"rel": 5e-3, "abs": 3e-4}
"""The same after Adam steps, which turn rounding into whole steps where a gradient is near zero."""


def test_a_run_leaves_metrics_rollouts_checkpoints_and_an_export_that_transformers_loads(finished_run: Path) -> None:
    assert [line["step"] for line in jobs.metrics(finished_run)] == list(range(STEPS))
    assert len(list((finished_run / "rollouts").glob("step_*.npz"))) == STEPS
    assert [path.name for path in sorted((finished_run / "checkpoints").iterdir())] == ["step_000004", "step_000006"]
    model = AutoModelForCausalLM.from_pretrained(finished_run / "export")
    tokenizer = AutoTokenizer.from_pretrained(finished_run / "export")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 12 + 34?"}], tokenize=False, add_generation_prompt=True
    )
    answer = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert answer.shape[1] > 4


def test_the_first_step_has_prefixes_from_the_teacher_and_the_last_has_fewer(finished_run: Path) -> None:
    lines = jobs.metrics(finished_run)
    assert lines[0]["guidance/alpha"] == 1.0
    assert lines[0]["tokens/prefix"] > 0
    assert lines[-1]["guidance/prefix_length"] < lines[0]["guidance/prefix_length"]


def test_every_rollout_comes_from_the_version_of_its_step(finished_run: Path) -> None:
    for step in range(STEPS):
        with np.load(finished_run / "rollouts" / f"step_{step:06d}.npz") as rollouts:
            assert {version.split("/")[1] for version in rollouts["policy_version"]} == {f"step-{step:06d}"}


def test_a_killed_run_resumes_and_equals_an_uninterrupted_replay_bit_for_bit(
    settings: list[str], tmp_path: Path
) -> None:
    killed, replayed = tmp_path / "killed", tmp_path / "replayed"
    process = jobs.start(killed, *settings)
    # in the middle of step 3: its rollouts are there, its result is not; the last checkpoint is of step 2
    jobs.wait_for(lambda: (killed / "rollouts" / "step_000003.npz").exists(), process)
    servers = jobs.server_processes(killed)
    assert servers
    jobs.kill(process)
    jobs.wait_for(lambda: not any(server.is_running() and server.status() != "zombie" for server in servers))
    sampled = (killed / "rollouts" / "step_000003.npz").read_bytes()
    jobs.run(killed, *settings)
    assert (killed / "rollouts" / "step_000003.npz").read_bytes() == sampled

    jobs.run(replayed, *settings, f"run.replay={killed}")
    assert jobs.curve(killed) == jobs.curve(replayed)
    assert same_weights(killed / "export", replayed / "export")


def test_a_run_that_is_cut_back_to_its_checkpoint_repeats_its_curve_bit_for_bit(
    finished_run: Path, settings: list[str], tmp_path: Path
) -> None:
    again = tmp_path / "again"
    shutil.copytree(finished_run, again)
    shutil.rmtree(again / "checkpoints" / "step_000006")
    shutil.rmtree(again / "export")
    jobs.run(again, *settings)
    assert jobs.curve(again) == jobs.curve(finished_run)
    assert same_weights(again / "export", finished_run / "export")


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        pytest.param(1, ["parallel.tensor=1"], id="tp1"),
        pytest.param(2, ["parallel.tensor=1", "parallel.data=2"], id="dp2"),
        pytest.param(4, ["parallel.tensor=2", "parallel.pipeline=2"], id="tp2pp2"),
        pytest.param(2, ["parallel.tensor=2", "batch.tokens_per_micro_batch=256"], id="tp2-small-packs"),
    ],
)
def test_the_same_rollouts_give_the_same_curve_at_every_layout(
    finished_run: Path, settings: list[str], tmp_path: Path, ranks: int, overrides: list[str]
) -> None:
    run_dir = tmp_path / "layout"
    short = ["run.steps=3", "objective.guidance.total_steps=6", "run.export_at_end=false"]
    jobs.run(run_dir, *settings, *short, f"run.replay={finished_run}", *overrides, ranks=ranks)
    expected, found = jobs.metrics(finished_run)[:3], jobs.metrics(run_dir)
    for name in ("loss/total", "loss/objective", "optimizer/grad_norm"):
        assert found[0][name] == pytest.approx(expected[0][name], **SAME_STEP), name
        for line, reference in zip(found, expected, strict=True):
            assert line[name] == pytest.approx(reference[name], **SAME_CURVE), (name, line["step"])
    assert [line["optimizer/token_count"] for line in found] == [line["optimizer/token_count"] for line in expected]


def test_the_sglang_teacher_and_the_megatron_teacher_give_the_same_numbers(
    finished_run: Path, settings: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "served"
    jobs.run(
        run_dir,
        *settings,
        "teacher.kind=sglang",
        "teacher.server.max_total_tokens=8192",
        "run.steps=1",
        "objective.guidance.total_steps=6",
        "run.export_at_end=false",
        f"run.replay={finished_run}",
    )
    tokens = Path("tokens") / "step_000000.npz"
    with np.load(run_dir / tokens) as served, np.load(finished_run / tokens) as sharded:
        for name in ("teacher_logp", "log_ratio", "divergence", "teacher_mass"):
            np.testing.assert_allclose(served[name], sharded[name], rtol=1e-4, atol=1e-4, err_msg=name)
        np.testing.assert_array_equal(served["trusted"], sharded["trusted"])
    expected, found = jobs.metrics(finished_run)[0], jobs.metrics(run_dir)[0]
    assert found["optimizer/grad_norm"] == pytest.approx(expected["optimizer/grad_norm"], rel=1e-4)
    for name in ("forward_kl", "sampled_kl", "nll", "teacher_mass", "unscored"):
        number = found[f"held_out/{name}"]
        assert number == pytest.approx(expected[f"held_out/{name}"], rel=1e-4, abs=1e-6), name


def test_held_out_responses_are_measured_before_the_first_update_every_four_steps_and_at_the_last_step(
    finished_run: Path,
) -> None:
    lines = jobs.metrics(finished_run)
    assert [line["step"] for line in lines if line["held_out/forward_kl"] is not None] == [0, 4, STEPS - 1]
    assert lines[0]["held_out/forward_kl"] > 0.0 and lines[0]["held_out/tokens"] > HELD_OUT
    said = finished_run.with_suffix(".log").read_text()
    assert f"step 4: {HELD_OUT} held-out responses" in said and "KL(teacher || student)" in said


def test_a_student_identical_to_its_teacher_has_nothing_to_learn(
    finished_run: Path, settings: list[str], example: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "own"
    jobs.run(
        run_dir,
        *settings,
        f"teacher.path={example / 'student'}",
        "objective.guidance.loss=none",
        "objective.guidance.total_steps=6",
        "run.steps=1",
        "run.export_at_end=false",
        f"run.replay={finished_run}",
    )
    (line,) = jobs.metrics(run_dir)
    assert line["trust/fraction"] == 1.0
    assert abs(line["log_ratio/mean"]) < 1e-6
    assert line["trust/tv"] < 1e-6
    assert line["tv/mean"] < 1e-5 and abs(line["held_out/forward_kl"]) < 1e-5
    assert line["optimizer/grad_norm"] < 1e-4  # rounding; 0.01 to 3 with the real teacher


@pytest.mark.slow  # tests/sglang/test_server_death.py has the same without a trainer
def test_a_server_killed_in_mid_step_is_restarted_and_the_step_is_complete(settings: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = jobs.start(run_dir, *settings, "run.steps=3")
    jobs.wait_for(lambda: len(jobs.metrics(run_dir)) >= 1, process)
    for server in jobs.server_processes(run_dir):
        server.kill()
    assert process.wait(timeout=jobs.LIMIT_S) == 0, run_dir.with_suffix(".log").read_text()[-4000:]
    lines = jobs.metrics(run_dir)
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert all(line["teacher/masked_samples"] == 0 for line in lines)
    with np.load(run_dir / "rollouts" / "step_000002.npz") as rollouts:
        assert rollouts["response_ids_lengths"].min() > 0
    assert "restart 1 of" in run_dir.with_suffix(".log").read_text()
    assert not [server for server in jobs.server_processes(run_dir) if server.status() != "zombie"]


def test_the_export_served_by_sglang_gives_the_log_probs_of_transformers(finished_run: Path, tmp_path: Path) -> None:
    export = finished_run / "export"
    with np.load(finished_run / "rollouts" / f"step_{STEPS - 1:06d}.npz") as rollouts:
        count = int(rollouts["prompt_ids_lengths"][0])
        ids = np.concatenate([rollouts["prompt_ids"][:count], rollouts["response_ids"][:16]])
    spec = ServerSpec(
        key="rollout.server",
        model_key="student.path",
        model_path=export,
        config=ServerConfig(dtype="float32", max_total_tokens=4096),
        device="cpu",
        run_dir=tmp_path,
        name="export",
    )
    with SupervisedServer(spec) as server:
        (scores,) = server.client.score([ScoringRequest(ids.astype(np.int32), first=1)])
    assert isinstance(scores, TokenScores)
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    with torch.no_grad():
        logp = model(torch.from_numpy(ids)[None].long()).logits[0, :-1].log_softmax(-1)
    expected = logp.gather(1, torch.from_numpy(ids)[1:, None].long())[:, 0].numpy()
    np.testing.assert_allclose(scores.logp_N, expected, atol=1e-4)


def same_weights(first: Path, second: Path) -> bool:
    """Whether two exported folders hold the same bytes under the same names."""
    one, two = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
