"""The job and `tropd doctor` run the same start checks and report the same fault in the same words."""

from __future__ import annotations

import json
import logging
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.glue.launches import swap_two_tokens
from tests.glue.stubs import one_rank
from tests.tiny_models import write_moe_teacher, write_tiny_model
from tropd_mcore.cli.checks_of_start import start_checks
from tropd_mcore.cli.findings import Finding
from tropd_mcore.config.loader import load
from tropd_mcore.config.plan import resolved_yaml
from tropd_mcore.config.schema import Config
from tropd_mcore.errors import TropdError
from tropd_mcore.mcore.parallel import Layout, RankEnvironment
from tropd_mcore.records.run_dir import RunDir
from tropd_mcore.rollout.response_origin import ResponseOrigin, origin_file
from tropd_mcore.train import job, preflight_machine
from tropd_mcore.train.start_checks import START_CHECKS, State

RECIPE = """\
run: {dir: DIR/run, steps: 8}
platform: {kind: auto}
student: {path: DIR/student}
teacher: {path: DIR/teacher}
data: {prompts: DIR/prompts.jsonl, teacher_responses: DIR/responses.jsonl, max_prompt_tokens: 64}
rollout: {max_new_tokens: 32}
objective: {kind: tropd, outlier: {topk: 3}, guidance: {min_continuation: 1}}
batch: {tokens_per_micro_batch: 256}
"""
ALONE = RankEnvironment(rank=0, world_size=1, local_rank=0)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("student", "teacher")):
        write_tiny_model(root / name, num_hidden_layers=1, seed=seed)
    return root


@pytest.fixture
def root(tmp_path: Path, models: Path) -> Path:
    """A run that could start."""
    for name in ("student", "teacher"):
        shutil.copytree(models / name, tmp_path / name)
    (tmp_path / "prompts.jsonl").write_text('{"id": "a", "prompt": "two pears"}\n')
    (tmp_path / "responses.jsonl").write_text('{"id": "a", "response_ids": [5, 6]}\n')
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("DIR", str(tmp_path)))
    return tmp_path


@pytest.fixture
def layout() -> Iterator[Layout]:
    with one_rank() as layout:
        yield layout


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, layout: Layout) -> Callable[[Config], State | None]:
    """A job up to its first server and model. Returns the state of its checks. Raises like the job."""
    trained: list[State] = []
    state_of = State.of.__func__  # type: ignore[attr-defined]

    def of(cls: type[State], context: Any) -> State:
        trained.append(state_of(cls, context))
        return trained[-1]

    def train(context: Any, loaded: Any, start: Any, cleanup: ExitStack) -> None:
        assert loaded.prompts is not None and start.first_step == 0

    monkeypatch.setattr(State, "of", classmethod(of))
    monkeypatch.setattr(job, "choose", lambda kind, local_rank: SimpleNamespace(name="cpu", device="cpu"))
    monkeypatch.setattr(job, "initialize", lambda *_, **__: layout)
    monkeypatch.setattr(job, "destroy", lambda _: None)
    monkeypatch.setattr(job, "_train", train)

    def start(config: Config) -> State | None:
        job.run_job(config, defaultdict(lambda: "test"), ALONE)
        return trained[-1] if trained else None

    return start


def config_in(root: Path, *overrides: str) -> Config:
    return load(root / "recipe.yaml", [override.replace("{root}", str(root)) for override in overrides])[0]


def test_doctor_and_job_run_exactly_the_listed_checks(root: Path, started: Callable[[Config], State | None]) -> None:
    with_records(root)
    config = config_in(root)
    state = State(config, RunDir(config.run.dir))
    findings = list(start_checks(config, state=state))
    assert all(finding.level in ("ok", "warn") for finding in findings), findings
    job_state = started(config)
    assert job_state is not None
    before_groups = ["config.json", "loss.backend"]
    names = [check.name for check in START_CHECKS]
    assert sorted(before_groups + job_state.done) == sorted(names) == sorted(state.done)
    assert job_state.inputs is not None and state.inputs is not None
    together, alone = job_state.inputs, state.inputs.model_copy(update={"launch": job_state.inputs.launch})
    assert alone == together, "what doctor reads alone is what the ranks read together"


def with_records(root: Path) -> None:
    """Rollouts and a record of the previous launch, so that contents are compared."""
    run = RunDir(root / "run")
    run.rollouts(0).parent.mkdir(parents=True)
    run.rollouts(0).touch()
    config, sources = load(root / "recipe.yaml", [])
    run.config.write_text(resolved_yaml(config, sources))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def pointer(root: Path) -> None:
    (root / "teacher" / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def other_teacher(root: Path) -> None:
    record = ResponseOrigin(
        teacher="elsewhere",
        files={"model.safetensors": "0" * 64},
        dtype="float32",
        temperature=1.0,
        top_p=1.0,
        max_new_tokens=8,
        end_ids=(2,),
        day=None,
        prompts={"a": "0" * 64},
    )
    origin_file(root / "responses.jsonl").write_text(record.model_dump_json())


FAULTS: dict[str, tuple[Callable[[Path], object] | None, list[str], str, str]] = {
    "prompts missing": (
        lambda root: (root / "prompts.jsonl").unlink(), [],
        "data.prompts", "not found; expected a JSONL",
    ),
    "prompt without text": (
        lambda root: (root / "prompts.jsonl").write_text('{"id": "a"}\n{"id": "b"}\n'), [],
        "data.prompts", "found neither",
    ),
    "prompt without response": (
        lambda root: (root / "prompts.jsonl").write_text('{"id": "b", "prompt": "two pears"}\n'), [],
        "data.prompts", "has no response in data.teacher_responses",
    ),
    "prompt too long": (None, ["data.max_prompt_tokens=1"], "data.prompts", "but data.max_prompt_tokens is 1"),
    "unknown family": (
        lambda root: edit_json(root / "teacher" / "config.json", model_type="gpt9"), [],
        "teacher.path", "teacher.path: ",
    ),
    "a mixture of experts in the job": (
        lambda root: edit_json(root / "teacher" / "config.json", model_type="qwen3_moe"), [],
        "teacher.path", "supported are llama, qwen2, qwen3 (dense); a teacher of any model that SGLang serves can run "
        "behind a server: set teacher.kind=sglang",
    ),
    "a student that only a server could have": (
        lambda root: edit_json(root / "student" / "config.json", model_type="qwen3_moe"), ["teacher.kind=sglang"],
        "student.path", "supported are llama, qwen2, qwen3 (dense)",
    ),
    "a served teacher whose config.json lacks a size": (
        lambda root: edit_json(root / "teacher" / "config.json", model_type="gpt9", vocab_size=None),
        ["teacher.kind=sglang"],
        "teacher.path", "config.json: vocab_size is None; expected a positive integer",
    ),
    "a served teacher with a short context": (
        lambda root: edit_json(root / "teacher" / "config.json", model_type="gpt9", max_position_embeddings=16),
        ["teacher.kind=sglang"],
        "lengths", "its context is 16 tokens",
    ),
    "a served teacher with another vocabulary": (
        lambda root: [edit_json(root / "teacher" / "config.json", model_type="g"), swap_two_tokens(root / "teacher")],
        ["teacher.kind=sglang", "gates.tokenizer=false"],
        "vocabulary", "differ in 2 of",
    ),
    "a served teacher with a truncated shard": (
        lambda root: [edit_json(root / "teacher" / "config.json", model_type="g"), cut(root / "teacher")],
        ["teacher.kind=sglang"],
        "weights", "teacher.path: ",
    ),
    "a served dense teacher with weights of another shape": (
        lambda root: edit_json(root / "teacher" / "config.json", intermediate_size=24), ["teacher.kind=sglang"],
        "weights", "config.json asks for",
    ),
    "config.json contradicts itself": (
        lambda root: edit_json(root / "student" / "config.json", hidden_act="gelu"), [],
        "student.path", "hidden_act is 'gelu'",
    ),
    "weights of another shape": (
        lambda root: edit_json(root / "teacher" / "config.json", intermediate_size=24), [],
        "weights", "config.json asks for",
    ),
    "context too short": (
        lambda root: edit_json(root / "teacher" / "config.json", max_position_embeddings=16), [],
        "lengths", "its context is 16 tokens",
    ),
    "tokenizer is a pointer": (pointer, [], "tokenizer", "Git LFS pointer"),
    "another vocabulary": (
        lambda root: swap_two_tokens(root / "teacher"), ["gates.tokenizer=false"],
        "vocabulary", "differ in 2 of",
    ),
    "more candidates than tokens": (None, ["objective.outlier.topk=400"], "vocabulary", "objective.outlier.topk = 400"),
    "unknown end token": (None, ["rollout.end_tokens=[nope]"], "rollout.end_tokens", "is no token of the student"),
    "unknown token to ignore": (None, ["loss.ignore_tokens=[no such]"], "loss.ignore_tokens", "loss.ignore_tokens"),
    "objective that cannot be imported": (
        None, ["objective={kind: custom, function: 'no.such:thing'}"], "objective", "no.such",
    ),
    "kernels of another platform": (None, ["loss.backend=triton"], "loss.backend", "loss.backend=triton needs CUDA"),
    "begins from no checkpoint": (None, ["run.init_from={root}/student"], "run.dir", "a Hugging Face folder"),
    "a recorded value changed": (
        with_records, ["rollout.temperature=0.5"],
        "run.dir", "rollout.temperature: 1.0 -> 0.5",
    ),
    "a damaged day": (
        lambda root: [RunDir(root / "run").root.mkdir(), RunDir(root / "run").template_date.write_text("soon")], [],
        "run.dir", "expected the date of the run's first launch",
    ),
    "responses of another teacher": (other_teacher, [], "data.teacher_responses", "responses of another teacher"),
    "a package that is missing": (
        None, ["monitor.wandb_project=p"],
        "monitor.wandb_project", "needs the package wandb",
    ),
}  # fmt: skip
"""Fault -> how it is planted, the overrides, the key under which doctor reports it, words of the line."""


@pytest.mark.parametrize("name", FAULTS)
def test_doctor_and_the_job_report_a_planted_fault_in_the_same_way(
    root: Path,
    started: Callable[[Config], State | None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    plant, overrides, key, words = FAULTS[name]
    if plant is not None:
        plant(root)
    if "package" in name:
        found = preflight_machine.importable
        monkeypatch.setattr(preflight_machine, "importable", lambda module: module != "wandb" and found(module))
    config = config_in(root, *overrides)
    before = sorted(str(path) for path in root.rglob("*"))
    with caplog.at_level(logging.ERROR):
        failed = [finding for finding in start_checks(config) if finding.level == "FAIL"]
    assert sorted(str(path) for path in root.rglob("*")) == before, "doctor writes nothing"
    assert failed and {finding.name for finding in failed} == {key}, failed
    with pytest.raises(TropdError) as caught:
        started(config)
    assert str(caught.value).splitlines() == [finding.detail for finding in failed]
    assert words in failed[0].detail


def test_a_served_teacher_may_be_any_model_with_the_students_tokens(
    root: Path, started: Callable[[Config], State | None]
) -> None:
    """A mixture of experts, also wrapped into a multimodal model, quantised, or with a rotary scaling of its own."""
    shutil.rmtree(root / "teacher")
    write_moe_teacher(root / "teacher", root / "student")
    path = root / "teacher" / "config.json"
    given = json.loads(path.read_text())
    sizes = {"vocab_size": 307, "max_position_embeddings": 4096, "num_attention_heads": 4}
    for config in (
        given,
        {"model_type": "kimi_k9", "architectures": ["KimiForConditionalGeneration"], "text_config": sizes},
        given | {"quantization_config": {"quant_method": "fp8"}, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    ):
        path.write_text(json.dumps(config))
        served = config_in(root, "teacher.kind=sglang")
        findings = list(start_checks(served))
        assert [finding for finding in findings if finding.level == "FAIL"] == []
        state = started(served)
        assert state is not None
        teacher = state.models["teacher.path"]
        assert teacher.vocab_size == 307 and teacher.family == config["model_type"]


def test_warnings_of_a_check_become_findings_instead_of_log_lines(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "run" / "checkpoints" / "step_000002").mkdir(parents=True)
    found: list[Finding] = list(start_checks(config_in(root)))
    warning, *_ = [finding for finding in found if finding.level == "warn" and finding.name == "run.dir"]
    assert "is left out; it is damaged" in warning.detail and caplog.messages == []
    assert logging.getLogger("tropd_mcore").propagate
