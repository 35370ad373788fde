"""From a configuration to a finished run over stubs: created components, refusals, and the end of a run."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.glue.contexts import SDPO, config_of, context_of
from tests.glue.stubs import NamedPolicy, make_config, one_rank
from tests.tiny_models import write_tiny_model
from tropd_mcore.config.schema import Config
from tropd_mcore.errors import ConfigError, DataError
from tropd_mcore.mcore.checkpoint import TrainState
from tropd_mcore.mcore.checkpoint_info import INFO_FILE, step_folder
from tropd_mcore.mcore.parallel import Layout, RankEnvironment
from tropd_mcore.records.run_dir import RunDir
from tropd_mcore.teacher.served import ServedTeacher
from tropd_mcore.train import job
from tropd_mcore.train.components import JobContext, Servers
from tropd_mcore.train.start import accept, open_launch
from tropd_mcore.train.start_checks import INPUT_CHECKS, State
from tropd_mcore.weights.publish import new_folder

STEPS = 4
MATERIAL = SimpleNamespace(prompts="the prompts")
SOURCES: dict[str, str] = defaultdict(lambda: "test")
"""The source of every value of the configuration."""
ALONE = RankEnvironment(rank=0, world_size=1, local_rank=0)
GUIDED = {"kind": "tropd", "outlier": {"topk": 3}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose vocabulary has 307 tokens and whose context has 512."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=1)


@pytest.fixture
def layout() -> Iterator[Layout]:
    with one_rank() as layout:
        yield layout


def checkpoint_at(run_dir: Path, step: int) -> Path:
    """A folder that counts as a complete checkpoint."""
    folder = step_folder(RunDir(run_dir).checkpoints, step)
    folder.mkdir(parents=True)
    (folder / INFO_FILE).write_text("{}")
    return folder


def exported_at(run_dir: Path, step: int) -> None:
    RunDir(run_dir).export.mkdir(parents=True, exist_ok=True)
    RunDir(run_dir).export_step.write_text(f"{step}\n")


def start_at(first_step: int, **given: Any) -> Any:
    """A start without records."""
    return SimpleNamespace(
        **{"first_step": first_step, "checkpoint": None, "source": None, "inputs": "inputs", "phase": None, **given}
    )


class Run:
    """`run_job` with components that only record their calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, layout: Layout) -> None:
        self.did: list[str] = []
        self.trained_from: int | None = None
        self.fail: Exception | None = None
        monkeypatch.setattr(job, "choose", lambda kind, local_rank: SimpleNamespace(name="cpu", device="cpu"))
        monkeypatch.setattr(job, "initialize", lambda *_, **__: self._did("initialize", layout))
        monkeypatch.setattr(job, "destroy", lambda _: self._did("destroy", None))
        monkeypatch.setattr(job, "run_checks", self._check)
        monkeypatch.setattr(State, "loaded_inputs", lambda _: MATERIAL)
        monkeypatch.setattr(job, "read_inputs", lambda _: self._did("inputs", "inputs"))
        monkeypatch.setattr(job, "make_start", lambda context, opened, inputs, sources: start_at(opened.first_step))
        monkeypatch.setattr(job, "_train", self._train)

    def _did(self, what: str, value: Any) -> Any:
        self.did.append(what)
        return value

    def _check(self, checks: Any, state: State, context: JobContext) -> None:
        if checks is INPUT_CHECKS:
            state.opened = open_launch(context)
        self.did.append("loaded" if checks is INPUT_CHECKS else "contents")

    def _train(self, context: JobContext, loaded: Any, start: Any, cleanup: ExitStack) -> None:
        assert loaded is MATERIAL
        self.did.append("train")
        self.trained_from = start.first_step
        if self.fail is not None:
            raise self.fail


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, layout: Layout) -> Run:
    return Run(monkeypatch, layout)


@pytest.mark.parametrize(
    ("steps_done", "export_at_end", "export_of", "trained_from"),
    [
        pytest.param(STEPS, True, STEPS, None, id="complete and exported"),
        pytest.param(STEPS, False, None, None, id="complete, no export asked for"),
        pytest.param(STEPS, False, 2, None, id="complete, no export asked for, an old one there"),
        pytest.param(STEPS, True, None, STEPS, id="complete, export missing"),
        pytest.param(STEPS, True, 2, STEPS, id="complete, export of an earlier step"),
        pytest.param(2, True, 2, 2, id="half, exported"),
        pytest.param(2, False, None, 2, id="half, no export asked for"),
        pytest.param(0, True, None, 0, id="new"),
        pytest.param(0, False, None, 0, id="new, no export asked for"),
    ],
)
def test_a_run_with_all_steps_and_the_requested_export_has_nothing_left_to_do(
    run: Run,
    folder: Path,
    tmp_path: Path,
    steps_done: int,
    export_at_end: bool,
    export_of: int | None,
    trained_from: int | None,
) -> None:
    config = config_of(tmp_path, folder, run={"export_at_end": export_at_end})
    if steps_done:
        checkpoint_at(tmp_path, steps_done)
    if export_of is not None:
        exported_at(tmp_path, export_of)
    job.run_job(config, SOURCES, ALONE)
    assert run.trained_from == trained_from
    trained = ["inputs", "contents", "train"] * (trained_from is not None)
    assert run.did == ["initialize", "loaded", *trained, "destroy"]


def test_lock_and_process_groups_are_released_if_training_fails(run: Run, folder: Path, tmp_path: Path) -> None:
    run.fail = DataError("broken")
    config = config_of(tmp_path, folder)
    for _ in range(2):
        with pytest.raises(DataError, match="broken"):
            job.run_job(config, SOURCES, ALONE)
    assert run.did[-2:] == ["train", "destroy"] and run.did.count("destroy") == 2


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"parallel": {"tensor": 2}}, "does not divide the 1 ranks of this launch"),
        ({"loss": {"backend": "triton"}}, "loss.backend=triton needs CUDA"),
    ],
    ids=["ranks", "backend"],
)
def test_a_configuration_that_does_not_fit_the_machine_is_refused_before_any_group_is_made(
    run: Run, folder: Path, tmp_path: Path, sections: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        job.run_job(config_of(tmp_path / "run", folder, **sections), SOURCES, ALONE)
    assert run.did == [] and not (tmp_path / "run").exists()


class Components:
    """`_make_components` over stubs. Keeps the arguments of the components."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, teacher: Any = "scorer") -> None:
        self.dry_runs: list[Any] = []
        self.closed = 0
        self.scores: dict[str, Any] = {}
        self.scorer: Any = None
        self.fallible: Any = None
        self.made: Any = None
        stubs: dict[str, Any] = {
            "teacher_model": lambda context: "frozen teacher",
            "reference_model": lambda context: "reference",
            "check_model": lambda context, key, model, inputs: None,
            "probe_memory": lambda student, *_, **given: self.dry_runs.append(given),
            "make_policy": lambda *_: NamedPolicy("policy"),
            "sampler_bounds": lambda *_: "bounds",
            "make_teacher": lambda *_: teacher,
            "make_self_teacher": lambda context, average, *_: f"self teacher of the {average}",
            "raise_on_all_ranks": lambda control: nullcontext(),
            "Monitor": lambda *_, start_step: SimpleNamespace(close=self._close, start_step=start_step),
            "ScoreSource": self._score_source,
            "RolloutSource": lambda config, run_dir, prompts, policy, layout, vocab_size, end_id: SimpleNamespace(
                policy=policy
            ),
            "PrefixLosses": self._prefix_losses,
            "scorer_name": lambda config, inputs, identities: f"{inputs}: {config.teacher.path}{identities[None]}",
            "BatchContextSource": lambda config, student, reference: SimpleNamespace(reference=reference),
        }
        for name, stub in stubs.items():
            monkeypatch.setattr(job, name, stub)

    def _close(self) -> None:
        self.closed += 1

    def _score_source(self, scorer: Any, *_: Any, **given: Any) -> str:
        self.scorer, self.scores = scorer, given
        return "scores"

    def _prefix_losses(self, fallible: Any, scores: Any, rollouts: Any) -> str:
        assert scores == "scores"
        self.fallible = fallible
        return "prefixes"

    def make(self, config: Config, *, average: Any = None, solution_prompts: Any = None) -> Components:
        state = TrainState("student", "optimizer", "scheduler", average)  # type: ignore[arg-type]
        loaded: Any = SimpleNamespace(
            renderer="renderer",
            prompts="prompts",
            ignored="ignored",
            longest=9,
            solution_prompts=solution_prompts,
            ends=SimpleNamespace(end_id=2),
            excluded=(),
        )
        layout: Any = SimpleNamespace(rank=0, groups=SimpleNamespace(control="control"))
        models: Any = {"student.path": SimpleNamespace(vocab_size=307)}
        platform: Any = SimpleNamespace()
        context = JobContext(config, platform, layout, RunDir(config.run.dir), models)
        with ExitStack() as cleanup:
            self.made = job._make_components(context, loaded, state, Servers(), start_at(2), cleanup)
            assert self.closed == 0
        assert self.closed == 1
        return self


def test_stored_scores_are_named_after_the_inputs_of_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Components(monkeypatch).make(make_config()).scores["name"] == "inputs: teacher"


@pytest.mark.parametrize(
    ("objective", "on_disk"),
    [
        ({"kind": "opd", "topk": 3}, True),
        ({"kind": "gkd", "topk": 3}, True),
        ({"kind": "gkd", "topk": 3, "full_vocabulary": True}, False),
        (SDPO, False),
    ],
    ids=str,
)
def test_scores_with_hidden_states_or_of_a_teacher_that_moves_are_not_kept_on_disk(
    monkeypatch: pytest.MonkeyPatch, objective: dict[str, Any], on_disk: bool
) -> None:
    assert Components(monkeypatch).make(make_config(objective=objective)).scores["on_disk"] is on_disk


def test_a_replay_has_no_sampler_and_reads_scores_of_the_replayed_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    replayed = Components(monkeypatch).make(make_config(run={"replay": tmp_path}))
    assert replayed.made.rollouts.policy is None and replayed.scores["replay"] == tmp_path
    sampled = Components(monkeypatch).make(make_config())
    assert sampled.made.rollouts.policy == "policy" and sampled.scores["replay"] is None


def test_the_average_scores_only_if_there_are_prompts_with_solutions(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(objective=SDPO)
    both = Components(monkeypatch).make(config, average="average", solution_prompts="prompts with solutions")
    assert both.scorer == "self teacher of the average" and both.made.average == "average"
    assert Components(monkeypatch).make(config, average="average").scorer == "scorer"
    assert Components(monkeypatch).make(config, solution_prompts="prompts with solutions").scorer == "scorer"


@pytest.mark.parametrize("loss", ["topk_fkl", "none"])
@pytest.mark.parametrize("is_served", [True, False])
def test_only_a_served_teacher_with_a_prefix_loss_is_treated_as_fallible(
    monkeypatch: pytest.MonkeyPatch, loss: str, is_served: bool
) -> None:
    nowhere: Any = SimpleNamespace()
    served = ServedTeacher(None, nowhere, topk=3, only_rank_zero=True, masked_share=1.0)
    teacher: Any = served if is_served else "scorer"
    config = make_config(objective=GUIDED | {"guidance": {"loss": loss}})
    parts = Components(monkeypatch, teacher).make(config)
    assert parts.scorer is teacher
    assert parts.fallible is (teacher if is_served and loss != "none" else None)


def test_the_longest_pack_is_tried_before_training_if_the_gate_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Components(monkeypatch).make(make_config(gates={"longest_sequence": False})).dry_runs == []
    (tried,) = Components(monkeypatch).make(make_config(objective=SDPO)).dry_runs
    assert tried == {"tokens_per_micro_batch": 24, "k": 3, "student_topk": 5, "teacher": None}
    whole = make_config(objective={"kind": "gkd", "topk": 3, "full_vocabulary": True})
    (tried,) = Components(monkeypatch).make(whole).dry_runs
    assert tried["teacher"] == "frozen teacher"


def test_metrics_of_repeated_steps_are_dropped_and_the_reference_model_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Components(monkeypatch).make(make_config(objective={"kind": "exopd", "topk": 3})).made
    assert made.monitor.start_step == 2 and made.context.reference == "reference"


def write_export(student: Any, layout: Any, out: Path, *, source_folder: Path) -> None:
    """Like the real one, it refuses a folder that is not empty."""
    with new_folder(out) as partial:
        (partial / "config.json").write_text(json.dumps({"source": str(source_folder)}))


def test_an_export_replaces_the_former_one_and_the_remains_of_an_interrupted_one(
    monkeypatch: pytest.MonkeyPatch, layout: Layout, folder: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(job, "export_hf", write_export)
    for name in ("export", "export.fresh"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old.safetensors").write_text("old")
    context = context_of(config_of(tmp_path, folder), layout)
    job.export(context, "student", 7)  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "export.step"]
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["config.json"]
    assert json.loads((tmp_path / "export" / "config.json").read_text()) == {"source": str(folder)}
    assert context.run_dir.exported_at() == 7


def test_ranks_other_than_0_touch_no_export(
    monkeypatch: pytest.MonkeyPatch, layout: Layout, folder: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(job, "export_hf", lambda *_, **__: None)
    (tmp_path / "export.fresh").mkdir()
    job.export(context_of(config_of(tmp_path, folder), replace(layout, rank=1)), "student", 7)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["export.fresh"]


def test_a_run_directory_is_held_until_the_end(layout: Layout, folder: Path, tmp_path: Path) -> None:
    context = context_of(config_of(tmp_path, folder), layout)
    with ExitStack() as cleanup:
        job._hold_run_dir(context, cleanup)
        with pytest.raises(ConfigError, match="in use by another job"):
            job._hold_run_dir(context, cleanup)
    with ExitStack() as cleanup:
        job._hold_run_dir(context, cleanup)


def test_ranks_other_than_0_write_nothing_in_the_run_directory(layout: Layout, folder: Path, tmp_path: Path) -> None:
    context = context_of(config_of(tmp_path / "run", folder), replace(layout, rank=1))
    held = RunDir(tmp_path / "run").lock()
    with ExitStack() as cleanup:
        job._hold_run_dir(context, cleanup)
        accept(context, start_at(0), date(2024, 2, 29))
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
        context.run_dir.check_held()
        (tmp_path / "run").rename(tmp_path / "elsewhere")
        with pytest.raises(DataError, match=r"run\.dir: .* was removed or replaced"):
            context.run_dir.check_held()
    held.release()


def test_the_first_step_is_the_number_of_steps_of_the_newest_complete_checkpoint(
    layout: Layout, folder: Path, tmp_path: Path
) -> None:
    context = context_of(config_of(tmp_path, folder), layout)
    assert (open_launch(context).first_step, open_launch(context).checkpoint) == (0, None)
    for step in (2, 10, 9):
        checkpoint_at(tmp_path, step)
    step_folder(context.run_dir.checkpoints, 11).mkdir()
    opened = open_launch(context)
    assert (opened.first_step, opened.checkpoint) == (10, step_folder(context.run_dir.checkpoints, 10))
