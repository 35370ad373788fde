"""From a configuration to a finished run over stubs: the order of models, weights, records and steps."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.glue.contexts import config_of, context_of
from tests.glue.stubs import one_rank
from tests.tiny_models import write_tiny_model
from tropd_mcore.config.schema import Config
from tropd_mcore.errors import DataError
from tropd_mcore.mcore.checkpoint import TrainState
from tropd_mcore.mcore.checkpoint_info import step_folder
from tropd_mcore.records.run_dir import RunDir
from tropd_mcore.serving.process import ServerSpec
from tropd_mcore.train import components, job
from tropd_mcore.train import servers as policy_servers
from tropd_mcore.train.components import Servers

STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=1)


class Training:
    """`_train` with models, servers and a loop that only record their arguments."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.did: list[tuple[Any, ...]] = []
        student = SimpleNamespace(name="student")
        for name, value in {
            "start_servers": Servers(),
            "build_model": student,
            "check_model": None,
            "load_hf": None,
            "build_optimizer": ("optimizer", "scheduler"),
            "student_average": "average",
            "_make_components": "parts",
        }.items():
            monkeypatch.setattr(job, name, self._maker(name, value))
        monkeypatch.setattr(job, "load", self._load)
        monkeypatch.setattr(job, "begin_weights", lambda source, model: self.did.append(("begin", source, model.name)))
        monkeypatch.setattr(job, "begin_optimizer", self._begin_optimizer)
        monkeypatch.setattr(job, "accept", lambda context, start, day: self.did.append(("accept", start.first_step)))
        monkeypatch.setattr(job, "export", lambda context, model, step: self.did.append(("export", model.name, step)))
        monkeypatch.setattr(job, "Trainer", self._trainer)

    def _maker(self, name: str, value: Any) -> Any:
        def make(*_: Any, **given: Any) -> Any:
            self.did.append((name, given["steps"]) if name == "build_optimizer" else (name,))
            return value

        return make

    def _begin_optimizer(self, source: Any, state: TrainState) -> None:
        assert state.optimizer == "optimizer" and state.scheduler == "scheduler" and state.average is None
        self.did.append(("begin with the optimizer", source))

    def _load(self, path: Path, state: TrainState, *, run: str) -> None:
        assert run == "a-run"
        self.did.append(("load", path.name, state.average))

    def _trainer(self, parts: Any, *, first_step: int, last_step: int) -> Any:
        assert parts == "parts"
        return SimpleNamespace(fit=lambda: self.did.append(("fit", first_step, last_step)))

    def launched(self, config: Config, layout: Any, first_step: int, source: Any = None) -> list[tuple[Any, ...]]:
        checkpoint = step_folder(RunDir(config.run.dir).checkpoints, first_step) if first_step else None
        start: Any = SimpleNamespace(
            first_step=first_step, checkpoint=checkpoint, source=source, inputs="inputs", run="a-run", phase=None
        )
        loaded: Any = SimpleNamespace(day=None, longest=300)
        with ExitStack() as cleanup:
            job._train(context_of(config, layout), loaded, start, cleanup)
        return [event for event in self.did if event[0] in ("start_servers", "load", "fit", "export")]


@pytest.mark.parametrize(
    ("first_step", "settings", "expected"),
    [
        (0, {}, [("fit", 0, 4), ("export", "student", 4)]),
        (0, {"export_at_end": False}, [("fit", 0, 4)]),
        (0, {"stop_after": 1}, [("fit", 0, 1)]),
        (1, {"stop_after": 2}, [("load", "step_000001", "average"), ("fit", 1, 3)]),
        (2, {"stop_after": 3}, [("load", "step_000002", "average"), ("fit", 2, 4), ("export", "student", 4)]),
        (4, {}, [("load", "step_000004", None), ("export", "student", 4)]),
        (6, {}, [("load", "step_000006", None), ("export", "student", 6)]),
    ],
    ids=str,
)
def test_a_launch_resumes_trains_and_exports_what_is_left(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    tmp_path: Path,
    first_step: int,
    settings: dict[str, Any],
    expected: list[tuple[Any, ...]],
) -> None:
    """A launch that only exports needs neither servers nor the average."""
    config = config_of(tmp_path, folder, run=settings)
    trains = any(event[0] == "fit" for event in expected)
    found = Training(monkeypatch).launched(config, SimpleNamespace(rank=0), first_step)
    assert found == [("start_servers",)] * trains + expected


def test_the_schedule_has_as_many_steps_as_the_run_has_updates(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    several = {"ratio": "ppo_clip", "mini_batches": 2, "epochs": 3}
    config = config_of(tmp_path, folder, objective={"kind": "opd", "topk": 3, "policy_gradient": several})
    training = Training(monkeypatch)
    training.launched(config, SimpleNamespace(rank=0), 0)
    assert ("build_optimizer", STEPS * 2 * 3) in training.did


@pytest.mark.parametrize("first_step", [0, 2, 4])
def test_a_launch_is_recorded_after_all_checks_and_before_its_first_step(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path, first_step: int
) -> None:
    training = Training(monkeypatch)
    training.launched(config_of(tmp_path, folder), SimpleNamespace(rank=0), first_step)
    did = [event[0] for event in training.did]
    after = ["fit", "export"] if first_step < STEPS else ["export"]
    assert did[did.index("accept") + 1 :] == after


def test_servers_come_before_everything_of_the_trainer_that_takes_memory(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    """On GPUs a server takes a part of what is free when it starts."""
    training = Training(monkeypatch)
    training.launched(config_of(tmp_path, folder), SimpleNamespace(rank=0), 0)
    assert training.did[0] == ("start_servers",) and ("build_model",) in training.did


IN_ORDER = ["rollout starts", "rollout is ready", "teacher starts", "teacher is ready"]


@pytest.mark.parametrize(
    ("platform", "settings", "expected"),
    [
        ("cuda", {}, IN_ORDER),
        ("cuda", {"release_memory": True}, [*IN_ORDER, "rollout gives its memory back"]),
        ("cpu", {"release_memory": True}, ["rollout starts", "teacher starts"]),
    ],
    ids=str,
)
def test_on_gpus_each_server_is_ready_before_the_next_one_and_before_the_trainer(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    tmp_path: Path,
    platform: str,
    settings: dict[str, Any],
    expected: list[str],
) -> None:
    did: list[str] = []
    needed: list[int | None] = []

    class Server:
        def __init__(self, spec: ServerSpec) -> None:
            self.name, self.is_started, self.config = spec.name, True, spec.config
            needed.append(spec.longest)

        def start(self) -> None:
            did.append(f"{self.name} starts")

        def wait_ready(self) -> None:
            did.append(f"{self.name} is ready")

        def release_memory(self) -> None:
            did.append(f"{self.name} gives its memory back")

        def stop(self) -> None:
            did.append(f"{self.name} stops")

    monkeypatch.setattr(components, "SupervisedServer", Server)
    monkeypatch.setattr(policy_servers, "SupervisedServer", Server)
    config = config_of(tmp_path, folder, teacher={"kind": "sglang"}, rollout={"server": settings})
    with one_rank() as layout, ExitStack() as cleanup:
        context = replace(context_of(config, layout), platform=SimpleNamespace(name=platform))
        servers = components.start_servers(context, cleanup, 300)
        assert servers.policy.reached and servers.teacher is not None
        assert did == expected and needed == [300, 300]
    assert did[len(expected) :] == ["teacher stops", "rollout stops"]


@pytest.mark.parametrize("moment", ["start_servers", "build_model", "load_hf", "load", "_make_components"])
def test_a_launch_that_is_refused_before_its_first_step_is_not_recorded(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path, moment: str
) -> None:
    training = Training(monkeypatch)

    def refuse(*_: Any, **__: Any) -> None:
        raise DataError("refused")

    monkeypatch.setattr(job, moment, refuse)
    with pytest.raises(DataError, match="refused"):
        training.launched(config_of(tmp_path, folder), SimpleNamespace(rank=0), 2)
    assert not [event for event in training.did if event[0] in ("accept", "fit")]


def test_initial_weights_are_loaded_before_optimizer_and_average_copy_them(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    training = Training(monkeypatch)
    config = config_of(tmp_path, folder, run={"init_from": tmp_path / "other"})
    training.launched(config, SimpleNamespace(rank=0), 0, source="a checkpoint")
    did = [event[0] for event in training.did]
    assert did.index("load_hf") < did.index("begin") < did.index("build_optimizer") < did.index("student_average")
    assert "begin with the optimizer" not in did


def test_initial_optimizer_state_is_loaded_before_the_average_is_made(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    training = Training(monkeypatch)
    config = config_of(tmp_path, folder, run={"init_from": tmp_path / "other", "init_optimizer": True})
    training.launched(config, SimpleNamespace(rank=0), 0, source="a checkpoint")
    did = [event[0] for event in training.did]
    assert did.index("build_optimizer") < did.index("begin with the optimizer") < did.index("student_average")
    assert "begin" not in did
