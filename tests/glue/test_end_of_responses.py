"""One set of end tokens in training, prefixes and evaluation, for a base student with an instructed teacher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.glue.answering import Client, answered_by
from tests.glue.contexts import context_of, read_loaded_inputs
from tests.glue.stubs import one_rank
from tests.tiny_models import tiny_tokenizer, write_tiny_model
from tropd_mcore.cli.main import main
from tropd_mcore.config.loader import load

END_OF_TEXT, TURN_END = 0, 2


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    return answered_by(Client(), monkeypatch)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A base student that ends at <|endoftext|> and a teacher that ends its turn with <|im_end|>."""
    student = write_tiny_model(tmp_path / "student", num_hidden_layers=1, eos_token_id=END_OF_TEXT)
    (student / "generation_config.json").unlink(missing_ok=True)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.chat_template = None
    tokenizer.save_pretrained(student)
    (student / "chat_template.jinja").unlink(missing_ok=True)
    teacher = write_tiny_model(tmp_path / "teacher", num_hidden_layers=1, seed=2)
    lines = [{"id": f"p{index}", "prompt": f"sum {index}", "answer": "1"} for index in range(3)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"run: {{dir: {tmp_path / 'run'}}}\n"
        f"student: {{path: {student}}}\n"
        f"teacher: {{path: {teacher}}}\n"
        f"data: {{prompts: {tmp_path / 'prompts.jsonl'}, max_prompt_tokens: 64}}\n"
        "rollout: {max_new_tokens: 5}\n"
        "objective: {kind: opd, topk: 3}\n"
        "batch: {tokens_per_micro_batch: 128}\n"
        "verifier: {kind: exact_match, pattern: (.)}\n"
    )
    return path


def test_rollouts_prefixes_and_evaluation_end_at_the_tokens_of_both_models(
    recipe: Path, client: Client, tmp_path: Path
) -> None:
    config, _ = load(str(recipe), [])
    with one_rank() as layout:
        trained = read_loaded_inputs(context_of(config, layout))
    assert trained.renderer.eos_ids == (END_OF_TEXT,), "the student alone would never stop at the teacher's end of turn"
    assert trained.ends.ids == (END_OF_TEXT, TURN_END) and trained.excluded == ()

    out = tmp_path / "responses.jsonl"
    assert main(["prefixes", str(recipe), "--out", str(out)]) == 0
    assert {request.stop_token_ids for request in client.requests} == {trained.ends.ids}
    assert [json.loads(line)["response_ids"] for line in out.read_text().splitlines()] == [[70, 70]] * 3
    client.requests.clear()

    for model in ("student", "teacher"):
        arguments = ["--prompts", str(tmp_path / "prompts.jsonl"), "--model", str(tmp_path / model), "--samples", "1"]
        assert main(["eval", str(recipe), *arguments]) == 0
        assert {request.stop_token_ids for request in client.requests} == {trained.ends.ids}
        client.requests.clear()


def test_rollout_end_tokens_overrides_the_model_folders_in_rollouts_prefixes_and_evaluation(
    recipe: Path, client: Client, tmp_path: Path
) -> None:
    key = 'rollout.end_tokens=["<|endoftext|>","<|im_start|>"]'
    config, _ = load(str(recipe), [key])
    with one_rank() as layout:
        assert read_loaded_inputs(context_of(config, layout)).ends.ids == (END_OF_TEXT, 1)
    arguments = ["--prompts", str(tmp_path / "prompts.jsonl"), "--model", str(tmp_path / "student"), "--samples", "0"]
    assert main(["eval", str(recipe), key, *arguments]) == 0
    assert {request.stop_token_ids for request in client.requests} == {(END_OF_TEXT, 1)}
    client.requests.clear()
    assert main(["prefixes", str(recipe), key, "--out", str(tmp_path / "responses.jsonl")]) == 0
    stops = {request.stop_token_ids for request in client.requests}
    assert stops == {(END_OF_TEXT, 1, TURN_END)}, "the teacher's server stops at its own end in any case"
