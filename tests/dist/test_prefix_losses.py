"""Replayed guided rollouts: the objective decides if prefixes are rows, teacher failures decide in which sample.

The reference is a loop over tokens in float64 on the plain model. It imports nothing that decides a carrier.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.dist import reference
from tests.dist.layouts import Case
from tests.dist.prefix_ranks import Launch, Outcome, launches, log_softmax_after
from tests.dist.test_layouts import TOLERANCE, relative_error
from tests.ranks import run_on_ranks
from tropd_mcore.errors import TeacherError
from tropd_mcore.records.replay import save_rollouts
from tropd_mcore.types import Rollout

TOPK, BETA = 9, 0.3
SAMPLES = 3
LENGTHS = [(3, 6), (4, 5), (2, 9)]
"""Prompt and prefix tokens of each prompt, with SAMPLES samples; rollout 4 is the second sample of the second."""
GUIDED = {"kind": "tropd", "guidance": {"beta": BETA, "loss": "topk_fkl"}, "outlier": {"topk": TOPK}}
OPD = {"kind": "opd", "topk": TOPK}
LAYOUTS = {"rank-0-asks": (Case(), True), "replicas-ask": (Case(), False), "context": (Case(context=2), False)}


def guided_rollouts(carriers: Sequence[int]) -> list[Rollout]:
    random = np.random.default_rng(8)

    def ids(count: int) -> Any:
        return random.integers(0, reference.VOCABULARY, count, dtype=np.int32)

    rollouts = []
    for prompt, (prompt_tokens, prefix_tokens) in enumerate(LENGTHS):
        prompt_ids, prefix_ids = ids(prompt_tokens), ids(prefix_tokens)
        for sample in range(SAMPLES):
            count = 3 + (5 * prompt + 2 * sample) % 7
            rollouts.append(
                Rollout(
                    sample_id=f"p{prompt}/{sample}",
                    prompt_id=f"p{prompt}",
                    prompt_ids=prompt_ids,
                    prefix_ids=prefix_ids,
                    response_ids=ids(count),
                    rollout_logp=random.normal(-4.0, 1.0, count).astype(np.float32),
                    trust_u=random.random(count, dtype=np.float32),
                    policy_version="0",
                    finish_reason="stop",
                    carries_prefix_loss=len(rollouts) in carriers,
                    answer=None,
                )
            )
    return rollouts


def expected_step(
    folder: Path, rollouts: list[Rollout], *, unscored: Sequence[int], carriers: Sequence[int], trust: bool
) -> tuple[float, int, dict[str, Tensor]]:
    """(loss, tokens, gradients): -r log p or FKL of a response token, beta FKL of the prefix tokens of the carriers."""
    student = reference.reference_model(folder)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for index, rollout in enumerate(rollouts):
        if index in unscored:
            continue
        ids = rollout.token_ids.tolist()
        log_p = torch.log_softmax(student(torch.tensor([ids])).logits[0] / 0.8, dim=-1)
        start = len(rollout.prompt_ids) + len(rollout.prefix_ids)
        for token in range(len(rollout.prompt_ids), len(ids)):
            if token < start and index not in carriers:
                continue
            lp, lq = log_p[token - 1], log_softmax_after(ids[:token], reference.VOCABULARY)
            top = lq.topk(TOPK).indices
            fkl = (lq[top].exp() * (lq[top] - lp[top])).sum()
            ratio = float(lq[ids[token]] - lp[ids[token]].detach())
            if token < start:
                total = total + BETA * fkl
            elif trust or np.log(rollout.trust_u[token - start]) < ratio:
                total = total - ratio * lp[ids[token]]
            else:
                total = total + fkl
            count += 1
    (total / count).backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return float(total.detach()) / count, count, gradients


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.write_model(reference.STUDENTS["qwen3"], tmp_path_factory.mktemp("models") / "student", seed=5)


def stored(folder: Path, rollouts: list[Rollout]) -> Path:
    save_rollouts(folder / "rollouts" / "step_000000.npz", rollouts)
    return folder


def run(
    student: Path, tmp_path: Path, rollouts: list[Rollout], objective: dict[str, Any], *wanted: Launch,
    layout: str = "rank-0-asks",
) -> list[Outcome]:  # fmt: skip
    """The launches, as rank 0 saw them; all ranks agree on the carriers."""
    case, one_asks = LAYOUTS[layout]
    arguments = (student, stored(tmp_path / "sampled", rollouts), tmp_path / "run", objective, case, one_asks)
    ranks = run_on_ranks(launches, 2, *arguments, list(wanted or [Launch()]), reference.VOCABULARY)
    assert [outcome.carriers for outcome in ranks[0]] == [outcome.carriers for outcome in ranks[1]]
    return ranks[0]


def assert_equals(outcome: Outcome, expected: tuple[float, int, dict[str, Tensor]]) -> None:
    assert outcome.results is not None and outcome.gradients is not None
    loss, count, gradients = expected
    assert outcome.results["token_count"] == count
    assert outcome.results["loss"] == pytest.approx(loss, rel=TOLERANCE)
    errors = {name: relative_error(outcome.gradients[name], gradients[name]) for name in gradients}
    assert max(errors.values()) <= TOLERANCE, errors


def requests(rollouts: list[Rollout], *, carriers: Sequence[int]) -> list[tuple[int, int]]:
    """One request per sample, scored from the prefix on for the carriers and from the response on for the others."""
    return [
        (index, len(rollout.prompt_ids) + (0 if index in carriers else len(rollout.prefix_ids)))
        for index, rollout in enumerate(rollouts)
    ]


def test_guided_rollouts_replayed_without_a_prefix_loss_have_the_gradient_of_their_responses(
    student: Path, tmp_path: Path
) -> None:
    """The same rollouts with the prefix in the prompt give the same loss, count and gradient, bit for bit."""
    guided = guided_rollouts(carriers=[0, 3, 6])
    plain = [
        dataclasses.replace(
            rollout,
            prompt_ids=np.concatenate([rollout.prompt_ids, rollout.prefix_ids]),
            prefix_ids=rollout.prefix_ids[:0],
            carries_prefix_loss=False,
        )
        for rollout in guided
    ]
    (outcome,) = run(student, tmp_path / "guided", guided, OPD)
    (bare,) = run(student, tmp_path / "bare", plain, OPD)
    assert outcome.carriers == [] and outcome.results is not None and bare.results is not None
    assert not outcome.results["columns"]["off"].any()
    assert (outcome.results["loss"], outcome.results["token_count"]) == (
        bare.results["loss"], bare.results["token_count"],
    )  # fmt: skip
    assert outcome.gradients is not None and bare.gradients is not None
    assert all(torch.equal(outcome.gradients[name], gradient) for name, gradient in bare.gradients.items())
    assert_equals(outcome, expected_step(student, guided, unscored=[], carriers=[], trust=True))


@pytest.mark.parametrize("carriers", [[], [1, 3, 8]], ids=["sampled-without-prefix-loss", "with"])
def test_guided_rollouts_replayed_with_a_prefix_loss_have_one_carrier_per_prompt(
    student: Path, tmp_path: Path, carriers: list[int]
) -> None:
    rollouts = guided_rollouts(carriers)
    (outcome,) = run(student, tmp_path, rollouts, GUIDED)
    assert outcome.carriers == (carriers or [0, 3, 6])
    assert outcome.asked == requests(rollouts, carriers=outcome.carriers)
    assert_equals(outcome, expected_step(student, rollouts, unscored=[], carriers=[0, 3, 6], trust=False))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_scored_sample_of_the_prompt_supplies_the_prefix_loss(
    student: Path, tmp_path: Path, layout: str
) -> None:
    """Sample 0 fails. Sample 3 fails too, and sample 4, which should take over, on its prefix. The third prompt has no
    scored sample."""
    rollouts = guided_rollouts(carriers=[0, 3, 6])
    failing = [(0, "always"), (3, "always"), (4, "prefix"), (6, "always"), (7, "always"), (8, "always")]
    (outcome,) = run(student, tmp_path, rollouts, GUIDED, Launch(failing), layout=layout)
    assert outcome.carriers == outcome.stored == [1, 5, 6]
    again = [(index, len(rollouts[index].prompt_ids)) for index in (1, 4, 5)]
    assert outcome.asked == sorted(requests(rollouts, carriers=[0, 3, 6]) + again)
    assert outcome.results is not None
    assert int(outcome.results["columns"]["off"].sum()) == sum(len(rollouts[index].prefix_ids) for index in (1, 5))
    assert_equals(outcome, expected_step(student, rollouts, unscored=[0, 3, 6, 7, 8], carriers=[1, 5], trust=False))


def test_a_killed_step_is_repeated_with_the_same_carriers(student: Path, tmp_path: Path) -> None:
    """Killed before the scores were stored, it asks a working server again. After that it sends no request."""
    rollouts = guided_rollouts(carriers=[0, 3, 6])
    killed = Launch([(0, "always")], killed_before_scores=True)
    first, second, third = run(student, tmp_path, rollouts, GUIDED, killed, Launch(), Launch())
    assert first.carriers == first.stored == [1, 3, 6]
    assert second.carriers == third.carriers == [1, 3, 6]
    assert second.asked == requests(rollouts, carriers=[1, 3, 6]) and third.asked == []
    assert second.gradients is not None and third.gradients is not None
    assert all(torch.equal(third.gradients[name], gradient) for name, gradient in second.gradients.items())
    assert_equals(third, expected_step(student, rollouts, unscored=[], carriers=[1, 3, 6], trust=False))


@pytest.mark.parametrize("layout", ["rank-0-asks", "replicas-ask"])
def test_the_share_of_samples_without_scores_is_bounded_over_all_replicas(
    student: Path, tmp_path: Path, layout: str
) -> None:
    """Two of nine. The bound applies to the step: one replica may lose a larger share of its own samples."""
    rollouts = guided_rollouts(carriers=[])
    lost = [(0, "always"), (4, "always")]
    wanted = [Launch(lost, masked_share=0.3), Launch(lost, masked_share=0.2)]
    (outcome,) = run(student, tmp_path / "kept", rollouts, OPD, wanted[0], layout=layout)
    assert_equals(outcome, expected_step(student, rollouts, unscored=[0, 4], carriers=[], trust=True))
    with pytest.raises(TeacherError, match=r"2 of 9 samples of the step could not be scored, among them p0/0; at most"):
        run(student, tmp_path / "stopped", rollouts, OPD, wanted[1], layout=layout)
