"""`tropd eval` and `tropd prefixes` against a real server, from the command line to the files they write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.sglang.streams import plan, stream
from tests.tiny_models import write_tiny_model
from tropd_mcore.cli.main import main
from tropd_mcore.data.chat import Renderer
from tropd_mcore.data.responses import read_responses
from tropd_mcore.evaluation.evaluate import load_result
from tropd_mcore.rollout.publisher import WeightPublisher
from tropd_mcore.serving.supervisor import SupervisedServer

QUESTIONS = ["how many apple", "give three", "add two", "count zero"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = [
        {"id": f"q{i}", "messages": [{"role": "user", "content": text}], "answer": str(i)}
        for i, text in enumerate(QUESTIONS)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def recipe(server: SupervisedServer, qwen3_folder: Path, prompts: Path, tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"run: {{dir: {tmp_path / 'run'}}}\n"
        f"student: {{path: {qwen3_folder}}}\n"
        f"teacher: {{kind: sglang, path: {qwen3_folder}, server: {{url: '{server.client.url}'}}}}\n"
        f"data: {{prompts: {prompts}, teacher_responses: {tmp_path / 'responses.jsonl'}, max_prompt_tokens: 64}}\n"
        "rollout: {max_new_tokens: 5, server: {dtype: float32, max_total_tokens: 2048}}\n"
        "verifier: {kind: exact_match, pattern: (.)}\n"
    )
    return str(path)


def test_eval_starts_a_server_for_the_model_and_does_not_evaluate_the_same_model_twice(
    recipe: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = write_tiny_model(tmp_path / "run" / "export", seed=2), tmp_path / "after.json"
    arguments = ["eval", recipe, "--prompts", str(prompts), "--samples", "2", "--out", str(out)]
    assert main(arguments) == 0
    line = capsys.readouterr().out
    result = load_result(out)
    assert result.model == str(model) and result.greedy.total == len(QUESTIONS) and result.sampled is not None
    assert result.sampled.total == 2 * len(QUESTIONS) and f"({result.greedy.correct} of 4)" in line
    assert main([*arguments, "--url", "http://127.0.0.1:1"]) == 0, "nothing is asked of that server"
    assert capsys.readouterr().out == line
    assert main([*arguments, "--samples", "0", "--url", "http://127.0.0.1:1"]) == 2, "other settings"


def test_eval_of_a_running_server_compares_with_an_earlier_result(
    server: SupervisedServer,
    recipe: str,
    qwen3_folder: Path,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    WeightPublisher(server.client, plan(qwen3_folder)).publish(stream(qwen3_folder), "evaluated")
    arguments = ["eval", recipe, "--prompts", str(prompts), "--samples", "0", "--url", server.client.url]
    before = str(tmp_path / "before.json")
    assert main([*arguments, "--model", str(qwen3_folder), "--out", before]) == 0
    assert main([*arguments, "--model", str(qwen3_folder), "--compare-with", before]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(f"{qwen3_folder} - {qwen3_folder}: greedy +0.0% [")


def test_eval_of_a_running_server_that_serves_another_model_is_refused(
    server: SupervisedServer,
    recipe: str,
    qwen3_folder: Path,
    other_folder: Path,
    prompts: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    WeightPublisher(server.client, plan(other_folder)).publish(stream(other_folder), "other")
    arguments = ["eval", recipe, "--prompts", str(prompts), "--samples", "0", "--url", server.client.url]
    assert main([*arguments, "--model", str(qwen3_folder)]) == 2
    expected = f"--url: the server at {server.client.url} serves other weights than --model={qwen3_folder}"
    assert expected in capsys.readouterr().err


def test_prefixes_writes_one_response_per_prompt_that_training_can_read(
    server: SupervisedServer, recipe: str, qwen3_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    WeightPublisher(server.client, plan(qwen3_folder)).publish(stream(qwen3_folder), "teacher")
    assert main(["prefixes", recipe, "--max-new-tokens", "9"]) == 0
    assert "responses.jsonl: 4 responses, 4 sampled now" in capsys.readouterr().out
    eos_ids = Renderer(qwen3_folder).eos_ids
    responses = read_responses(tmp_path / "responses.jsonl", eos_ids)
    assert sorted(responses) == ["q0", "q1", "q2", "q3"]
    assert all(len(ids) <= 9 and not set(ids.tolist()) & set(eos_ids) for ids in responses.values())
    again = ["prefixes", recipe, "--max-new-tokens", "9", "teacher.server.url=http://127.0.0.1:1"]
    assert main(again) == 0, "nothing is asked of that server"
    assert "all 4 responses exist already" in capsys.readouterr().out


def test_prefixes_refuses_a_teacher_server_that_serves_another_model(
    server: SupervisedServer, recipe: str, other_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    WeightPublisher(server.client, plan(other_folder)).publish(stream(other_folder), "another")
    assert main(["prefixes", recipe, "--max-new-tokens", "9"]) == 2
    assert f"teacher.server ({server.client.url}) serves other weights than teacher.path" in capsys.readouterr().err
    assert not (tmp_path / "responses.jsonl").exists()
