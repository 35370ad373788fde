"""Stored teacher responses must come from this teacher and these prompts, for `tropd prefixes` and for training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from tests.glue.answering import Client, answered_by
from tests.glue.contexts import config_of, context_of, read_loaded_inputs
from tests.glue.launches import edit
from tests.glue.stubs import one_rank
from tests.tiny_models import write_tiny_model
from tropd_mcore.cli import template_date as date_module
from tropd_mcore.cli.main import main
from tropd_mcore.config.loader import load
from tropd_mcore.data.prompts import PromptSet
from tropd_mcore.errors import DataError, ServerError
from tropd_mcore.mcore.parallel import Layout
from tropd_mcore.rollout.response_origin import origin_file
from tropd_mcore.serving.wire import Generation, GenerationRequest
from tropd_mcore.train.inputs import read_inputs
from tropd_mcore.train.stored_responses import check_held_out, check_responses

GUIDED = {"kind": "tropd", "outlier": {"topk": 3}, "guidance": {"min_continuation": 1}}


class Interrupted(Client):
    """Answers only the first chunk."""

    def generate(self, requests: list[GenerationRequest]) -> list[Generation]:
        if self.requests:
            raise ServerError("gone")
        return super().generate(requests)


class Recipe:
    """A prompt file and two models under `root`, and `tropd prefixes` over them."""

    def __init__(
        self, root: Path, models: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        self.root, self.capsys, self.caplog = root, capsys, caplog
        for name in ("student", "teacher"):
            shutil.copytree(models / name, root / name)
        self.out, self.file = root / "responses.jsonl", root / "recipe.yaml"
        self.write_prompts("one pear", "two pears", "three pears")
        self.file.write_text(
            f"run: {{dir: {root / 'run'}}}\n"
            f"student: {{path: {root / 'student'}}}\n"
            f"teacher: {{path: {root / 'teacher'}}}\n"
            f"data: {{prompts: {root / 'prompts.jsonl'}, max_prompt_tokens: 64}}\n"
            "objective: {kind: opd, topk: 3}\n"
            "batch: {tokens_per_micro_batch: 9000}\n"
        )

    def write_prompts(self, *texts: str) -> None:
        chats = [[{"role": "user", "content": text}] for text in texts]
        lines = [{"id": f"p{index}", "messages": chat} for index, chat in enumerate(chats)]
        (self.root / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def prefixes(self, *arguments: str) -> tuple[int, str]:
        """The exit status and what was printed or logged."""
        self.capsys.readouterr()
        self.caplog.clear()
        code = main(["prefixes", str(self.file), "--out", str(self.out), *arguments])
        captured = self.capsys.readouterr()
        return code, captured.out + captured.err + self.caplog.text

    def refused(self, *arguments: str) -> str:
        """The one line of a call that sends no request and changes nothing."""
        before = {path: path.read_bytes() for path in self.root.glob("responses*")}
        code, text = self.prefixes(*arguments)
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(errors) == 1, text
        assert {path: path.read_bytes() for path in self.root.glob("responses*")} == before
        return errors[0]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("student", "teacher")):
        write_tiny_model(root / name, num_hidden_layers=1, seed=seed)
    return root


@pytest.fixture
def recipe(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> Recipe:
    return Recipe(tmp_path, models, capsys, caplog)


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    return answered_by(Client(), monkeypatch)


@pytest.fixture
def layout() -> Iterator[Layout]:
    with one_rank() as layout:
        yield layout


def test_a_second_call_requests_only_the_responses_of_new_prompts(recipe: Recipe, client: Client) -> None:
    assert recipe.prefixes()[0] == 0 and len(client.requests) == 3
    code, text = recipe.prefixes()
    assert code == 0 and "all 3 responses exist already" in text and "not known" not in text
    shutil.move(recipe.root / "teacher", recipe.root / "moved")
    recipe.write_prompts("one pear", "two pears", "three pears", "four pears")
    assert recipe.prefixes(f"teacher.path={recipe.root / 'moved'}")[0] == 0 and len(client.requests) == 4
    assert len(json.loads(origin_file(recipe.out).read_text())["prompts"]) == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--temperature", "0.5"), "temperature 1.0 -> 0.5."),
        (("--top-p", "0.5"), "top_p 1.0 -> 0.5."),
        (("--max-new-tokens", "9"), "max_new_tokens 8192 -> 9."),
        (("teacher.dtype=float32",), "dtype bfloat16 -> float32."),
        (('rollout.end_tokens=["<|im_end|>","<|endoftext|>"]',), "end_ids (2,) -> (0, 2)."),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_responses_sampled_with_other_settings_are_refused(
    recipe: Recipe, client: Client, arguments: tuple[str, ...], words: str
) -> None:
    recipe.prefixes()
    line = recipe.refused(*arguments)
    assert f"responses.jsonl: its responses were made differently: {words}" in line
    assert "--out" in line and "or remove" in line
    recipe.out.unlink()
    assert recipe.prefixes(*arguments)[0] == 0, "the way out"


def test_responses_of_another_teacher_or_to_another_text_are_refused(recipe: Recipe, client: Client) -> None:
    recipe.prefixes()
    recipe.write_prompts("one pear", "two apples", "three pears")
    assert "the text of 1 prompts, the first is 'p1'" in recipe.refused()
    recipe.write_prompts("one pear", "two pears", "three pears")
    edit(recipe.root / "teacher" / "model.safetensors")
    assert "(sha256 of model.safetensors " in recipe.refused()


def test_an_interrupted_call_can_be_continued_the_next_day_but_only_with_the_same_settings(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Day(date):
        now = date(2024, 2, 29)

        @classmethod
        def today(cls) -> date:  # type: ignore[override]
            return cls.now

    monkeypatch.setattr(date_module, "date", Day)
    monkeypatch.setattr("tropd_mcore.rollout.prefixes.sample_missing.__kwdefaults__", {"chunk": 2})
    template = recipe.root / "student" / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}")
    answered_by(Interrupted(), monkeypatch)
    assert recipe.prefixes()[0] == 2 and not recipe.out.exists()
    Day.now = date(2024, 3, 1)
    client = answered_by(Client(), monkeypatch)
    assert "temperature 1.0 -> 0.5" in recipe.refused("--temperature", "0.5")
    line = recipe.refused("data.template_date=2024-03-01")
    assert "day 2024-02-29 -> 2024-03-01; the text of 2 prompts" in line
    assert recipe.prefixes()[0] == 0 and len(client.requests) == 1


def test_responses_of_unknown_origin_are_kept_and_reported_in_one_line(recipe: Recipe, client: Client) -> None:
    recipe.prefixes()
    origin_file(recipe.out).unlink()
    code, text = recipe.prefixes("--temperature", "0.5")
    assert code == 0 and text.count("has no record of 3 responses") == 1 and "all 3 responses" in text
    recipe.write_prompts("one pear", "two pears", "three pears", "four pears")
    code, text = recipe.prefixes("--temperature", "0.5")
    assert code == 0 and text.count("has no record of 3 responses") == 1 and len(client.requests) == 4
    assert list(json.loads(origin_file(recipe.out).read_text())["prompts"]) == ["p3"], "it speaks of what it saw alone"
    assert "temperature 0.5 -> 1.0" in recipe.refused()


@pytest.mark.parametrize("content", ["", "{}", "[]", "\udcff"])
def test_a_damaged_record_of_the_origin_gives_a_one_line_error(recipe: Recipe, client: Client, content: str) -> None:
    recipe.prefixes()
    origin_file(recipe.out).write_bytes(content.encode(errors="surrogateescape"))
    assert "responses.jsonl.origin.json: the record of who answered is damaged" in recipe.refused()


def trained(recipe: Recipe, layout: Layout, **sections: Any) -> None:
    """The lines of a launch about the responses."""
    data = {"prompts": recipe.root / "prompts.jsonl", "teacher_responses": recipe.out} | sections.pop("data", {})
    given = {"objective": GUIDED, "batch": {"tokens_per_micro_batch": 9000}, "rollout": {"max_new_tokens": 9}}
    merged = given | {"teacher": {"path": recipe.root / "teacher"}} | sections
    context = context_of(config_of(recipe.root / "run", recipe.root / "student", data=data, **merged), layout)
    prompts: PromptSet = read_loaded_inputs(context).prompts
    check_responses(context, read_inputs(context), prompts)


def test_training_accepts_the_responses_of_its_teacher_without_a_message(
    recipe: Recipe, client: Client, layout: Layout, caplog: pytest.LogCaptureFixture
) -> None:
    recipe.prefixes()
    caplog.clear()
    trained(recipe, layout)
    assert [message for message in caplog.messages if "responses" in message] == []
    origin_file(recipe.out).unlink()
    trained(recipe, layout)
    assert [message for message in caplog.messages if "has no record of 3 responses" in message]


def test_training_refuses_responses_of_another_teacher_or_to_another_text(
    recipe: Recipe, client: Client, layout: Layout
) -> None:
    recipe.prefixes()
    other = shutil.copytree(recipe.root / "teacher", recipe.root / "other")
    trained(recipe, layout, teacher={"path": other})
    edit(other / "model.safetensors")
    with pytest.raises(DataError, match=r"of another teacher \(.*/teacher\) than teacher\.path=.*/other: sha256 of"):
        trained(recipe, layout, teacher={"path": other})
    trained(recipe, layout, teacher={"path": other}, objective={"kind": "opd", "topk": 3})
    recipe.write_prompts("one pear", "two apples", "three pears")
    with pytest.raises(DataError, match=r"1 responses answer another text .* the first is 'p1'; sample them again"):
        trained(recipe, layout)
    origin_file(recipe.out).unlink()
    trained(recipe, layout)


def test_held_out_responses_of_another_teacher_are_refused_by_their_key(
    recipe: Recipe, client: Client, layout: Layout
) -> None:
    recipe.prefixes()
    held_out = {"prompts": shutil.copy(recipe.root / "prompts.jsonl", recipe.root / "held_out.jsonl")}
    held_out["responses"] = recipe.out
    recipe.write_prompts("other pears")

    def check(teacher: Path) -> None:
        sections = {"teacher": {"path": teacher}, "held_out": held_out, "objective": {"kind": "opd", "topk": 3}}
        sections |= {"data": {"prompts": recipe.root / "prompts.jsonl"}, "batch": {"tokens_per_micro_batch": 9000}}
        context = context_of(config_of(recipe.root / "run", recipe.root / "student", **sections), layout)
        found = read_loaded_inputs(context).held_out
        assert found is not None
        check_held_out(context, read_inputs(context), found)

    check(recipe.root / "teacher")
    other = shutil.copytree(recipe.root / "teacher", recipe.root / "other")
    edit(other / "model.safetensors")
    with pytest.raises(DataError, match=r"^held_out\.responses=.*: responses of another teacher"):
        check(other)


def test_training_with_another_template_date_than_the_responses_names_the_key(
    recipe: Recipe, client: Client, layout: Layout, caplog: pytest.LogCaptureFixture
) -> None:
    template = recipe.root / "student" / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}")
    recipe.prefixes("data.template_date=2024-02-29")
    trained(recipe, layout, data={"template_date": "2024-03-01"})
    (line,) = (message for message in caplog.messages if "3 responses answer another text" in message)
    assert line.endswith("2024-02-29 there, 2024-03-01 here; set data.template_date=2024-02-29")
    caplog.clear()
    trained(recipe, layout, data={"template_date": "2024-02-29"})
    assert not [message for message in caplog.messages if "another text" in message]


def with_two_teachers(recipe: Recipe, *names: str) -> None:
    """The prompts name a teacher each; `math` is the teacher of the recipe, `code` another folder."""
    other = recipe.root / "code"
    if not other.exists():
        shutil.copytree(recipe.root / "teacher", other)
        edit(other / "model.safetensors")
        recipe.file.write_text(f"{recipe.file.read_text()}teachers: {{math: {{}}, code: {{path: {other}}}}}\n")
    chats = [[{"role": "user", "content": text}] for text in ("one pear", "two pears", "three pears")]
    lines = [
        {"id": f"p{index}", "messages": chat, "teacher": name}
        for index, (chat, name) in enumerate(zip(chats, names, strict=True))
    ]
    (recipe.root / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def trained_by_two(recipe: Recipe, layout: Layout) -> None:
    config, _ = load(recipe.file, [f"data.teacher_responses={recipe.out}", "rollout.max_new_tokens=9"])
    config = config.model_copy(update={"objective": config_of(recipe.root, recipe.root, objective=GUIDED).objective})
    context = context_of(config, layout)
    check_responses(context, read_inputs(context), read_loaded_inputs(context).prompts)


def test_each_prompt_is_answered_by_its_own_teacher_and_the_record_says_by_which(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, layout: Layout
) -> None:
    opened: list[str] = []
    client = answered_by(Client(), monkeypatch, opened)
    with_two_teachers(recipe, "math", "code", "math")
    assert recipe.prefixes()[0] == 0
    assert opened == ["teachers.math.path", "teachers.code.path"] and len(client.requests) == 3
    assert [json.loads(line)["id"] for line in recipe.out.read_text().splitlines()] == ["p0", "p1", "p2"]
    record = json.loads(origin_file(recipe.out).read_text())
    (other,) = record["others"]
    assert (list(record["prompts"]), list(other["prompts"])) == (["p0", "p2"], ["p1"])
    assert (record["teacher"], other["teacher"]) == (str(recipe.root / "teacher"), str(recipe.root / "code"))
    trained_by_two(recipe, layout)
    code, text = recipe.prefixes()
    assert code == 0 and "all 3 responses exist already" in text and len(opened) == 2


def test_responses_that_the_other_teacher_sampled_are_refused_by_prefixes_and_by_training(
    recipe: Recipe, client: Client, layout: Layout
) -> None:
    with_two_teachers(recipe, "math", "code", "math")
    recipe.prefixes()
    with_two_teachers(recipe, "math", "code", "code")
    line = recipe.refused()
    assert f"its responses were made differently: teacher {recipe.root / 'teacher'} -> {recipe.root / 'code'}" in line
    with pytest.raises(
        DataError, match=r"responses of another teacher \(.*/teacher\) than teachers\.code\.path=.*/code"
    ):
        trained_by_two(recipe, layout)


def test_an_interrupted_call_keeps_the_part_of_every_teacher(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second teacher's server dies; the next call asks only that teacher."""
    with_two_teachers(recipe, "math", "code", "math")
    answered_by(Interrupted(), monkeypatch)
    assert recipe.prefixes()[0] == 2 and not recipe.out.exists()
    opened: list[str] = []
    client = answered_by(Client(), monkeypatch, opened)
    assert recipe.prefixes()[0] == 0 and opened == ["teachers.code.path"] and len(client.requests) == 1
    assert len(recipe.out.read_text().splitlines()) == 3


def test_responses_of_one_teacher_serve_a_run_with_several_if_it_is_theirs(
    recipe: Recipe, client: Client, layout: Layout
) -> None:
    recipe.prefixes()
    with_two_teachers(recipe, "math", "math", "code")
    with pytest.raises(DataError, match=r"than teachers\.code\.path="):
        trained_by_two(recipe, layout)
    assert "teacher " in recipe.refused()


def test_one_url_for_several_teachers_is_refused(recipe: Recipe, client: Client) -> None:
    with_two_teachers(recipe, "math", "code", "math")
    line = recipe.refused("--server", "url=http://127.0.0.1:1")
    assert "--server url names one server, and the configuration has the teachers math, code" in line
