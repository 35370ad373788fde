"""The training loop over stubs: the order of its actions, its progress values, and the files that it keeps."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.glue import launch as launch_of_the_glue
from tests.glue.faults import on_ranks
from tests.glue.launch import Launch
from tests.glue.stubs import VOCABULARY, make_config, make_layout, make_prompts, make_rollouts, one_rank, rollout_key
from tropd_mcore.config.schema import Config
from tropd_mcore.data.prompts import PromptSet
from tropd_mcore.errors import DataError, GateError, ModelError
from tropd_mcore.files import read_step_lines
from tropd_mcore.monitor.monitor import Monitor
from tropd_mcore.records.replay import load_rollouts, save_rollouts
from tropd_mcore.records.run_dir import RunDir
from tropd_mcore.rollout.rollout_source import RolloutSource
from tropd_mcore.types import Rollout, SampleRequest

STEPS = 4
RATIO = {"ratio": "ppo_clip", "mini_batches": 2, "epochs": 2}


def launched(config: Config, first_step: int = 0, last_step: int = STEPS, **given: Any) -> Launch:
    """One finished launch of a single rank."""
    with one_rank() as layout:
        return Launch(config, layout, **given).run(first_step, last_step)


def losses(launch: Launch) -> list[float]:
    return [update.loss for record in launch.records if record is not None for update in record.updates]


def token_counts(launch: Launch) -> list[int]:
    return [update.token_count for record in launch.records if record is not None for update in record.updates]


def places(step: int) -> list[tuple[int, int]]:
    """(rollout, token) of every response token of a step."""
    return [
        (sample, token)
        for sample, rollout in enumerate(make_rollouts(step))
        for token in range(len(rollout.prompt_ids), len(rollout.token_ids))
    ]


def test_the_kdrl_objective_gets_the_progress_of_every_step() -> None:
    objective = {"kind": "kdrl", "beta_start": 0.8, "beta_end": 0.2, "topk": 3}
    config = make_config(objective=objective)
    given: dict[str, Any] = {"log_ratio": lambda *_: 0.5, "statistic": lambda *_: 0.0}
    expected = [(0.8 + (0.2 - 0.8) * step / STEPS) * 0.5**2 / 2 for step in range(STEPS)]
    assert losses(launched(config, **given)) == pytest.approx(expected, rel=1e-5)
    two_launches = losses(launched(config, 0, 1, **given)) + losses(launched(config, 1, STEPS, **given))
    assert two_launches == pytest.approx(expected, rel=1e-5)


def test_the_reopold_objective_changes_its_phase_at_the_configured_share_of_the_run() -> None:
    def log_ratio(sample: int, token: int) -> float:
        return -2.0 if (sample + token) % 3 == 0 else 0.1

    def selected(sample: int, token: int) -> float:
        return float(sample == 1)

    config = make_config(objective={"kind": "reopold", "stages": 2, "switch_at": 0.5, "topk": 3})
    launch = launched(config, log_ratio=log_ratio, statistic=selected)
    above = [sum(log_ratio(*place) > -0.5 for place in places(step)) for step in range(STEPS)]
    chosen = [sum(selected(*place) != 0 for place in places(step)) for step in range(STEPS)]
    assert all(one != two for one, two in zip(above, chosen, strict=True))
    assert token_counts(launch) == above[:2] + chosen[2:]


def test_the_gate_refuses_before_the_first_optimizer_step_of_any_launch(tmp_path: Path) -> None:
    config = make_config(tmp_path, gates={"sampler_logprob": True})
    for first_step in (0, 2):
        with one_rank() as layout:
            launch = Launch(config, layout, gap=0.5)
            with pytest.raises(GateError, match="sampler and trainer log-probs differ by 5.0e-01 nats"):
                launch.run(first_step, STEPS)
        assert launch.did("optimizer", "save", "log") == [] and launch.did("sample") == [("sample", first_step)]
    assert len(launched(make_config(tmp_path), gap=0.5).did("optimizer")) == STEPS


def test_the_gate_waits_for_the_first_update_with_sampled_tokens(tmp_path: Path) -> None:
    """If the teacher could score nothing in the first step, the launch must still be checked."""
    config, asked = make_config(tmp_path, gates={"sampler_logprob": True}), []

    def nothing_in_the_first_step(sample: int, token: int) -> bool:
        asked.append((sample, token))
        return len(asked) <= len(places(0))

    with one_rank() as layout:
        launch = Launch(config, layout, gap=0.5, unscored=nothing_in_the_first_step)
        with pytest.raises(GateError, match="sampler and trainer log-probs differ by 5.0e-01 nats"):
            launch.run(0, STEPS)
    assert launch.did("optimizer", "log") == [("log", 0)] and launch.did("sample")[-1] == ("sample", 1)


def test_a_sampler_with_stale_weights_stops_the_run_before_the_update_of_its_third_step() -> None:
    """The student moves by half a nat per step, while the rollouts stay those of the initial weights."""
    for allowed in (1, 3):
        config = make_config(gates={"sampler_logprob": True, "sampler_logprob_steps": allowed})
        with one_rank() as layout:
            launch = Launch(config, layout, drift=0.5)
            with pytest.raises(
                GateError, match=rf"^gates\.sampler_logprob: step {allowed}: .*in {allowed} steps in a row"
            ):
                launch.run(0, STEPS)
        assert launch.did("optimizer") == [("optimizer", step) for step in range(allowed)]
        assert [
            record.sampler_gate.off_in_a_row for record in launch.records if record and record.sampler_gate
        ] == list(range(allowed))
    assert len(launched(make_config(gates={"sampler_logprob": False}), drift=0.5).did("optimizer")) == STEPS


def test_the_gate_compares_the_student_before_the_first_of_several_updates() -> None:
    objective = {"kind": "opd", "topk": 3, "policy_gradient": RATIO}
    config = make_config(gates={"sampler_logprob": True, "sampler_logprob_steps": 1}, objective=objective)
    assert len(launched(config, 2, 3, drift=0.5).did("optimizer")) == 4
    with one_rank() as layout:
        launch = Launch(config, layout, drift=0.5)
        with pytest.raises(GateError, match=r"step 1: .* nats \(mean\), 2\.0e\+00"):
            launch.run(0, STEPS)
    assert len(launch.did("optimizer")) == 4 + 1, "every rollout of the step has to be there before it is judged"
    with one_rank() as layout:
        launch = Launch(config, layout, gap=0.5)
        with pytest.raises(GateError, match="step 0: "):
            launch.run(0, STEPS)
    assert launch.did("optimizer") == [], "the first update of a launch waits for the gate"


class NotedCheck:
    """Stands in for the served teacher's check. From step `other_from` on there is another teacher."""

    def __init__(self, launch: Launch, other_from: int) -> None:
        self.launch = launch
        self.other_from = other_from

    def at_step(self, step: int) -> None:
        self.launch.events.append(("teacher?", step))

    def before_checkpoint(self, done: int) -> None:
        self.launch.events.append(("teacher at", done))
        if done > self.other_from:
            raise GateError("another model")


def test_a_served_teacher_is_checked_before_each_scoring_and_before_each_checkpoint() -> None:
    config = make_config(run={"steps": 4, "checkpoint_every": 2})
    with one_rank() as layout:
        launch = Launch(config, layout)
        launch.teacher_check = NotedCheck(launch, other_from=3)
        with pytest.raises(GateError, match="another model"):
            launch.run(0, 4)
    assert launch.did("teacher?", "score", "teacher at", "save") == [
        *[event for step in (0, 1) for event in (("teacher?", step), ("score", step))],
        ("teacher at", 2),
        ("save", 2, False),
        *[event for step in (2, 3) for event in (("teacher?", step), ("score", step))],
        ("teacher at", 4),
    ]


def test_mini_batches_are_trained_in_turn_in_every_epoch() -> None:
    config = make_config(objective={"kind": "opd", "topk": 3, "policy_gradient": RATIO})
    launch = launched(config, 0, 2, drift=0.01)
    halves = [("gradients", [0, 1]), ("gradients", [2, 3])]
    assert launch.did("gradients") == halves * 4
    assert launch.did("optimizer") == [("optimizer", 0)] * 4 + [("optimizer", 1)] * 4
    for number, record in enumerate(launch.records):
        assert record is not None and len(record.updates) == 4
        table = record.table
        assert np.bincount(table["epoch"].astype(int)).tolist() == [len(places(number))] * 2
        moved = (table["student_logp"] - table["old_logp"]).astype(float)
        update = 2 * table["epoch"].astype(int) + (table["sample_index"].astype(int) >= 2)
        np.testing.assert_allclose(moved, 0.01 * update, atol=1e-5)


def test_all_updates_of_a_step_see_one_sampling_and_one_scoring() -> None:
    config = make_config(objective={"kind": "opd", "topk": 3, "policy_gradient": RATIO})
    launch = launched(config, 0, 2)
    assert launch.did("sample", "score", "log") == [
        (kind, step) for step in range(2) for kind in ("sample", "score", "log")
    ]


def test_the_average_is_updated_once_after_every_optimizer_step() -> None:
    config = make_config(objective={"kind": "opd", "topk": 3, "policy_gradient": RATIO})
    launch = launched(config, 0, 2, has_average=True)
    order = [event[0] for event in launch.did("gradients", "optimizer", "average")]
    assert order == ["gradients", "optimizer", "average"] * 8
    assert launch.did("average") == [("average", number) for number in range(1, 9)]
    assert launch.did("save") == [("save", 2, True)]
    assert launched(config, 0, 1).did("average", "save") == [("save", 1, False)]


def test_a_step_without_a_scored_row_changes_no_weight_but_is_logged() -> None:
    launch = launched(make_config(), 0, 2, has_average=True, unscored=lambda *_: True)
    assert launch.did("optimizer", "average") == [] and launch.did("log") == [("log", 0), ("log", 1)]
    assert token_counts(launch) == [0, 0]
    assert token_counts(launched(make_config(), 0, 1, unscored=lambda sample, _: sample > 0)) == [
        sum(sample == 0 for sample, _ in places(0))
    ]


@pytest.mark.parametrize(
    ("first_step", "last_step", "every", "expected"),
    [(0, 7, 3, [3, 6, 7]), (3, 5, 3, [5]), (0, 6, 3, [3, 6]), (6, 7, 100, [7]), (0, 2, 1, [1, 2])],
)
def test_a_checkpoint_is_written_at_the_configured_interval_and_at_the_end_of_a_launch(
    first_step: int, last_step: int, every: int, expected: list[int]
) -> None:
    launch = launched(make_config(run={"steps": 7, "checkpoint_every": every}), first_step, last_step)
    assert [event[1] for event in launch.did("save")] == expected
    order = [event for event in launch.events if event[0] in ("log", "save")]
    assert all(order[order.index(("save", done, False)) - 1] == ("log", done - 1) for done in expected)


class StoredRollouts:
    """Rollouts and scores that leave their files in the run directory, as the real sources do."""

    left_out = 0

    def __init__(self, run_dir: RunDir) -> None:
        self.run_dir = run_dir

    def at_step(self, step: int) -> list[Rollout]:
        rollouts = make_rollouts(step)
        save_rollouts(self.run_dir.rollouts(step), rollouts)
        self.run_dir.scores(step, 0, 0).parent.mkdir(exist_ok=True)
        self.run_dir.scores(step, 0, 0).touch()
        return rollouts


def kept(run_dir: RunDir, folder: str) -> list[int]:
    return sorted(int(path.name[5:11]) for path in (run_dir.root / folder).iterdir())


@pytest.mark.parametrize(
    ("keep_rollouts", "last_step", "rollouts", "scores"),
    [
        (2, 3, [1, 2], []),
        (2, 5, [3, 4], []),
        (1, 7, [6], []),
        (100, 7, [0, 1, 2, 3, 4, 5, 6], []),
        (None, 7, [0, 1, 2, 3, 4, 5, 6], []),
    ],
)
def test_after_a_checkpoint_the_newest_rollouts_are_kept_and_scores_removed(
    tmp_path: Path, keep_rollouts: int | None, last_step: int, rollouts: list[int], scores: list[int]
) -> None:
    run = {"steps": 7, "checkpoint_every": 3, "keep_rollouts": keep_rollouts}
    run_dir = RunDir(tmp_path)
    launched(make_config(tmp_path, run=run), 0, last_step, rollouts=StoredRollouts(run_dir))
    assert kept(run_dir, "rollouts") == rollouts and kept(run_dir, "scores") == scores


@pytest.mark.parametrize(
    ("teacher", "keep_scores", "scores"),
    [("sglang", 0, [3, 4]), ("sglang", 3, [1, 2, 3, 4]), ("megatron", 0, [4]), ("megatron", None, [0, 1, 2, 3, 4])],
)
def test_between_checkpoints_all_rollouts_and_all_scores_that_cannot_be_recomputed_are_kept(
    tmp_path: Path, teacher: str, keep_scores: int | None, scores: list[int]
) -> None:
    run = {"steps": 7, "checkpoint_every": 3, "keep_rollouts": 1, "keep_scores": keep_scores}
    run_dir = RunDir(tmp_path)
    with one_rank() as layout:
        config = make_config(tmp_path, run=run, teacher={"kind": teacher})
        launch = Launch(config, layout, rollouts=StoredRollouts(run_dir))
        launch.monitor = StopAfter(4)
        with pytest.raises(KeyboardInterrupt):
            launch.run(0, 7)
    assert kept(run_dir, "rollouts") == [3, 4] and kept(run_dir, "scores") == scores


class StopAfter:
    """A monitor that ends the process after a step, as a signal would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def log(self, step: int, record: Any) -> None:
        if step == self.step:
            raise KeyboardInterrupt


def test_no_stored_step_is_removed_if_the_checkpoint_failed(tmp_path: Path) -> None:
    run = {"steps": 7, "checkpoint_every": 3, "keep_rollouts": 1}
    run_dir = RunDir(tmp_path)
    with one_rank() as layout:
        failed = ModelError("checkpoint: writing failed")
        config = make_config(tmp_path, run=run, teacher={"kind": "sglang"})
        launch = Launch(config, layout, rollouts=StoredRollouts(run_dir), fail_save=failed)
        with pytest.raises(ModelError, match="writing failed"):
            launch.run(0, 7)
    assert kept(run_dir, "rollouts") == kept(run_dir, "scores") == [0, 1, 2]


@pytest.mark.parametrize("when", [0, 2])
def test_a_run_directory_that_disappears_in_mid_run_stops_the_job_before_it_writes_more(
    tmp_path: Path, when: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class RemoveDirectory:
        """A monitor that removes the run directory, as a user might."""

        def log(self, step: int, record: Any) -> None:
            if step == when:
                shutil.rmtree(tmp_path / "run")

    run_dir = RunDir(tmp_path / "run")
    lock = run_dir.lock()
    monkeypatch.setattr(launch_of_the_glue, "RunDir", lambda root: run_dir)
    with one_rank() as layout:
        launch = Launch(make_config(run_dir.root, run={"steps": 7}), layout, rollouts=StoredRollouts(run_dir))
        launch.monitor = RemoveDirectory()
        with pytest.raises(DataError, match=r"run\.dir: .*run was removed or replaced while this job ran"):
            launch.run(0, 7)
    assert not run_dir.root.exists()
    lock.release()


class CountingPolicy:
    """Samples again, with different numbers each time."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def sample(self, requests: list[SampleRequest], *, step: int) -> list[Rollout]:
        self.steps.append(step)
        return make_rollouts(step, version=f"call {len(self.steps)}")


def test_a_launch_after_an_interrupted_step_trains_on_the_stored_rollouts_of_that_step(tmp_path: Path) -> None:
    config = make_config(tmp_path, run={"steps": 4, "checkpoint_every": 2})
    policy = CountingPolicy()
    prompts = PromptSet(make_prompts(4), shuffle=False, seed=0)
    before: dict[int, Any] = {}
    for first_step, stop in ((0, StopAfter(3)), (2, None)):
        with one_rank() as layout:
            source = RolloutSource(config, RunDir(tmp_path), prompts, policy, layout, vocab_size=VOCABULARY)  # type: ignore[arg-type]
            launch = Launch(config, layout, rollouts=source, monitor=stop)
            if stop is None:
                launch.run(first_step, 4)
            else:
                with pytest.raises(KeyboardInterrupt):
                    launch.run(first_step, 4)
                before = {step: rollout_key(load_rollouts(RunDir(tmp_path).rollouts(step))) for step in range(4)}
    assert policy.steps == [0, 1, 2, 3]
    trained = [rollout_key(record.rollouts) for record in launch.records if record is not None]
    assert trained == [before[2], before[3]]


def test_the_record_of_a_step_matches_its_updates() -> None:
    launch = launched(make_config(), log_ratio=lambda *_: 0.25)
    assert len(launch.records) == STEPS
    for step, record in enumerate(launch.records):
        assert record is not None
        (update,) = record.updates
        assert update.token_count == len(places(step)) == len(record.table["on"])
        assert update.grad_norm == 2.5 and update.learning_rate == pytest.approx(0.5 / (2 + step))
        assert [rollout.sample_id for rollout in record.rollouts] == [r.sample_id for r in make_rollouts(step)]
        expected = (
            -0.25 * sum(float(value) for r in make_rollouts(step) for value in r.rollout_logp) / len(places(step))
        )
        assert update.loss == pytest.approx(expected, rel=1e-5)
        found = zip(record.table["sample_index"].tolist(), record.table["token_index"].tolist(), strict=True)
        assert list(found) == places(step)
        assert record.special_ids == {1} and record.accuracy is None
        assert {"step"} <= set(record.timings) and all(seconds >= 0 for seconds in record.timings.values())


def test_the_record_of_a_step_has_the_alpha_of_that_step() -> None:
    guidance = {"enabled": True, "schedule": "linear"}
    launch = launched(make_config(objective={"kind": "tropd", "guidance": guidance, "outlier": {"topk": 3}}), 1, 4)
    assert [record.alpha for record in launch.records if record is not None] == pytest.approx([0.75, 0.5, 0.25])


def test_the_metrics_file_has_one_line_per_step_even_after_a_repeated_one(tmp_path: Path) -> None:
    config = make_config(tmp_path, run={"steps": 4, "checkpoint_every": 2})
    for first_step, last_step in ((0, 3), (2, 4)):
        monitor = Monitor(config, tmp_path, rank=0, start_step=first_step)
        launched(config, first_step, last_step, monitor=monitor, log_ratio=lambda *_: 0.25)
        monitor.close()
    lines = read_step_lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    for step, line in enumerate(lines):
        assert line["tokens/student"] == line["optimizer/token_count"] == len(places(step))
        assert line["log_ratio/mean"] == pytest.approx(0.25, rel=1e-5)
        assert line["optimizer/updates"] == 1.0 and line["optimizer/grad_norm"] == 2.5


@pytest.mark.parametrize("samples", [0, 2])
def test_token_values_of_a_few_samples_are_stored_if_configured(tmp_path: Path, samples: int) -> None:
    launched(make_config(tmp_path, monitor={"token_samples": samples}), 1, 3)
    files = sorted((tmp_path / "tokens").glob("*")) if samples else []
    assert [path.name for path in files] == (["step_000001.npz", "step_000002.npz"] if samples else [])
    assert samples or not (tmp_path / "tokens").exists()
    for path in files:
        with np.load(path) as stored:
            kept = set(stored["sample_index"].tolist())
            assert len(kept) == samples and 0 in kept, "spread over the step, from its first sample on"
            assert set(stored["verdict"].tolist()) <= {-1, 0, 1}


def on_two_ranks(run_dir: Path) -> tuple[list[Any], list[Any]]:
    """The training steps and log lines of each data rank."""
    config = make_config(run_dir, monitor={"token_samples": 1})
    launch = Launch(config, make_layout("data"), log_ratio=step_by_place).run(0, 2)
    logged = [
        None if r is None else (r.updates, r.table["sample_index"], r.table["token_index"], r.table["log_ratio"])
        for r in launch.records
    ]
    return launch.did("gradients"), logged


def step_by_place(sample: int, token: int) -> float:
    return 0.1 * sample + 0.01 * token


def test_the_record_joins_the_rows_of_all_ranks_and_only_rank_zero_has_it(tmp_path: Path) -> None:
    (mine, logged), (theirs, nothing) = on_ranks(on_two_ranks, 2, tmp_path)
    assert nothing == [None, None]
    for step in range(2):
        assert sorted(mine[step][1] + theirs[step][1]) == [0, 1, 2, 3] and mine[step][1] and theirs[step][1]
        updates, samples, tokens, log_ratio = logged[step]
        assert list(zip(samples.tolist(), tokens.tolist(), strict=True)) == places(step)
        np.testing.assert_allclose(log_ratio, [step_by_place(*place) for place in places(step)], atol=1e-5)
        assert [update.token_count for update in updates] == [len(places(step))]
        behav = [float(v) for r in make_rollouts(step) for v in r.rollout_logp]
        expected = -sum(step_by_place(*place) * v for place, v in zip(places(step), behav, strict=True)) / len(behav)
        assert math.isclose(updates[0].loss, expected, rel_tol=1e-4)


def gate_on_two_ranks(run_dir: Path, gap_on_rank: int) -> tuple[str, int]:
    """The gate if only the rows of one rank differ: (error, optimizer steps) of this rank."""
    layout = make_layout("data")
    config = make_config(run_dir, gates={"sampler_logprob": True})
    launch = Launch(config, layout, gap=0.5 if layout.rank == gap_on_rank else 0.0)
    try:
        launch.run(0, 1)
    except GateError as error:
        return str(error), launch.updates
    return "", launch.updates


@pytest.mark.parametrize("rank", [0, 1])
def test_the_gate_refuses_on_every_rank_if_the_rows_of_one_rank_differ(tmp_path: Path, rank: int) -> None:
    found = on_ranks(gate_on_two_ranks, 2, tmp_path, rank)
    assert all("gates.sampler_logprob: step 0: " in message and updates == 0 for message, updates in found)
