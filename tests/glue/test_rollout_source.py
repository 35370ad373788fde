"""Rollouts of a step: stored ones take precedence, and sampled ones are on disk before they are returned."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.glue.faults import on_ranks
from tests.glue.stubs import VOCABULARY, make_config, make_layout, make_prompts, make_rollouts, one_rank, rollout_key
from tropd_mcore.config.schema import Config
from tropd_mcore.data.prompts import PromptSet
from tropd_mcore.errors import DataError
from tropd_mcore.mcore.parallel import Layout
from tropd_mcore.records.replay import load_rollouts, save_rollouts
from tropd_mcore.records.run_dir import RunDir
from tropd_mcore.rollout import rollout_source as rollout_source_module
from tropd_mcore.rollout.rollout_source import RolloutSource
from tropd_mcore.types import Rollout, SampleRequest

STEP = 2


@dataclass
class Policy:
    """Answers with rollouts that identify the launch, and records its requests."""

    launch: str
    asked: list[tuple[int, list[SampleRequest]]] = field(default_factory=list)

    def sample(self, requests: list[SampleRequest], *, step: int) -> list[Rollout]:
        self.asked.append((step, requests))
        return make_rollouts(step, version=self.launch)


def source(config: Config, policy: Any, layout: Layout) -> RolloutSource:
    prompts = PromptSet(make_prompts(6), shuffle=False, seed=0)
    return RolloutSource(config, RunDir(config.run.dir), prompts, policy, layout, vocab_size=VOCABULARY)


def sampled(config: Config, launch: str, step: int = STEP) -> tuple[list[Rollout], Policy]:
    """The rollouts of one rank, and the policy that it may have asked."""
    policy = Policy(launch)
    with one_rank() as layout:
        return source(config, policy, layout).at_step(step), policy


def test_a_step_is_sampled_once_and_later_launches_get_the_same_rollouts(tmp_path: Path) -> None:
    first, policy = sampled(make_config(tmp_path), "first")
    assert [step for step, _ in policy.asked] == [STEP]
    again, policy = sampled(make_config(tmp_path), "second")
    assert policy.asked == [] and rollout_key(again) == rollout_key(first)
    other, policy = sampled(make_config(tmp_path), "second", STEP + 1)
    assert [step for step, _ in policy.asked] == [STEP + 1] and other[0].policy_version == "second"


def test_rollouts_are_on_disk_when_they_are_returned(tmp_path: Path) -> None:
    rollouts, _ = sampled(make_config(tmp_path), "first")
    assert rollout_key(load_rollouts(RunDir(tmp_path).rollouts(STEP))) == rollout_key(rollouts)
    assert rollout_key(rollouts) == rollout_key(make_rollouts(STEP, version="first"))


def test_rollouts_that_cannot_be_stored_are_not_returned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise DataError("cannot write the rollouts")

    monkeypatch.setattr(rollout_source_module, "save_rollouts", refuse)
    with pytest.raises(DataError, match="cannot write the rollouts"):
        sampled(make_config(tmp_path), "first")


def test_the_requests_of_a_step_have_its_prompts_and_its_step_number(tmp_path: Path) -> None:
    for step in (0, 1, 2):
        _, policy = sampled(make_config(tmp_path), "first", step)
        ((asked_step, requests),) = policy.asked
        assert asked_step == step
        assert [request.prompt_id for request in requests] == [f"p{2 * step + i}" for i in (0, 0, 1, 1)]
        assert [request.sample_id for request in requests] == [
            f"{step:06d}/p{2 * step + prompt}/{index}" for prompt in (0, 1) for index in (0, 1)
        ]


def test_prefix_and_token_budget_of_the_requests_are_those_of_the_step(tmp_path: Path) -> None:
    guidance = {"enabled": True, "schedule": "linear", "min_continuation": 1}
    config = make_config(
        tmp_path,
        run={"steps": 4},
        objective={"kind": "tropd", "guidance": guidance, "outlier": {"topk": 3}},
        rollout={"max_new_tokens": 9, "truncate": {"start": 2, "increment": 3, "every": 1}},
    )
    for step, prefix, budget in ((0, 5, 2), (1, 4, 5), (2, 3, 8), (3, 1, 9)):
        _, policy = sampled(config, "first", step)
        ((_, requests),) = policy.asked
        assert [len(request.prefix_ids) for request in requests] == [prefix] * 4
        shared = config.objective.guidance.continuation_budget == "shared"  # type: ignore[union-attr]
        assert [request.max_new_tokens for request in requests] == [budget - (prefix if shared else 0)] * 4


def replaying(tmp_path: Path, **sections: Any) -> Config:
    return make_config(tmp_path / "mine", run={"replay": tmp_path / "other"}, **sections)


def test_a_replay_uses_the_rollouts_of_the_other_run_and_stores_them(tmp_path: Path) -> None:
    save_rollouts(RunDir(tmp_path / "other").rollouts(STEP), make_rollouts(STEP, version="other"))
    config = replaying(tmp_path)
    with one_rank() as layout:
        found = source(config, None, layout).at_step(STEP)
    assert rollout_key(found) == rollout_key(make_rollouts(STEP, version="other"))
    RunDir(tmp_path / "other").rollouts(STEP).unlink()
    with one_rank() as layout:
        assert rollout_key(source(config, None, layout).at_step(STEP)) == rollout_key(found)


def test_stored_rollouts_of_the_run_itself_take_precedence_over_those_of_the_replayed_run(tmp_path: Path) -> None:
    for name in ("other", "mine"):
        save_rollouts(RunDir(tmp_path / name).rollouts(STEP), make_rollouts(STEP, version=name))
    with one_rank() as layout:
        found = source(replaying(tmp_path), None, layout).at_step(STEP)
    assert {rollout.policy_version for rollout in found} == {"mine"}


def test_a_replayed_response_is_cut_at_the_budget_of_its_step(tmp_path: Path) -> None:
    longest = {"truncate": {"start": 1, "increment": 1, "every": 1}, "max_new_tokens": 100}
    for step in range(4):
        save_rollouts(RunDir(tmp_path / "other").rollouts(step), make_rollouts(step))
        with one_rank() as layout:
            found = source(replaying(tmp_path, rollout=longest), None, layout).at_step(step)
        for cut, whole in zip(found, make_rollouts(step), strict=True):
            count = min(len(whole.response_ids), 1 + step)
            assert len(cut.response_ids) == len(cut.rollout_logp) == len(cut.trust_u) == count
            np.testing.assert_array_equal(cut.response_ids, whole.response_ids[:count])
            assert cut.finish_reason == ("stop" if count == len(whole.response_ids) else "length")
        assert rollout_key(load_rollouts(RunDir(tmp_path / "mine").rollouts(step))) == rollout_key(found)


def on_this_rank(config: Config, step: int) -> tuple[Any, int]:
    """(rollouts or the text of the error, times that the policy was asked) on this rank."""
    layout = make_layout("data")
    policy = Policy(f"rank {layout.rank}")
    asking = source(config, policy if config.run.replay is None else None, layout)
    try:
        return rollout_key(asking.at_step(step)), len(policy.asked)
    except DataError as error:
        return str(error), len(policy.asked)


def test_a_replay_that_lacks_a_step_raises_the_same_clear_error_on_all_ranks(tmp_path: Path) -> None:
    save_rollouts(RunDir(tmp_path / "other").rollouts(0), make_rollouts(0))
    path = RunDir(tmp_path / "other").rollouts(1)
    message = f"run.replay: {path} does not exist; expected the rollouts of step 1 there"
    config = replaying(tmp_path)
    (one, _), (two, _) = on_ranks(on_this_rank, 2, config, 0)
    assert one == two == rollout_key(make_rollouts(0))
    assert on_ranks(on_this_rank, 2, config, 1) == [(message, 0)] * 2
    assert not RunDir(tmp_path / "mine").rollouts(1).exists()


def test_every_rank_gets_the_stored_rollouts_and_either_all_ranks_ask_the_policy_or_none(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    found = on_ranks(on_this_rank, 2, config, STEP)
    assert [asked for _, asked in found] == [1, 1]
    stored = rollout_key(load_rollouts(RunDir(tmp_path).rollouts(STEP)))
    assert stored == rollout_key(make_rollouts(STEP, version="rank 0"))
    assert on_ranks(on_this_rank, 2, config, STEP) == [(stored, 0)] * 2
