"""Refusals of the library: one line for each mistake, and none for values without influence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.library_cases import NAMES, VP, B, Case, S, V
from tropd_mcore import (
    LossInputError,
    OutputLayer,
    TeacherTopK,
    VocabParallel,
    distill_loss,
    loss_from_log_probs,
    objectives,
)

REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "a float mask": ({"student_mask_T": torch.ones(B, S)}, "student_mask_T is torch.float32, expected bool; pass"),
    "a mask of another shape": (
        {"student_mask_T": torch.ones(B, dtype=torch.bool)}, r"student_mask_T has shape \(3,\), expected \(3, 7\)"
    ),
    "a prefix that is not read": (
        {"prefix_mask_T": torch.ones(B, S, dtype=torch.bool)}, "prefix_mask_T was given to opd"
    ),
    "an advantage that is not read": ({"advantage_T": torch.ones(B, S)}, "advantage_T was given to opd"),
    "another reduction": ({"reduction": "mean"}, "reduction='mean', expected 'sum' or 'none'; you divide"),
    "weights of another shape": ({"weight_T": torch.ones(S)}, r"weight_T has shape \(7,\), expected \(3, 7\)"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSALS)
def test_inputs_that_would_silently_give_another_loss_are_refused_in_one_line(what: str) -> None:
    case, (changes, line) = Case(), REFUSALS[what]
    with pytest.raises(LossInputError, match=line) as refused:
        distill_loss(case.logits(), case.x, case.top, objectives.opd(), vp=VP, **changes)
    assert len(str(refused.value).splitlines()) == 1


def test_students_without_a_gradient_are_refused_in_one_line() -> None:
    case, opd = Case(), objectives.opd()

    def loss(student: Any, vp: VocabParallel = VP, **more: Any) -> Any:
        return distill_loss(student, case.x, case.top, opd, vp=vp, **more)

    with pytest.raises(LossInputError, match="cannot be viewed as .* without a copy; keep all positions"):
        distill_loss(case.logits()[:, :-1], case.x[:, 1:], TeacherTopK(case.log_q_x[:, 1:]), opd, vp=VP)
    with pytest.raises(LossInputError, match="stride of 7, expected 1"):
        loss(case.logits().transpose(1, 2).contiguous().transpose(1, 2))
    with pytest.raises(LossInputError, match="two dtypes: hidden states torch.float64, weight torch.float32"):
        loss(OutputLayer(case.hidden, case.weight.float()))
    with pytest.raises(LossInputError, match=r"hidden states \(3, 7, 8\) and a weight \(37, 7\)"):
        loss(OutputLayer(case.hidden, case.weight[:, :-1].contiguous()))
    with pytest.raises(LossInputError, match="reduction='none' needs the gradient of each token in the backward pass"):
        loss(OutputLayer(case.hidden, case.weight), reduction="none")
    with pytest.raises(LossInputError, match="preserve_logits is for given logits"):
        loss(OutputLayer(case.hidden, case.weight), preserve_logits=True)
    with pytest.raises(LossInputError, match="1 ranks of 37 columns are 37, fewer than vocab_size=40"):
        loss(case.logits(), VocabParallel.single(40))
    with pytest.raises(LossInputError, match="backend=triton runs on CUDA"):
        loss(case.logits(), VocabParallel.single(V, backend="triton"))
    with pytest.raises(LossInputError, match="group=None would be the whole world"):
        VocabParallel(None, V)  # type: ignore[arg-type]
    with pytest.raises(LossInputError, match="found vocab_size=0"):
        VocabParallel.single(0)


def _top(case: Case, **changes: Any) -> TeacherTopK:
    return replace(case.top, **changes)


MISTAKES: dict[str, tuple[Any, str]] = {
    "vp is a number": (lambda case: {"vp": 37}, r"vp is a int, expected VocabParallel\(group, vocab_size\), or Voc"),
    "an objective that was not called": (
        lambda case: {"objective": objectives.tropd},
        r"objectives.tropd makes an objective; call it: objectives.tropd\(\)",
    ),
    "targets of floats": (
        lambda case: {"target_ids_T": case.x.double()}, "target_ids_T is torch.float64, expected integers, the ids"
    ),
    "uniforms of integers": (
        lambda case: {"trust_u_T": case.x}, "trust_u_T is torch.int64, expected floating-point numbers"
    ),
    "ids and log-probs exchanged": (
        lambda case: {"teacher": _top(case, ids_TK=case.top.logp_TK, logp_TK=case.top.ids_TK)},
        "teacher.ids_TK is torch.float64, expected integers",
    ),
    "fewer ids than log-probs": (
        lambda case: {"teacher": _top(case, ids_TK=case.top.ids_TK[..., :2])},
        r"TeacherTopK has ids \(3, 7, 2\) and log-probs \(3, 7, 5\); expected one for each",
    ),
    "probabilities for log-probs": (
        lambda case: {"teacher": _top(case, logp_TK=case.top.logp_TK.exp())},
        "teacher.logp_TK has numbers above 0; pass log q, not probabilities or logits",
    ),
    "a probability of the target": (
        lambda case: {"teacher": _top(case, logp_T=case.log_q_x.exp())}, "teacher.logp_T has numbers above 0"
    ),
    "an id twice": (
        lambda case: {"teacher": _top(case, logp_TK=torch.full_like(case.top.logp_TK, -0.5))},
        "teacher.logp_TK has more than probability 1 for a token; pass true log q of different ids",
    ),
    "normal numbers for uniforms": (
        lambda case: {"trust_u_T": case.advantage()}, r"trust_u_T is not all in \[0, 1\)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", MISTAKES)
def test_a_silent_mistake_gives_a_one_line_error(what: str) -> None:
    case = Case()
    changes, line = MISTAKES[what]
    given = {
        "objective": objectives.tropd(), "teacher": case.top, "vp": VP, "trust_u_T": case.given["trust_u_T"],
        "target_ids_T": case.x, **changes(case),
    }  # fmt: skip
    with pytest.raises(LossInputError, match=rf"^distill_loss: {line}"):
        distill_loss(case.logits(), **given)


def test_wrong_values_outside_the_masks_are_accepted() -> None:
    case = Case()
    inside = case.top.logp_TK.masked_fill(~case.mask[..., None], 3.0)  # type: ignore[union-attr]
    teacher = replace(case.top, logp_TK=inside)
    distill_loss(case.logits(), case.x, teacher, objectives.gkd(), vp=VP, student_mask_T=case.mask)


def test_all_columns_on_each_of_several_ranks_are_refused() -> None:
    group = SimpleNamespace(size=lambda: 2, rank=lambda: 1)
    vp = VocabParallel(group, 1000)  # type: ignore[arg-type]
    with pytest.raises(LossInputError, match=r"each of 2 ranks has 1000 columns, all of vocab_size=1000; pass the col"):
        vp.kernel(1000, torch.device("cpu"), overlap=False)
    vp.kernel(500, torch.device("cpu"), overlap=False)
    tiny = VocabParallel(group, 100)  # type: ignore[arg-type]  # padded to 256 columns by Megatron: rank 1 has none of it
    tiny.kernel(128, torch.device("cpu"), overlap=False)


def test_an_unknown_option_word_is_refused_when_the_objective_is_created() -> None:
    with pytest.raises(ValueError, match="tropd: trust_mode='sof', expected one of bernoulli, soft, threshold, none"):
        objectives.tropd(trust_mode="sof")
    with pytest.raises(ValueError, match="PolicyGradient: ratio='ppo', expected one of none, importance, ppo_clip"):
        objectives.PolicyGradient(ratio="ppo")


def test_every_text_option_of_an_objective_has_a_list_of_allowed_words() -> None:
    from tropd_mcore.objectives.catalogue import CHOICES

    words: set[str] = set()
    for name in NAMES:
        values = objectives.from_name(name).values
        words |= {key for key, value in values.items() if isinstance(value, str)}
    assert words <= CHOICES.keys(), "a constant that is a word, and has no list of words"


def test_every_objective_is_a_name_of_the_objectives_module() -> None:
    for name in NAMES:
        assert str(getattr(objectives, name)()) == f"{name}()"
    assert {name for name in objectives.__all__ if name[0].islower()} == {*NAMES, "custom", "from_name"}


def test_debug_reports_impossible_values() -> None:
    case, vp = Case(), VocabParallel.single(V, debug=True)
    tropd = objectives.tropd()
    arguments = {"student_mask_T": case.mask, "trust_u_T": case.given["trust_u_T"]}
    distill_loss(case.logits(), case.x, case.top, tropd, vp=vp, **arguments)
    assert case.top.ids_TK is not None
    twice = case.top.ids_TK.clone()
    twice[..., 1] = twice[..., 0]
    broken = case.logits()
    broken[0, 0, 0] = torch.nan
    with pytest.raises(LossInputError, match="a token has a teacher's candidate twice"):
        distill_loss(case.logits(), case.x, replace(case.top, ids_TK=twice), tropd, vp=vp, **arguments)
    with pytest.raises(LossInputError, match="logits are not all finite"):
        distill_loss(broken, case.x, case.top, tropd, vp=vp, **arguments)
    with pytest.raises(LossInputError, match=r"trust_u_T is not all in \[0, 1\)"):
        distill_loss(case.logits(), case.x, case.top, tropd, vp=vp, **{**arguments, "trust_u_T": -case.weights})


LOG_PROBS_OF_THE_CALLER: dict[str, tuple[Callable[[Case], dict[str, Any]], str]] = {
    "a probability of the student": (lambda case: {"student_logp_T": case.log_q_x.exp()}, "student_logp_T has numbers"),
    "probabilities of candidates": (
        lambda case: {"student_topk_logp_TK": case.top.logp_TK.exp()}, "student_topk_logp_TK has numbers above 0"
    ),
    "probabilities of the teacher": (
        lambda case: {"teacher": _top(case, logp_TK=case.top.logp_TK.exp())}, "teacher.logp_TK has numbers above 0"
    ),
    "normal numbers for uniforms": (
        lambda case: {"trust_u_T": case.advantage()}, r"trust_u_T is not all in \[0, 1\)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", LOG_PROBS_OF_THE_CALLER)
def test_impossible_log_probs_give_a_one_line_error(what: str) -> None:
    case = Case()
    changes, line = LOG_PROBS_OF_THE_CALLER[what]
    given = {
        "student_logp_T": case.log_q_x, "student_topk_logp_TK": case.top.logp_TK, "teacher": case.top,
        "objective": objectives.tropd(), "trust_u_T": case.given["trust_u_T"], **changes(case),
    }  # fmt: skip
    with pytest.raises(LossInputError, match=rf"^loss_from_log_probs: {line}"):
        loss_from_log_probs(**given)
