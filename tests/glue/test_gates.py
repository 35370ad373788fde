"""The sampler gate: each bound refuses independently, on sampled tokens only, at every step, with the likely cause."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.glue.stubs import make_config, one_rank
from tropd_mcore.config.schema import Config
from tropd_mcore.errors import GateError
from tropd_mcore.rollout.policy_server import PolicyServers
from tropd_mcore.serving.wire import read_server_info
from tropd_mcore.train.components import sampler_bounds
from tropd_mcore.train.gates import (
    BFLOAT16_BOUNDS,
    BFLOAT16_MEAN,
    FIRST_STEP,
    FLOAT32_BOUNDS,
    FLOAT32_MEAN,
    GROSS,
    GROSS_TOKENS,
    LEAST_TOKENS,
    WARN_EVERY,
    Columns,
    SamplerBounds,
    SamplerGate,
    check_teachers_are_others,
    engines_are_exact,
)

TOKENS = 1000
Piece = tuple[int, int, float]
"""Tokens first ... last - 1 differ by this many nats, in both directions."""


def bounded(**changes: Any) -> Config:
    """Bounds of 0.05 (mean), 0.1 (99th percentile) and 1.0 (maximum)."""
    gates = {"sampler_logprob_mean": 0.05, "sampler_logprob_p99": 0.1, "sampler_logprob_max": 1.0}
    return make_config(gates=gates | changes)


def columns(*differences: Piece, off: int = 0, tokens: int = TOKENS) -> Columns:
    """One step; the first `off` tokens were not sampled."""
    behav = -np.linspace(0.1, 3.0, tokens)
    old, on = behav.copy(), np.ones(tokens, dtype=bool)
    for first, last, difference in differences:
        old[first:last] = behav[first:last] + difference * np.where(np.arange(first, last) % 2, 1.0, -1.0)
    on[:off] = False
    return {
        "on": on,
        "old_logp": old.astype(np.float32),
        "rollout_logp": behav.astype(np.float32),
        "epoch": np.zeros(tokens, dtype=np.int64),
    }


def gate_of(config: Config, *, exact: bool = True) -> SamplerGate:
    return SamplerGate(config, SamplerBounds.of(config, exact=exact))


def refused(config: Config, *steps: Columns | Sequence[Columns], first_step: int = 0, exact: bool = True) -> str:
    """The error of the gate at the last of the steps. The other steps pass."""
    gate = gate_of(config, exact=exact)
    for number, step in enumerate(steps, start=first_step):
        parts = [step] if isinstance(step, dict) else list(step)  # type: ignore[arg-type]
        if number < first_step + len(steps) - 1:
            assert gate.check(number, parts)
            continue
        with pytest.raises(GateError) as caught:
            gate.check(number, parts)
    return str(caught.value)


def passes(config: Config, *steps: Columns, exact: bool = True) -> SamplerGate:
    gate = gate_of(config, exact=exact)
    for number, step in enumerate(steps):
        assert gate.check(number, [step])
    return gate


FINE = columns()
P99_OFF = columns((0, 30, 0.5))
MEAN_OFF = columns((0, TOKENS, 0.07))
SHARE_OFF = columns((0, 30, 0.2), tokens=LEAST_TOKENS - 1)
MAXIMUM_OFF = columns((7, 8, 2.0))


def test_the_first_step_is_refused_if_only_the_percentile_is_above_its_bound() -> None:
    message = refused(bounded(), P99_OFF)
    assert "1.5e-02 nats (mean), 5.0e-01 (99th percentile)" in message and f"over {TOKENS} tokens" in message
    assert "allowed 5e-02, 1e-01, 1e+00" in message and "3.0% of the tokens" in message and "allowed 5%" in message


def test_with_exact_engines_the_first_step_is_refused_if_only_the_maximum_is_above_its_bound() -> None:
    message = refused(bounded(), MAXIMUM_OFF)
    assert "2.0e+00 (maximum)" in message and "0.1% of the tokens" in message


def test_with_rounding_engines_a_maximum_above_its_bound_in_the_first_step_is_a_counted_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gate = passes(bounded(), MAXIMUM_OFF, MAXIMUM_OFF, exact=False)
    assert gate.state.warnings == 2
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line.startswith("gates.sampler_logprob: step 0: ") and "(1 such steps)" in line


@pytest.mark.parametrize(
    ("near", "far"),
    [
        (columns((0, 30, 0.19)), columns((0, 30, 0.21))),
        (columns((0, TOKENS, 0.0625)), columns((0, TOKENS, 0.125))),
        (columns((0, 40, 0.19), tokens=LEAST_TOKENS - 1), columns((0, 60, 0.19), tokens=LEAST_TOKENS - 1)),
    ],
    ids=["percentile", "mean", "share"],
)
def test_with_rounding_engines_a_first_step_slightly_above_its_bound_counts_and_one_far_above_stops(
    near: Columns, far: Columns
) -> None:
    config = bounded(sampler_logprob_steps=2)
    assert passes(config, near, FINE, near, exact=False).state.off_in_a_row == 1
    assert "in 2 steps in a row" in refused(config, near, near, exact=False)
    assert "in a row" not in refused(config, far, exact=False)
    refused(config, near)


def test_the_maximum_of_a_first_step_of_several_updates_is_warned_about_once() -> None:
    gate = gate_of(bounded(), exact=False)
    gate.check(0, [MAXIMUM_OFF], first_update=True)
    assert gate.state.warnings == 0
    gate.check(0, [MAXIMUM_OFF])
    assert gate.state.warnings == 1


def test_the_first_step_is_refused_if_only_the_mean_is_above_its_bound() -> None:
    """Every token differs slightly, as with an almost correct temperature."""
    message = refused(bounded(), MEAN_OFF)
    assert "7.0e-02 nats (mean), 7.0e-02 (99th percentile), 7.0e-02 (maximum)" in message


def test_the_first_step_is_refused_if_only_the_share_is_above_its_bound() -> None:
    message = refused(bounded(), SHARE_OFF)
    assert f"over {LEAST_TOKENS - 1} tokens" in message and "6.0% of the tokens" in message


def test_few_tokens_are_not_judged_by_their_percentile_and_one_token_not_by_its_share() -> None:
    few = columns((0, 20, 0.9), tokens=LEAST_TOKENS - 1)
    assert passes(bounded(), few).passed
    assert "1.6% of the tokens" in refused(bounded(), columns((0, 8, 0.9), tokens=LEAST_TOKENS))
    assert passes(bounded(), columns((0, 1, 0.12), tokens=6)).passed
    assert "33.3% of the tokens" in refused(bounded(), columns((0, 2, 0.12), tokens=6))


def test_the_gate_is_silent_about_later_steps_inside_all_bounds() -> None:
    gate = passes(bounded(), FINE, columns((0, TOKENS, 0.03125), (3, 5, 0.9)), FINE)
    assert gate.state.off_in_a_row == gate.state.warnings == 0 and gate.state.p99_bound == 0.1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_log_prob_that_is_not_finite_stops_the_first_step_and_later_ones(value: float) -> None:
    step = columns()
    step["old_logp"][5] = value  # type: ignore[index]
    assert "inf nats (mean)" in refused(bounded(), step)
    assert "inf nats (mean)" in refused(bounded(), FINE, step)


def test_the_gate_compares_absolute_differences() -> None:
    for sign in (1.0, -1.0):
        step = dict(columns())
        step["old_logp"] = step["old_logp"].copy()
        step["old_logp"][:50] += sign * 0.5
        refused(bounded(), step)


def test_the_gate_compares_only_sampled_tokens() -> None:
    everything = columns((0, 900, 5.0))
    assert "over 1000 tokens" in refused(bounded(), everything)
    assert passes(bounded(), columns((0, 900, 5.0), off=900)).passed
    assert "over 100 tokens" in refused(bounded(), columns((0, 901, 5.0), off=900))


def test_the_gate_compares_the_rows_of_all_ranks_but_not_of_later_epochs() -> None:
    moved = dict(columns((0, TOKENS, 5.0)))
    moved["epoch"] = np.ones(TOKENS, dtype=np.int64)
    gate = gate_of(bounded())
    assert gate.check(0, [moved, {}, FINE]) and not gate_of(bounded()).check(0, [moved, {}])
    assert "over 2000 tokens" in refused(bounded(), (FINE, {}, P99_OFF))


def test_a_step_without_sampled_tokens_is_not_compared_and_does_not_reset_the_failure_count() -> None:
    nothing = columns((0, TOKENS, 9.0), off=TOKENS)
    gate = gate_of(bounded())
    assert not gate.check(0, [nothing]) and not gate.check(1, [{}])
    gate.check(2, [FINE])
    gate.check(3, [P99_OFF])
    assert gate.check(4, [nothing]) and gate.state.off_in_a_row == 1


@pytest.mark.parametrize("wrong", [P99_OFF, MEAN_OFF, SHARE_OFF], ids=["percentile", "mean", "share"])
@pytest.mark.parametrize("allowed", [1, 2, 5])
def test_the_run_stops_after_the_configured_number_of_consecutive_later_steps_above_a_bound(
    wrong: Columns, allowed: int
) -> None:
    config = bounded(sampler_logprob_steps=allowed)
    message = refused(config, FINE, *[wrong] * allowed, first_step=40)
    assert message.startswith(f"gates.sampler_logprob: step {40 + allowed}: ")
    assert f"in {allowed} steps in a row" in message
    assert passes(config, FINE, *[wrong] * (allowed - 1), FINE, *[wrong] * (allowed - 1)).passed


def test_a_later_step_whose_mean_is_far_above_its_bound_stops_the_run_at_once() -> None:
    far = columns((0, TOKENS, 1.01 * GROSS * 0.05))
    message = refused(bounded(sampler_logprob_p99=9.0, sampler_logprob_max=9.0), FINE, far, first_step=4)
    assert message.startswith("gates.sampler_logprob: step 5: ") and "the mean by more than 10 times" in message
    config = bounded(sampler_logprob_p99=9.0, sampler_logprob_max=9.0)
    assert passes(config, FINE, columns((0, TOKENS, 0.99 * GROSS * 0.05))).state.off_in_a_row == 1
    few = GROSS_TOKENS - 1
    assert passes(config, FINE, columns((0, few, 2.0), tokens=few)).state.off_in_a_row == 1
    assert "remove nowhere/rollouts/step_000001.npz to step 2" in refused(
        bounded(), FINE, P99_OFF, columns((0, 900, 0.9))
    )


def test_the_message_names_the_stored_rollouts_that_a_resume_would_use_again() -> None:
    assert "remove nowhere/rollouts/step_000041.npz to step 43" in refused(
        bounded(), FINE, *[P99_OFF] * 3, first_step=40
    )
    assert "remove nowhere/rollouts/step_000007.npz to have them" in refused(bounded(), P99_OFF, first_step=7)


def test_a_later_maximum_above_its_bound_is_warned_about_and_counted_and_stops_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gate = passes(bounded(), FINE, *[MAXIMUM_OFF] * 2 * WARN_EVERY)
    assert gate.state.warnings == 2 * WARN_EVERY and gate.state.off_in_a_row == 0
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(lines) == 2 and "step 1: " in lines[0] and f"step {1 + WARN_EVERY}: " in lines[1]
    assert f"({1 + WARN_EVERY} such steps)" in lines[1]


def test_a_later_step_above_a_bound_is_warned_about_at_once(caplog: pytest.LogCaptureFixture) -> None:
    passes(bounded(), FINE, P99_OFF)
    assert "step 1: 99th percentile above the bound, 1 of 3 steps in a row that stop the run" in caplog.text


def test_the_rows_of_the_first_of_several_updates_must_pass_once_and_do_not_count_as_a_step() -> None:
    gate = gate_of(bounded(sampler_logprob_steps=1))
    with pytest.raises(GateError):
        gate.check(0, [P99_OFF], first_update=True)
    gate = gate_of(bounded(sampler_logprob_steps=1))
    assert gate.check(0, [FINE], first_update=True) and gate.check(1, [P99_OFF], first_update=True)
    with pytest.raises(GateError, match="in 1 steps in a row"):
        gate.check(0, [P99_OFF])


def test_in_a_replay_of_another_run_only_the_first_step_is_judged() -> None:
    config = make_config(run={"dir": "nowhere", "steps": 4, "replay": "elsewhere"}, gates={"sampler_logprob_p99": 0.1})
    assert passes(config, FINE, *[P99_OFF] * 9).state.off_in_a_row == 0
    refused(config, P99_OFF)


@pytest.mark.parametrize(
    ("student", "server", "device", "exact"),
    [
        ("float32", None, "cpu", True),
        ("float32", "float32", "cpu", True),
        ("float32", "bfloat16", "cpu", False),
        ("bfloat16", None, "cpu", False),
        ("bfloat16", "float32", "cpu", False),
        ("bfloat16", "bfloat16", "cpu", False),
        ("float32", "float32", "cuda", False),
    ],
)
def test_engines_are_exact_only_in_float32_on_a_cpu(student: str, server: str | None, device: str, exact: bool) -> None:
    config = make_config(student={"dtype": student}, rollout={"server": {"dtype": server}})
    assert engines_are_exact(config, device) is exact


@pytest.mark.parametrize(
    ("said", "exact"),
    [
        ({"dtype": "float32", "device": "cpu"}, True),
        ({"dtype": "float32", "device": "cuda"}, False),
        ({"dtype": "float32"}, False),
        ({"dtype": "auto", "device": "cpu"}, False),
        ({"dtype": "float32", "device": "cpu", "quantization": "fp8"}, False),
    ],
)
def test_a_server_at_a_url_is_exact_only_if_it_reports_unquantized_float32_on_a_cpu(
    said: dict[str, str], exact: bool
) -> None:
    info = read_server_info({"max_req_input_len": 99, "tp_size": 1, **said}, {"weight_version": "v1"})
    assert engines_are_exact(make_config(), "cpu", info) is exact
    assert not engines_are_exact(make_config(), "cuda", info)


def test_only_a_rollout_server_at_a_url_is_asked_how_it_computes() -> None:
    page = {"max_req_input_len": 99, "tp_size": 1, "dtype": "float32", "device": "cuda"}
    client = SimpleNamespace(info=lambda: read_server_info(page, {"weight_version": "v1"}))
    gates = {"sampler_logprob": True}
    elsewhere = make_config(rollout={"server": {"url": "http://elsewhere:1"}}, gates=gates)
    with one_rank() as layout:
        for config, exact in ((elsewhere, False), (make_config(gates=gates), True)):
            site: Any = SimpleNamespace(config=config, layout=layout, platform=SimpleNamespace(name="cpu"))
            server: Any = SimpleNamespace(client=client, is_started=config.rollout.server.url is None)
            servers = {"rollout.server": server}
            assert sampler_bounds(site, PolicyServers(servers, servers)).exact is exact
            ours: Any = SimpleNamespace(client=client, is_started=True)
            mixed = {"rollout.servers.0": server, "rollout.servers.1": ours}
            assert sampler_bounds(site, PolicyServers(mixed, mixed)).exact is exact, "one that rounds is enough"


@pytest.mark.parametrize("exact", [True, False])
def test_default_bounds_are_tight_only_between_exact_engines(exact: bool) -> None:
    config = make_config()
    mean, p99, largest = expected = (FLOAT32_MEAN, *FLOAT32_BOUNDS) if exact else (BFLOAT16_MEAN, *BFLOAT16_BOUNDS)
    bounds = SamplerBounds.of(config, exact=exact)
    assert (bounds.mean, bounds.p99, bounds.largest, bounds.share, bounds.steps) == (*expected, 0.05, 3)
    margin = 1.0 if exact else FIRST_STEP
    refused(config, columns((0, 50, 1.1 * margin * p99)), exact=exact)
    refused(config, columns((0, TOKENS, 1.1 * margin * mean)), exact=exact)
    passes(config, columns((0, 50, 0.9 * p99), (60, 61, 0.9 * largest)), exact=exact)


@pytest.mark.parametrize(
    ("gates", "expected"),
    [
        ({"sampler_logprob_mean": 0.3}, (0.3, *FLOAT32_BOUNDS, 0.05, 3)),
        ({"sampler_logprob_p99": 0.5}, (FLOAT32_MEAN, 0.5, FLOAT32_BOUNDS[1], 0.05, 3)),
        ({"sampler_logprob_max": 7.0}, (FLOAT32_MEAN, FLOAT32_BOUNDS[0], 7.0, 0.05, 3)),
        ({"sampler_logprob_share": 0.5, "sampler_logprob_steps": 9}, (FLOAT32_MEAN, *FLOAT32_BOUNDS, 0.5, 9)),
    ],
)
def test_a_configured_bound_replaces_only_its_own_default(gates: dict[str, Any], expected: tuple[float, ...]) -> None:
    bounds = SamplerBounds.of(make_config(gates=gates), exact=True)
    assert (bounds.mean, bounds.p99, bounds.largest, bounds.share, bounds.steps) == expected


def test_the_documented_default_bounds_equal_those_of_the_code() -> None:
    assert (FLOAT32_MEAN, *FLOAT32_BOUNDS) == (2e-5, 1e-4, 1e-2)
    assert (BFLOAT16_MEAN, *BFLOAT16_BOUNDS) == (0.05, 0.25, 2.0)


@pytest.mark.parametrize(
    ("wrong", "causes"),
    [
        (
            600,
            [
                "other weights (a publication that did not arrive, a foreign or renamed checkpoint, rollouts that "
                "another run stored)",
                "another temperature (rollout.temperature) or another chat template in the server",
            ],
        ),
        (100, ["another dtype (rollout.server.dtype, student.dtype), a tensor that was converted wrongly"]),
        (1, ["single tokens only: special tokens, or padded vocabulary columns in one of the two softmaxes"]),
    ],
)
def test_the_likely_cause_follows_from_the_share_of_wrong_tokens(wrong: int, causes: list[str]) -> None:
    message = refused(bounded(), columns((0, wrong, 2.0)))
    assert all(cause in message for cause in causes) and message.startswith("gates.sampler_logprob: step 0: ")
    assert message.endswith("gates.sampler_logprob_share, gates.sampler_logprob_steps")


def served(**changes: Any) -> Config:
    sections: dict[str, Any] = {"teacher": {"kind": "sglang", "path": "teacher", "dtype": "float32"}, "gates": {}}
    for name, section in changes.items():
        sections[name] = sections.get(name, {}) | section
    return make_config(**sections)


def scored(noise: float, teacher: float) -> Columns:
    """The sampler differs from the student by `noise` on every token, the teacher by `teacher`."""
    step = dict(columns((0, TOKENS, noise)))
    sign = np.where(np.arange(TOKENS) % 3, 1.0, -1.0)
    step["teacher_logp"] = (step["old_logp"].astype(np.float64) + teacher * sign).astype(np.float32)
    return step


def look_at(parts: Sequence[Columns], config: Config, step: int) -> None:
    bounds = SamplerBounds.of(config, exact=engines_are_exact(config, "cpu"))
    check_teachers_are_others(parts, config, bounds, step)


@pytest.mark.parametrize("noise", [0.0, 3e-7, 7e-3])
def test_a_teacher_whose_scores_of_the_first_rollouts_match_the_students_is_refused(noise: float) -> None:
    config = served(student={"dtype": "float32" if noise < 1e-3 else "bfloat16"})
    for teacher in (0.0, 2.0 * noise):
        with pytest.raises(
            GateError, match=r"^gates\.teacher_identity: .*teacher\.server serves the student's weights"
        ):
            look_at([scored(noise, teacher), {}], config, 0)
    look_at([scored(noise, 10.0 * noise + 1e-4)], config, 0)


def test_teacher_and_student_scores_are_not_compared_where_equality_would_prove_nothing() -> None:
    """Cases: a later step (the student may have learnt everything), another temperature, a replay, the same folder, a
    teacher without a server, and a gate that is off."""
    same = [scored(3e-7, 0.0)]
    with pytest.raises(GateError):
        look_at(same, served(), 0)
    look_at(same, served(), 1)
    look_at(same, served(rollout={"temperature": 0.7}), 0)
    look_at(same, served(run={"dir": "nowhere", "steps": 4, "replay": "elsewhere"}), 0)
    look_at(same, served(teacher={"path": "student"}), 0)
    look_at(same, served(teacher={"kind": "megatron"}), 0)
    look_at(same, served(gates={"teacher_identity": False}), 0)
    look_at([{}], served(), 0)
