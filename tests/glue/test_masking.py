"""Samples without a usable answer: they are left out of their step, counted, and never trained on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.glue.fake_server import VOCABULARY, fake_server
from tests.glue.stubs import make_config, make_prompts, make_rollouts, one_rank, rollout_key
from tests.glue.test_wire import guided, launch, request, sampler_of
from tests.liars import Liar, liar, sampling_lies
from tropd_mcore.data.prompts import PromptSet
from tropd_mcore.errors import DataError, ServerError
from tropd_mcore.records.replay import save_rollouts
from tropd_mcore.records.run_dir import RunDir
from tropd_mcore.rollout.rollout_source import RolloutSource
from tropd_mcore.serving import transport as transport_module

LIE = sampling_lies(vocab_size=VOCABULARY, end=2)["an id outside the vocabulary"]


def about_nth(*numbers: int) -> Any:
    """Selects requests by their position in the order of arrival, counted from 0."""
    seen = iter(range(10**9))
    return lambda _: next(seen) in numbers


def tell(proxy: Liar, *numbers: int) -> None:
    proxy.tell("/generate", LIE, about=about_nth(*numbers))


def test_if_a_prefix_carrier_is_left_out_the_next_sample_carries_the_prefix_loss(tmp_path: Path) -> None:
    """Four samples one after the other. The second request is the retry of the first sample."""
    config = guided(tmp_path, gates={"masked_share": 0.5})
    config = config.model_copy(update={"rollout": one_at_a_time(config.rollout)})
    with fake_server() as server, liar(server.url) as proxy, launch(proxy, config) as (source, _):  # type: ignore[arg-type]
        tell(proxy, 0, 1)
        rollouts = source.at_step(0)
        assert [(r.sample_id, r.carries_prefix_loss) for r in rollouts] == [
            ("000000/p0/1", True),
            ("000000/p1/0", True),
            ("000000/p1/1", False),
        ]
        asked = len(proxy.asked)
        assert rollout_key(source.at_step(0)) == rollout_key(rollouts) and len(proxy.asked) == asked
        assert [r.carries_prefix_loss for r in source.at_step(0)] == [True, True, False]


def one_at_a_time(rollout: Any) -> Any:
    return rollout.model_copy(update={"server": rollout.server.model_copy(update={"max_concurrency": 1})})


@pytest.mark.parametrize(("share", "stops"), [(0.25, False), (0.24, True), (0.0, True), (1.0, False)])
def test_the_share_of_left_out_samples_is_bounded(tmp_path: Path, share: float, stops: bool) -> None:
    """One sample of four."""
    config = make_config(tmp_path, gates={"masked_share": share})
    config = config.model_copy(update={"rollout": one_at_a_time(config.rollout)})
    with fake_server() as server, liar(server.url) as proxy, launch(proxy, config) as (source, _):  # type: ignore[arg-type]
        tell(proxy, 0, 1)
        if not stops:
            assert len(source.at_step(0)) == 3
            return
        with pytest.raises(ServerError, match=r"1 of 4 samples have no usable answer, asked for twice; the first is"):
            source.at_step(0)
        assert not RunDir(tmp_path).rollouts(0).exists()


def test_a_step_without_any_usable_answer_stops_the_run_whatever_the_bound(tmp_path: Path) -> None:
    config = make_config(tmp_path, gates={"masked_share": 1.0})
    with fake_server() as server, liar(server.url) as proxy, launch(proxy, config) as (source, _):  # type: ignore[arg-type]
        proxy.tell("/generate", LIE)
        with pytest.raises(ServerError, match="4 of 4 samples have no usable answer"):
            source.at_step(0)


def test_a_sample_left_out_before_the_server_died_is_not_requested_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transport_module, "FIRST_WAIT_S", 0.01)
    asked = [request(f"s{index}") for index in range(5)]
    with fake_server() as server, liar(server.url) as proxy:
        tell(proxy, 0, 1)
        sampler = sampler_of(proxy, at_once=1)  # type: ignore[arg-type]
        before = sampler.collect(asked[:1] + asked[1:4], step=0, expected_version="default")
        assert list(before.masked) == ["s0"] and list(before.rollouts) == ["s1", "s2", "s3"]
        count = len(server.bodies("/generate"))
        after = sampler.collect(asked, step=0, expected_version="default", found=before)
        assert len(server.bodies("/generate")) == count + 1
        assert list(after.masked) == ["s0"] and list(after.rollouts) == ["s1", "s2", "s3", "s4"]


@pytest.mark.parametrize("bad", [VOCABULARY, -3])
@pytest.mark.parametrize("replayed", [False, True])
def test_stored_rollouts_with_ids_that_the_student_lacks_are_refused_by_file(
    tmp_path: Path, bad: int, replayed: bool
) -> None:
    """An id of -3 would reach the tokenizer, and one beyond the embedding a row of zeros."""
    rollouts = make_rollouts()
    rollouts[1].response_ids[0] = bad
    other = tmp_path / "other"
    config = make_config(tmp_path / "run", run={"dir": tmp_path / "run", "replay": other if replayed else None})
    where = RunDir(other if replayed else tmp_path / "run").rollouts(0)
    save_rollouts(where, rollouts)
    with one_rank() as layout:
        prompts = PromptSet(make_prompts(2), shuffle=False, seed=0)
        policy: Any = SimpleNamespace()
        source = RolloutSource(config, RunDir(config.run.dir), prompts, policy, layout, vocab_size=VOCABULARY)
        with pytest.raises(DataError, match=rf"step_000000\.npz: sample .* holds token id {bad}; expected ids in"):
            source.at_step(0)
    assert replayed is False or not RunDir(config.run.dir).rollouts(0).exists()


def test_the_remaining_samples_of_a_step_are_valid_rollouts(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    config = config.model_copy(update={"rollout": one_at_a_time(config.rollout)})
    with fake_server() as server, liar(server.url) as proxy, launch(proxy, config) as (source, _):  # type: ignore[arg-type]
        whole = source.at_step(0)
        tell(proxy, 2, 3)
        part = source.at_step(1)
    assert len(whole) == 4 and len(part) == 3
    for rollout in part:
        assert ((rollout.response_ids >= 0) & (rollout.response_ids < VOCABULARY)).all()
        assert np.isfinite(rollout.rollout_logp).all()


def test_a_repeated_step_knows_how_many_samples_were_left_out(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    config = config.model_copy(update={"rollout": one_at_a_time(config.rollout)})
    with fake_server() as server, liar(server.url) as proxy, launch(proxy, config) as (source, _):  # type: ignore[arg-type]
        source.at_step(0)
        assert source.left_out == 0
        tell(proxy, 0, 1)
        source.at_step(1)
        assert source.left_out == 1
        source.at_step(0)
        assert source.left_out == 0
        source.at_step(1)
        assert source.left_out == 1
