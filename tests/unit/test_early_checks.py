"""Wrong files on a command line are reported at once, before anything heavy is imported or started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_models import write_tiny_model
from tropd_mcore.cli import main as cli
from tropd_mcore.cli import server as server_module
from tropd_mcore.serving.process import ServerSpec
from tropd_mcore.serving.supervisor import SupervisedServer

RECIPE = """\
run: {dir: DIR/run}
platform: {kind: cpu}
student: {path: DIR/student}
teacher: {path: DIR/teacher}
data: {prompts: DIR/prompts.jsonl, teacher_responses: DIR/responses.jsonl}
verifier: {kind: exact_match}
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe whose files all exist. Starting a server fails the test."""
    for name in ("student", "teacher"):
        write_tiny_model(tmp_path / name, num_hidden_layers=1)
    (tmp_path / "prompts.jsonl").write_text('{"id": "a", "prompt": "two pears", "answer": "2"}\n')
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("DIR", str(tmp_path)))

    def started(spec: ServerSpec) -> SupervisedServer:
        raise AssertionError(f"{spec.key} was started")

    monkeypatch.setattr(server_module, "SupervisedServer", started)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], root: Path, command: str, *arguments: str) -> list[str]:
    """The lines of a refused command, without their prefixes."""
    assert cli.main([command, *(argument.replace("DIR", str(root)) for argument in arguments)]) == 2
    text = capsys.readouterr().err.removeprefix("error: ").replace(str(root), "DIR")
    return text.splitlines()


EVAL = ["DIR/recipe.yaml", "--model", "DIR/student", "--prompts", "DIR/prompts.jsonl", "--out", "DIR/result.json"]


def with_option(arguments: list[str], option: str, value: str) -> list[str]:
    return [*arguments, option, value]


@pytest.mark.parametrize(
    ("option", "value", "line"),
    [
        ("--prompts", "DIR/nope", "--prompts DIR/nope: not found; expected a JSONL file whose lines have an `answer`"),
        ("--prompts", "DIR/student", "--prompts DIR/student: is a folder; expected a JSONL file whose lines have an"),
        ("--model", "DIR/nope", "tropd eval: no model folder at DIR/nope; give --model, or train to the end for an"),
        ("--model", "DIR", "--model DIR: config.json not found there; expected a Hugging Face model folder"),
        ("--out", "DIR/student", "--out DIR/student: is a folder; expected the name of a file"),
        ("--out", "DIR/prompts.jsonl/x", "--out DIR/prompts.jsonl/x: is a file; choose another place"),
        ("--compare-with", "DIR/nope", "--compare-with DIR/nope: not found; expected a result of `tropd eval`"),
        ("--compare-with", "DIR/prompts.jsonl", "DIR/prompts.jsonl: expected a result of `tropd eval`"),
        ("--url", "http://127.0.0.1:9", "rollout.server.api_key_env=NO_SUCH_KEY: this environment variable is unset"),
    ],
)
def test_eval_finds_wrong_options_before_it_starts_a_server(
    capsys: pytest.CaptureFixture[str], root: Path, option: str, value: str, line: str
) -> None:
    keys = (
        ["rollout.server.url=http://127.0.0.1:9", "rollout.server.api_key_env=NO_SUCH_KEY"] if option == "--url" else []
    )
    (found,) = refused(capsys, root, "eval", *with_option(EVAL, option, value), *keys)
    assert found.startswith(line)


def test_eval_reports_all_problems_at_once(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    arguments = ["DIR/recipe.yaml", "--prompts", "DIR/nope", "--out", "DIR/student", "--compare-with", "DIR/nope"]
    assert len(refused(capsys, root, "eval", *arguments, "teacher.path=DIR/nope", "verifier.kind=none")) == 6


def test_eval_reads_the_prompts_before_it_starts_a_server(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    (root / "prompts.jsonl").write_text('{"id": "a", "prompt": "two pears"}\n')
    (found,) = refused(capsys, root, "eval", *EVAL)
    assert "prompts.jsonl:1: prompt 'a' has no `answer`, but `tropd eval` judges by it" in found


def test_eval_finds_a_missing_verifier_before_it_starts_a_server(
    capsys: pytest.CaptureFixture[str], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("cli.early_checks", "train.preflight_machine"):
        monkeypatch.setattr(f"tropd_mcore.{module}.importable", lambda name: False)
    (found,) = refused(capsys, root, "eval", *EVAL, "verifier.kind=math_verify")
    assert found.startswith("verifier.kind=math_verify needs the package math_verify, which is not installed")
    (found,) = refused(capsys, root, "eval", *EVAL)
    assert found.startswith("starting a server needs the package sglang")


@pytest.mark.parametrize(
    ("command", "teacher", "section"),
    [
        ("eval", "megatron", "rollout.server"),
        ("prefixes", "megatron", "rollout.server"),
        ("prefixes", "sglang", "teacher.server"),
    ],
)
def test_an_unusable_interpreter_of_a_server_is_found_before_it_starts(
    capsys: pytest.CaptureFixture[str], root: Path, command: str, teacher: str, section: str
) -> None:
    arguments = EVAL if command == "eval" else ["DIR/recipe.yaml"]
    keys = [f"teacher.kind={teacher}", f"{section}.python=DIR/nope/bin/python"]
    (found,) = refused(capsys, root, command, *arguments, *keys)
    assert found.startswith(f"{section}.python=DIR/nope/bin/python: not found; expected a Python 3.")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("student.path=DIR/nope", "student.path=DIR/nope: not found; expected a Hugging Face model folder"),
        ("teacher.path=DIR", "teacher.path=DIR: config.json not found there; expected a Hugging Face model folder"),
        ("data.prompts=DIR/nope", "data.prompts=DIR/nope: not found; expected a JSONL file"),
        (
            "data.teacher_responses=DIR/student",
            "data.teacher_responses=DIR/student: is a folder; expected the name of a",
        ),
        ("data.teacher_responses=DIR/recipe.yaml/x", "data.teacher_responses=DIR/recipe.yaml/x: is a file; choose"),
    ],
)
def test_prefixes_finds_wrong_options_before_it_starts_a_server(
    capsys: pytest.CaptureFixture[str], root: Path, override: str, line: str
) -> None:
    (found,) = refused(capsys, root, "prefixes", "DIR/recipe.yaml", override)
    assert found.startswith(line)


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["hf-to-mcore", "--hf", "DIR/nope", "--out", "DIR/student"], [
            "--hf DIR/nope: not found; expected a Hugging Face model folder",
            "--out DIR/student: not empty; choose a new folder or remove its content",
        ]),
        (["hf-to-mcore", "--hf", "DIR", "--out", "DIR/recipe.yaml"], [
            "--hf DIR: config.json not found there; expected a Hugging Face model folder",
            "--out DIR/recipe.yaml: a file of that name exists; expected a new or empty folder",
        ]),
        (["mcore-to-hf", "--mcore", "DIR/run", "--out", "DIR/new/deeper"], [
            "--mcore DIR/run: no tropd.json in it; expected a complete checkpoint folder; did you mean "
            "DIR/run/checkpoints/step_000004?",
        ]),
        (["mcore-to-hf", "--mcore", "DIR/nope", "--out", "DIR/recipe.yaml/x"], [
            "--mcore DIR/nope: not found; expected a checkpoint folder",
            "--out DIR/recipe.yaml/x: is a file; choose another place",
        ]),
        (["verify", "--hf", "DIR/student", "--other-hf", "DIR/nope"], [
            "--other-hf DIR/nope: not found; expected a Hugging Face model folder",
        ]),
    ],
)  # fmt: skip
def test_convert_finds_wrong_paths_before_it_loads_a_model(
    capsys: pytest.CaptureFixture[str], root: Path, arguments: list[str], lines: list[str]
) -> None:
    for step in (2, 4):
        folder = root / "run" / "checkpoints" / f"step_{step:06d}"
        folder.mkdir(parents=True)
        (folder / "tropd.json").touch()
    assert refused(capsys, root, "convert", *arguments) == lines


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", "DIR/recipe.yaml", "--prompts", "DIR/nope", "--model", "DIR/student"],
        ["prefixes", "DIR/recipe.yaml", "data.prompts=DIR/nope"],
        ["convert", "verify", "--hf", "DIR/nope", "--other-hf", "DIR/nope"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_wrong_path_is_found_without_heavy_imports(root: Path, arguments: list[str]) -> None:
    code = (
        "import sys; from tropd_mcore.cli.main import main\n"
        "assert main(sys.argv[1:]) == 2\n"
        "print(sorted({'torch', 'megatron', 'transformers', 'aiohttp', 'sglang'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, *(argument.replace("DIR", str(root)) for argument in arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ}, check=True)
    assert result.stdout == "[]\n", result.stderr


def test_prefixes_names_the_teachers_server_and_the_section_of_its_settings(
    capsys: pytest.CaptureFixture[str], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher in the training job has no server section. Its server is configured like that of the rollouts."""
    specs: list[ServerSpec] = []

    def started(spec: ServerSpec) -> SupervisedServer:
        specs.append(spec)
        raise KeyboardInterrupt

    monkeypatch.setattr(server_module, "SupervisedServer", started)
    assert cli.main(["prefixes", str(root / "recipe.yaml")]) == 130
    assert cli.main(["prefixes", str(root / "recipe.yaml"), "teacher.kind=sglang"]) == 130
    assert [(spec.key, spec.title, spec.name, spec.model_key) for spec in specs] == [
        ("rollout.server", "the teacher's server (settings of rollout.server)", "prefixes", "teacher.path"),
        ("teacher.server", None, "prefixes", "teacher.path"),
    ]
