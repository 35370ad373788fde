"""The inputs that a run reads before it builds anything: folders, prompts and lengths that are refused, by key."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.glue.contexts import SDPO, config_of, context_of, read_loaded_inputs
from tests.glue.stubs import make_layout, one_rank
from tests.ranks import run_on_ranks
from tests.tiny_models import write_tiny_model
from tropd_mcore.cli.template_date import template_date
from tropd_mcore.config.schema import Config
from tropd_mcore.data.prompts import PromptSet
from tropd_mcore.errors import ConfigError, DataError, TropdError
from tropd_mcore.mcore.parallel import Layout
from tropd_mcore.records.run_dir import RunDir
from tropd_mcore.teacher.solutions import SolutionPrompts
from tropd_mcore.train import loaded_inputs as loaded
from tropd_mcore.types import Prompt
from tropd_mcore.weights.architecture import read_architecture


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose vocabulary has 307 tokens and whose context has 512."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=1)


@pytest.fixture
def layout() -> Iterator[Layout]:
    with one_rank() as layout:
        yield layout


@pytest.mark.parametrize(
    ("objective", "teacher_tokens", "student_tokens", "problems"),
    [
        ({"kind": "opd", "topk": 307}, 307, 307, []),
        ({"kind": "opd", "topk": 308}, 307, 400, ["objective.topk = 308 but the vocabulary of the teacher has 307"]),
        (
            {"kind": "tropd", "outlier": {"topk": 308}},
            307,
            400,
            ["objective.outlier.topk = 308 but the vocabulary of the teacher has 307"],
        ),
        (SDPO | {"student_topk": 307}, 307, 307, []),
        (
            SDPO | {"topk": 11, "student_topk": 13},
            10,
            12,
            [
                "objective.topk = 11 but the vocabulary of the teacher has 10",
                "objective.student_topk = 13 but the vocabulary of the student has 12",
            ],
        ),
    ],
    ids=str,
)
def test_more_candidates_than_tokens_are_refused_by_key(
    layout: Layout,
    folder: Path,
    tmp_path: Path,
    objective: dict[str, Any],
    teacher_tokens: int,
    student_tokens: int,
    problems: list[str],
) -> None:
    arch = read_architecture(folder)
    sizes = {"teacher": replace(arch, vocab_size=teacher_tokens), "student": replace(arch, vocab_size=student_tokens)}
    context = context_of(config_of(tmp_path, folder, objective=objective, gates={"vocabulary": False}), layout, **sizes)
    if not problems:
        loaded.check_vocabularies(context)
        return
    with pytest.raises(ConfigError) as caught:
        loaded.check_vocabularies(context)
    assert len(caught.value.problems) == len(problems)
    for found, expected in zip(caught.value.problems, problems, strict=True):
        assert found.startswith(expected), found


def test_every_other_model_is_compared_with_the_student_if_the_gate_is_on(
    monkeypatch: pytest.MonkeyPatch, layout: Layout, folder: Path, tmp_path: Path
) -> None:
    compared: list[tuple[Path, Path, str]] = []
    monkeypatch.setattr(
        loaded,
        "check_same_vocabulary",
        lambda one, other, *, key, allow_extra: compared.append((one, other, key)),
    )
    other = tmp_path / "other"
    other.symlink_to(folder, target_is_directory=True)
    objective = {"kind": "exopd", "topk": 3, "reference": other}
    loaded.check_vocabularies(context_of(config_of(tmp_path / "run", folder, objective=objective), layout))
    assert compared == [(folder, folder, "teacher.path"), (folder, other, "objective.reference")]
    compared.clear()
    closed = config_of(tmp_path / "run", folder, objective=objective, gates={"vocabulary": False})
    loaded.check_vocabularies(context_of(closed, layout))
    assert compared == []


@pytest.mark.parametrize("difference", [-1, 0, 1])
def test_a_reference_that_knows_fewer_tokens_than_the_student_is_refused(
    layout: Layout, folder: Path, tmp_path: Path, difference: int
) -> None:
    objective = {"kind": "exopd", "topk": 3, "reference": folder}
    config = config_of(tmp_path, folder, objective=objective, gates={"vocabulary": False})
    narrower = replace(read_architecture(folder), vocab_size=307 + difference)
    context = context_of(config, layout, objective=narrower)
    if difference >= 0:
        loaded.check_vocabularies(context)
        return
    with pytest.raises(ConfigError, match="its vocabulary has 306 entries, the student's 307"):
        loaded.check_vocabularies(context)


def prompts_of(longest: int, **changes: Any) -> PromptSet:
    """Two prompts, one of `longest` tokens. `changes` apply to that one."""
    short = Prompt("short", np.array([3, 4], np.int32), None, None)
    given = {"token_ids": np.full(longest, 5, np.int32), "answer": None, "teacher_response_ids": None} | changes
    return PromptSet([short, Prompt("long", **given)], shuffle=False, seed=0)


LONGEST = 12 + 6
"""Tokens of the prompts below and the new ones."""


@pytest.mark.parametrize("short_of", [(), ("student",), ("teacher",), ("student", "teacher")], ids=str)
def test_a_model_whose_context_is_shorter_than_the_longest_sample_is_refused_by_key(
    layout: Layout, folder: Path, tmp_path: Path, short_of: tuple[str, ...]
) -> None:
    """A context of exactly the longest sample is enough."""
    arch = read_architecture(folder)
    contexts = {name: LONGEST - (name in short_of) for name in ("student", "teacher")}
    models = {name: replace(arch, max_position_embeddings=tokens) for name, tokens in contexts.items()}
    context = context_of(config_of(tmp_path, folder), layout, **models)
    if not short_of:
        assert loaded.check_lengths(context, prompts_of(12)) == LONGEST
        return
    with pytest.raises(ConfigError) as caught:
        loaded.check_lengths(context, prompts_of(12))
    assert [found.partition("; ")[0] for found in caught.value.problems] == [
        f"{name}.path={folder}: its context is {LONGEST - 1} tokens but the longest sample can have {LONGEST}"
        for name in short_of
    ]


def test_short_packs_and_short_contexts_are_reported_together(layout: Layout, folder: Path, tmp_path: Path) -> None:
    narrow = replace(read_architecture(folder), max_position_embeddings=LONGEST - 1)
    config = config_of(tmp_path, folder, batch={"tokens_per_micro_batch": LONGEST - 1})
    with pytest.raises(ConfigError) as caught:
        loaded.check_lengths(context_of(config, layout, teacher=narrow), prompts_of(12))
    keys = [found.split()[0].partition("=")[0] for found in caught.value.problems]
    assert keys == ["batch.tokens_per_micro_batch", "teacher.path"]


def written_prompts(path: Path, *, answer: str | None = "7") -> Path:
    lines = [{"id": f"p{index}", "prompt": "add " * (3 + 4 * index), "answer": answer} for index in range(2)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_loaded_inputs_match_the_files(layout: Layout, folder: Path, tmp_path: Path) -> None:
    data = {"prompts": written_prompts(tmp_path / "prompts.jsonl")}
    config = config_of(tmp_path, folder, data=data, batch={"tokens_per_micro_batch": 99})
    found = read_loaded_inputs(context_of(config, layout))
    assert [prompt.prompt_id for prompt in found.prompts.prompts] == ["p0", "p1"]
    assert found.renderer.eos_ids == (2,) and found.solution_prompts is None
    assert found.longest == found.prompts.longest_prompt + 6
    ignoring = config.model_copy(update={"loss": config.loss.model_copy(update={"ignore_tokens": ("<|im_end|>",)})})
    assert found.ignored != read_loaded_inputs(context_of(ignoring, layout)).ignored


def test_an_objective_that_learns_from_solutions_reads_prompts_with_answers(
    layout: Layout, folder: Path, tmp_path: Path
) -> None:
    def config_for(**data: Any) -> Config:
        return config_of(tmp_path, folder, objective=SDPO, data=data, batch={"tokens_per_micro_batch": 300})

    config = config_for(prompts=written_prompts(tmp_path / "prompts.jsonl"))
    found = read_loaded_inputs(context_of(config, layout))
    assert isinstance(found.solution_prompts, SolutionPrompts)
    longest = found.solution_prompts.longest_without_solution()
    assert longest > found.prompts.longest_prompt
    narrow = replace(read_architecture(folder), max_position_embeddings=longest + 6)
    with pytest.raises(ConfigError, match="student.path=.*its context is .* tokens but the teacher of"):
        read_loaded_inputs(context_of(config, layout, student=narrow))
    read_loaded_inputs(context_of(config, layout, student=replace(narrow, max_position_embeddings=longest + 7)))
    without = config_for(prompts=written_prompts(tmp_path / "without.jsonl", answer=None))
    with pytest.raises(DataError) as caught:
        read_loaded_inputs(context_of(without, layout))
    first, second = str(caught.value).split("\n")
    assert "without.jsonl:1: prompt 'p0' has no `answer`, but objective.kind=sdpo learns from a verifier" in first
    assert "without.jsonl:2: prompt 'p1' has no `answer`" in second


def test_all_requirements_on_the_data_are_checked_at_the_start(layout: Layout, folder: Path, tmp_path: Path) -> None:
    """Ids, answers and stored responses, each with its line. Without guidance no response is needed."""
    responses = tmp_path / "responses.jsonl"
    responses.write_text('{"id": "p0", "response_ids": [3, 307]}\n')
    data = {"prompts": written_prompts(tmp_path / "prompts.jsonl", answer="1\n2"), "teacher_responses": responses}

    def problems(**sections: Any) -> list[str]:
        config = config_of(tmp_path / "run", folder, data=data, **sections)
        with pytest.raises(DataError) as caught:
            read_loaded_inputs(context_of(config, layout))
        return [problem.partition(str(tmp_path))[2][1:] for problem in str(caught.value).split("\n")]

    guided = {"kind": "tropd", "guidance": {"enabled": True}}
    verifier = {"kind": "exact_match"}
    found = problems(objective=guided, verifier=verifier)
    assert [problem.split(": ")[0] for problem in found] == [
        "prompts.jsonl:1", "prompts.jsonl:2", "prompts.jsonl:2", "responses.jsonl:1",
    ]  # fmt: skip
    assert "no response can have the `answer`" in found[0] and "holds token id 307" in found[-1]
    assert sum("has no response in data.teacher_responses" in problem for problem in found) == 1
    off = {"kind": "tropd", "guidance": {"enabled": False}}
    config = config_of(tmp_path / "run", folder, data=data, objective=off, batch={"tokens_per_micro_batch": 99})
    found_prompts = read_loaded_inputs(context_of(config, layout)).prompts.prompts
    assert all(prompt.teacher_response_ids is None for prompt in found_prompts), "what nobody continues is not read"
    responses.unlink()
    read_loaded_inputs(context_of(config, layout))


def test_a_resumed_run_renders_the_date_of_its_first_launch(
    layout: Layout, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dated = write_tiny_model(tmp_path / "dated", num_hidden_layers=1)
    (dated / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": "a", "messages": [{"role": "user", "content": "two pears"}]}\n')

    def text_on(day: date, run: str, accepted: bool = True, **data: Any) -> str:
        monkeypatch.setattr(loaded, "date", SimpleNamespace(today=lambda: day))
        config = config_of(
            tmp_path / run, dated, data={"prompts": prompts} | data, batch={"tokens_per_micro_batch": 99}
        )
        context = context_of(config, layout)
        found = read_loaded_inputs(context)
        assert found.day == (config.data.template_date or context.run_dir.recorded_template_date() or day)
        if accepted:
            context.run_dir.record_template_date(found.day)
        return found.renderer.decode(found.prompts.prompts[0].token_ids)

    assert text_on(date(2024, 2, 28), "run", accepted=False) == "28 Feb 2024 two pears"
    assert text_on(date(2024, 2, 29), "run") == "29 Feb 2024 two pears", "a refused launch leaves no day"
    assert text_on(date(2024, 3, 1), "run") == "29 Feb 2024 two pears", "resumed on the day after"
    assert text_on(date(2024, 3, 1), "other") == "01 Mar 2024 two pears"
    assert text_on(date(2024, 3, 1), "run", template_date="2023-12-31") == "31 Dec 2023 two pears"
    recipe = config_of(tmp_path / "run", dated, data={"prompts": prompts})
    assert template_date(recipe) == date(2024, 2, 29), "the commands beside training use the day of the run"
    assert template_date(config_of(tmp_path / "none", dated)) == date.today()
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("content", ["", "yesterday", "2024-02-30"])
def test_a_damaged_record_of_the_date_gives_a_one_line_error(tmp_path: Path, content: str) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.template_date.write_text(content)
    with pytest.raises(DataError, match=r"template_date: expected the date of the run's first launch [^\n]*"):
        run_dir.recorded_template_date()


def test_an_input_that_one_rank_cannot_read_is_the_same_error_on_all_ranks(folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": "a", "prompt": "two pears"}\n')
    for change in ({"student": {"path": tmp_path / "missing"}}, {"loss": {"ignore_tokens": ["no such token"]}}):
        found = run_on_ranks(read_with_a_fault_on_rank_one, 2, folder, tmp_path, prompts, change)
        assert found[0] == found[1] != "nothing", change


def read_with_a_fault_on_rank_one(folder: Path, tmp_path: Path, prompts: Path, change: dict[str, Any]) -> str:
    """The error on this rank if only rank 1 has a disk or a configuration with something missing."""
    layout = make_layout()
    healthy = config_of(tmp_path / "run", folder, data={"prompts": prompts}, batch={"tokens_per_micro_batch": 99})
    context = context_of(healthy, layout)
    if layout.rank == 1:
        given = {"data": {"prompts": prompts}, "batch": {"tokens_per_micro_batch": 99}} | change
        context = replace(context, config=config_of(tmp_path / "run", folder, **given))
    try:
        read_loaded_inputs(context)
    except TropdError as error:
        return str(error)
    return "nothing"


def held_out_files(tmp_path: Path, *, prompts: list[str], answered: list[str], length: int = 3) -> dict[str, Any]:
    """The section held_out with these prompts, and responses to `answered` of this many tokens."""
    texts = [{"id": name, "prompt": f"many apples {name}"} for name in prompts]
    lines = [{"id": name, "response_ids": [5 + index % 7 for index in range(length)]} for name in answered]
    for name, rows in (("held_out.jsonl", texts), ("responses.jsonl", lines)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"prompts": tmp_path / "held_out.jsonl", "responses": tmp_path / "responses.jsonl"}


def read_held_out(layout: Layout, folder: Path, tmp_path: Path, held_out: dict[str, Any], **sections: Any) -> Any:
    prompts = {"data": {"prompts": written_prompts(tmp_path / "prompts.jsonl")}}
    config = config_of(tmp_path / "run", folder, held_out=held_out, **prompts, **sections)
    return read_loaded_inputs(context_of(config, layout)).held_out


def test_held_out_prompts_are_read_with_their_responses_up_to_the_limit(
    layout: Layout, folder: Path, tmp_path: Path
) -> None:
    names = ["a", "b", "c"]
    found = read_held_out(layout, folder, tmp_path, held_out_files(tmp_path, prompts=names, answered=names))
    assert [prompt.prompt_id for prompt in found.prompts] == names
    assert found.prompts[0].teacher_response_ids.tolist() == [5, 6, 7]
    some = held_out_files(tmp_path, prompts=names, answered=["a", "b"]) | {"limit": 2}
    assert [prompt.prompt_id for prompt in read_held_out(layout, folder, tmp_path, some).prompts] == ["a", "b"]
    without = config_of(tmp_path / "run", folder, data={"prompts": tmp_path / "prompts.jsonl"})
    assert read_loaded_inputs(context_of(without, layout)).held_out is None


def test_wrong_held_out_files_are_refused_by_their_keys(layout: Layout, folder: Path, tmp_path: Path) -> None:
    def problem(held_out: dict[str, Any], **sections: Any) -> str:
        with pytest.raises(TropdError) as caught:
            read_held_out(layout, folder, tmp_path, held_out, **sections)
        return str(caught.value)

    missing = held_out_files(tmp_path, prompts=["a", "b"], answered=["a"])
    assert "prompt 'b' has no response in held_out.responses=" in problem(missing)
    foreign = held_out_files(tmp_path, prompts=["a"], answered=["z"])
    assert "held_out.responses belongs to other prompts" in problem(foreign) and "guidance" not in problem(foreign)
    long = held_out_files(tmp_path, prompts=["a"], answered=["a"], length=600)
    told = problem(long)
    assert "the longest prompt with its response has 6" in told and "batch.tokens_per_micro_batch=" in told
    assert f"the context of student.path={folder} holds 512" in told
    good = held_out_files(tmp_path, prompts=["a"], answered=["a"])
    (tmp_path / "held_out.jsonl").write_bytes(b"PAR1")
    assert problem(good).startswith(f"held_out.prompts={tmp_path / 'held_out.jsonl'}")


def test_held_out_prompts_that_are_trained_on_are_refused_with_their_number(
    layout: Layout, folder: Path, tmp_path: Path
) -> None:
    """They are compared by their tokens, whatever their ids are."""
    held_out = held_out_files(tmp_path, prompts=["a", "b"], answered=["a", "b"])
    lines = [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    trained = json.loads(written_prompts(tmp_path / "prompts.jsonl").read_text().splitlines()[0])
    lines[1] = trained | {"id": "b"}
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(
        DataError, match=r"held_out\.prompts=.*: 1 of its 2 prompts are also in data\.prompts=.*'b'"
    ) as caught:
        read_held_out(layout, folder, tmp_path, held_out)
    assert "\n" not in str(caught.value)


def test_more_held_out_candidates_than_tokens_are_refused(layout: Layout, folder: Path, tmp_path: Path) -> None:
    held_out = held_out_files(tmp_path, prompts=["a"], answered=["a"]) | {"topk": 308}
    config = config_of(tmp_path / "run", folder, held_out=held_out)
    with pytest.raises(ConfigError, match=r"held_out\.topk = 308 but a vocabulary has 307 tokens"):
        loaded.check_vocabularies(context_of(config, layout))
