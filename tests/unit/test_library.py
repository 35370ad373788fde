"""The library: one import, one call, the same results in every shape, and one line for any missing input."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

import tropd_mcore
from tests.library_cases import NAMES, VP, B, Case, K, S, V, run
from tropd_mcore import (
    LossInputError,
    OutputLayer,
    StudentTopK,
    TeacherLogits,
    TeacherTopK,
    VocabParallel,
    distill_loss,
    distributed_topk,
    loss_from_log_probs,
    objectives,
    support_log_probs,
    trust_uniforms,
)
from tropd_mcore.config.objectives import ObjectiveConfig
from tropd_mcore.kernel.token_losses import TokenLosses
from tropd_mcore.objectives.registry import objective_of


def test_the_library_exports_exactly_the_listed_names() -> None:
    assert tropd_mcore.__all__ == [
        "DistillLoss", "LossInputError", "OutputLayer", "StudentTopK", "TeacherLogits", "TeacherTopK", "TokenInputs",
        "TokenLosses", "VocabParallel",
        "distill_loss", "distributed_topk", "loss_from_log_probs", "objectives", "support_log_probs", "trust_uniforms",
    ]  # fmt: skip
    assert set(tropd_mcore.__all__) <= set(dir(tropd_mcore))
    with pytest.raises(AttributeError, match="has no attribute 'nope'"):
        _ = tropd_mcore.nope


def test_the_library_imports_only_torch() -> None:
    """Other packages are hidden from the importing process, including NumPy, which torch does not need."""
    code = """
    import sys, warnings
    warnings.simplefilter("ignore")
    REFUSED = {"numpy", "pydantic", "megatron", "triton", "transformers", "aiohttp", "yaml", "psutil", "tqdm", "jinja2",
               "sglang", "safetensors", "tokenizers"}
    class Refuse:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in REFUSED:
                raise ModuleNotFoundError(f"{name} is refused here", name=name)
    sys.meta_path.insert(0, Refuse())
    import torch
    before = set(sys.modules)
    from tropd_mcore import OutputLayer, TeacherTopK, VocabParallel, distill_loss, objectives, trust_uniforms
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(11, 4, requires_grad=True)
    log_q = torch.randn(6, 11).log_softmax(-1)
    x, top = torch.randint(11, (6,)), log_q.topk(3)
    teacher = TeacherTopK(log_q.gather(1, x[:, None])[:, 0], top.indices, top.values)
    out = distill_loss(OutputLayer(hidden, weight), x, teacher, objectives.tropd(), vp=VocabParallel.single(11),
                       trust_u_T=trust_uniforms((6,), seed=1))
    (out.loss_sum / out.token_count).backward()
    assert weight.grad.isfinite().all() and int(out.token_count) == 6
    mine = {name for name in set(sys.modules) - before if name.startswith("tropd_mcore")}
    assert not [name for name in mine if name.split(".")[1:2] in (["config"], ["train"], ["mcore"], ["data"])], mine
    """
    found = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("name", NAMES)
def test_every_objective_has_the_defaults_of_the_configuration(name: str) -> None:
    section: Any = TypeAdapter(ObjectiveConfig).validate_python({"kind": name})
    configured = objective_of(section)
    assert objectives.from_name(name).family == section.family
    differing = {"beta"} if name in ("kdrl", "tropd", "tropd_aopd") else set()  # schedules, and prefixes that are off
    differing |= {"prefix_loss"}
    ours = objectives.from_name(name).values
    assert {k: v for k, v in ours.items() if k not in differing} == {
        k: v for k, v in configured.values.items() if k not in differing
    }


def test_an_unknown_objective_gives_a_one_line_error_with_the_known_ones() -> None:
    with pytest.raises(LossInputError, match="no objective 'tropt'; there are aopd, .*tropd"):
        distill_loss(torch.zeros(2, V), torch.zeros(2, dtype=torch.int64), TeacherTopK(), "tropt", vp=VP)


@pytest.mark.parametrize("name", NAMES)
def test_padded_and_packed_tokens_give_the_same_bits(name: str) -> None:
    case, objective = Case(), objectives.from_name(name)
    padded, gradient = run(case, objective)
    leaf = case.logits().requires_grad_()
    flat = {key: _flat(value) for key, value in case.all_of(objective).items()}
    teacher = case.teacher_of(objective)
    top = TeacherTopK(*(_flat(getattr(case.top, field)) for field in ("logp_T", "ids_TK", "logp_TK", "entropy_T")))
    if isinstance(teacher, TeacherLogits):
        teacher = replace(teacher, source=case.teacher.flatten(0, 1), top=top)
    else:
        teacher = top
    packed = distill_loss((leaf * 1.0).flatten(0, 1), case.x.flatten(), teacher, objective, vp=VP, **flat)
    packed.loss_sum.backward()
    assert torch.equal(packed.loss_sum, padded.loss_sum) and torch.equal(packed.token_count, padded.token_count)
    assert torch.equal(leaf.grad, gradient)
    for column, numbers in padded.columns.items():
        assert numbers.shape == (B, S)
        assert torch.equal(numbers.flatten().nan_to_num(7.0), packed.columns[column].nan_to_num(7.0)), column


def _flat(value: Any) -> Any:
    if isinstance(value, StudentTopK):
        assert value.old_logp_TL is not None
        return StudentTopK(*(t.flatten(0, 1) for t in (value.ids_TL, value.teacher_logp_TL, value.old_logp_TL)))
    return value if value is None else value.flatten(0, 1)


@pytest.mark.parametrize("name", NAMES)
def test_each_missing_input_gives_a_one_line_error(name: str) -> None:
    """Without a process group, so no collective can have run."""
    case, objective = Case(), objectives.from_name(name)
    complete = case.all_of(objective)
    for need in sorted(objective.needs):
        arguments, teacher, target = dict(complete), case.teacher_of(objective), case.x
        if need == "target_ids_T":
            target = None  # type: ignore[assignment]
        elif need == "teacher logits":
            teacher = case.top
        elif need.startswith("teacher."):
            assert isinstance(teacher, TeacherTopK)
            teacher = replace(teacher, **{need.partition(".")[2]: None})
        elif need == "student_topk.old_logp_TL":
            arguments["student_topk"] = replace(case.own, old_logp_TL=None)
        else:
            del arguments[need]
        with pytest.raises(LossInputError) as refused:
            distill_loss(case.logits(), target, teacher, objective, vp=VP, **arguments)
        (line,) = str(refused.value).splitlines()
        assert line.startswith(f"distill_loss: {name}(") and f"needs {need}, which was not given; pass" in line


@pytest.mark.parametrize("name", [name for name in NAMES if not objectives.from_name(name).whole])
def test_the_loss_of_each_token_adds_up_to_the_sum_with_the_same_gradient(name: str) -> None:
    case, objective = Case(), objectives.from_name(name)
    summed, gradient = run(case, objective)
    each, of_each = run(case, objective, reduction="none")
    assert each.loss_T.shape == (B, S) and not each.loss_T[~case.mask].any()
    torch.testing.assert_close(each.loss_T.sum(), summed.loss_sum, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(of_each, gradient, rtol=1e-12, atol=1e-12)
    assert torch.equal(each.value, each.loss_sum.detach()) and not each.value.requires_grad


@pytest.mark.parametrize("mode", ["deferred", "recompute"])
@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_and_logits_have_the_same_loss_and_gradient(name: str, mode: Any) -> None:
    case, objective = Case(), objectives.from_name(name)
    given, gradient = run(case, objective)
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    layer = OutputLayer(hidden, weight, weight_grad=mode)
    out = distill_loss(layer, case.x, case.teacher_of(objective), objective, vp=VP, **case.all_of(objective))
    out.loss_sum.backward()
    torch.testing.assert_close(out.loss_sum, given.loss_sum, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(hidden.grad, gradient @ case.weight, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(
        weight.grad, gradient.flatten(0, 1).T @ case.hidden.flatten(0, 1), rtol=1e-10, atol=1e-11
    )


@pytest.mark.parametrize("name", [name for name in NAMES if not objectives.from_name(name).whole])
def test_log_probs_of_another_stack_give_the_same_loss_and_gradient(name: str) -> None:
    case, objective = Case(), objectives.from_name(name)
    expected, gradient = run(case, objective)
    leaf = case.logits().requires_grad_()
    log_p = leaf.log_softmax(-1)
    arguments = case.all_of(objective)
    out = loss_from_log_probs(
        case.at(log_p),
        case.top,
        objective,
        student_topk_logp_TK=log_p.gather(-1, case.top.ids_TK),  # type: ignore[arg-type]
        student_own_logp_TL=log_p.gather(-1, case.own.ids_TL) if "student_topk" in arguments else None,
        target_ids_T=case.x,
        **arguments,
    )
    out.loss_sum.backward()
    torch.testing.assert_close(out.loss_sum, expected.loss_sum, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(leaf.grad, gradient, rtol=1e-11, atol=1e-12)


def test_a_user_function_can_be_an_objective() -> None:
    def forward_kl(inputs: Any) -> TokenLosses:
        q = inputs.teacher_topk_logp_TK.exp()
        loss_T = (q * (inputs.teacher_topk_logp_TK - inputs.student_topk_logp_TK)).sum(dim=1)
        counted_T = inputs.student_mask_T
        return TokenLosses(torch.where(counted_T, loss_T * inputs.weight_T, 0.0), counted_T)

    case = Case()
    out = distill_loss(case.logits(), None, replace(case.top, logp_T=None), forward_kl, vp=VP, student_mask_T=case.mask)
    log_p = case.logits().log_softmax(-1).gather(-1, case.top.ids_TK)  # type: ignore[arg-type]
    assert case.top.logp_TK is not None
    expected = (case.top.logp_TK.exp() * (case.top.logp_TK - log_p)).sum(-1)[case.mask].sum()
    torch.testing.assert_close(out.loss_sum, expected, rtol=1e-12, atol=0)


def test_a_user_function_that_ignores_the_masks_trains_no_other_token() -> None:
    case, plain = Case(), objectives.opd()

    def careless(inputs: Any) -> Any:
        loss_T = -(inputs.teacher_logp_T - inputs.student_logp_T).detach() * inputs.student_logp_T
        return TokenLosses(loss_T, torch.ones_like(inputs.student_mask_T))

    expected, gradient = run(case, plain, weight_T=None)
    dirty = case.log_q_x.masked_fill(~case.mask, torch.nan)
    leaf = case.logits().requires_grad_()
    out = distill_loss(leaf * 1.0, case.x, TeacherTopK(dirty), careless, vp=VP, student_mask_T=case.mask)
    out.loss_sum.backward()
    torch.testing.assert_close(out.loss_sum, expected.loss_sum, rtol=1e-12, atol=0)
    torch.testing.assert_close(leaf.grad, gradient, rtol=1e-12, atol=1e-14)
    assert out.token_count == expected.token_count


@pytest.mark.parametrize(
    ("returned", "line"),
    [
        (
            lambda inputs: inputs.student_logp_T,
            "returned a Tensor, expected TokenLosses with a loss for each of the 21",
        ),
        (
            lambda inputs: TokenLosses(inputs.student_logp_T, inputs.weight_T),
            r"returned counted_T as torch.float64 \(21,\), expected bool \[21\], as inputs.student_mask_T is",
        ),
        (
            lambda inputs: TokenLosses(inputs.student_logp_T, inputs.student_mask_T, {"mine": inputs.weight_T[:3]}),
            r"returned the column mine as \(3,\), expected \[21\]",
        ),
        (
            lambda inputs: TokenLosses(inputs.student_logp_T.sum()[None], inputs.student_mask_T),
            r"returned a TokenLosses with losses \(1,\), expected TokenLosses with a loss for each of the 21 tokens",
        ),
    ],
)
def test_a_user_function_with_a_wrong_result_gives_a_one_line_error(returned: Any, line: str) -> None:
    case = Case()
    with pytest.raises(LossInputError, match=line):
        distill_loss(case.logits(), case.x, case.top, returned, vp=VP)


WITHOUT_TARGET = [name for name in NAMES if "target_ids_T" not in objectives.from_name(name).needs]


@pytest.mark.parametrize("name", WITHOUT_TARGET)
def test_an_objective_that_reads_no_target_needs_none(name: str) -> None:
    case, objective = Case(), objectives.from_name(name)
    expected, gradient = run(case, objective)
    leaf = case.logits().requires_grad_()
    top = replace(case.top, logp_T=None)
    teacher = replace(case.teacher_of(objective), top=top) if objective.whole else top
    out = distill_loss(leaf * 1.0, None, teacher, objective, vp=VP, **case.all_of(objective))
    out.loss_sum.backward()
    torch.testing.assert_close(out.loss_sum, expected.loss_sum, rtol=1e-13, atol=0)
    torch.testing.assert_close(leaf.grad, gradient, rtol=1e-12, atol=1e-15)
    assert out.columns["student_logp"].isnan().all() and out.columns["log_ratio"].isnan().any()
    if objective.whole or "student_topk" in objective.needs:
        return
    leaf = case.logits().requires_grad_()
    log_p = leaf.log_softmax(-1).gather(-1, case.top.ids_TK)  # type: ignore[arg-type]
    out = loss_from_log_probs(None, top, objective, student_topk_logp_TK=log_p, **case.all_of(objective))
    out.loss_sum.backward()
    torch.testing.assert_close(out.loss_sum, expected.loss_sum, rtol=1e-13, atol=0)
    torch.testing.assert_close(leaf.grad, gradient, rtol=1e-12, atol=1e-15)


def test_a_teacher_given_as_logits_equals_one_given_as_top_k() -> None:
    case, objective = Case(), objectives.tropd()
    expected, gradient = run(case, objective)
    leaf = case.logits().requires_grad_()
    teacher = TeacherLogits(case.teacher, VocabParallel.single(V), topk=K)
    out = distill_loss(leaf * 1.0, case.x, teacher, objective, vp=VP, **case.all_of(objective))
    out.loss_sum.backward()
    torch.testing.assert_close(out.loss_sum, expected.loss_sum, rtol=1e-12, atol=0)
    torch.testing.assert_close(leaf.grad, gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("divergence", ["fkl", "rkl", "jsd"])
def test_a_divergence_over_the_whole_vocabulary_equals_that_of_two_softmaxes(divergence: str) -> None:
    case = Case()
    objective = objectives.gkd(divergence=divergence, beta=0.3, full_vocabulary=True)
    out, gradient = run(case, objective)
    leaf = case.logits().requires_grad_()
    log_p, log_q = leaf.log_softmax(-1), case.teacher.log_softmax(-1)
    mix = torch.log(0.3 * log_q.exp() + 0.7 * log_p.exp())
    parts = {
        "fkl": (log_q.exp() * (log_q - log_p)).sum(-1),
        "rkl": (log_p.exp() * (log_p - log_q)).sum(-1),
        "jsd": 0.3 * (log_q.exp() * (log_q - mix)).sum(-1) + 0.7 * (log_p.exp() * (log_p - mix)).sum(-1),
    }
    expected = (case.weights * parts[divergence])[case.mask].sum()
    expected.backward()
    torch.testing.assert_close(out.loss_sum, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-10, atol=1e-13)


def test_inputs_outside_the_masks_have_no_influence_whatever_their_values() -> None:
    """Targets of -100, NaN in every number, ids that do not exist."""
    case, objective = Case(), objectives.tropd()
    clean, gradient = run(case, objective)
    outside = ~case.mask
    case.x = case.x.masked_fill(outside, -100)
    case.given = {name: number.masked_fill(outside, torch.nan) for name, number in case.given.items()}
    case.weights = case.weights.masked_fill(outside, torch.nan)
    assert case.top.logp_T is not None and case.top.logp_TK is not None and case.top.ids_TK is not None
    case.top = TeacherTopK(
        case.top.logp_T.masked_fill(outside, torch.nan),
        case.top.ids_TK.masked_fill(outside[..., None], -7),
        case.top.logp_TK.masked_fill(outside[..., None], torch.nan),
    )
    dirty, of_dirty = run(case, objective)
    assert torch.equal(dirty.loss_sum, clean.loss_sum) and torch.equal(of_dirty, gradient)


def test_logits_are_overwritten_unless_keeping_them_is_requested() -> None:
    case, objective = Case(), objectives.opd()
    for preserve in (False, True):
        leaf = case.logits().requires_grad_()
        logits = leaf * 1.0
        before = logits.detach().clone()
        out = distill_loss(
            logits, case.x, case.top, objective, vp=VP, student_mask_T=case.mask, preserve_logits=preserve
        )
        out.loss_sum.backward()
        assert torch.equal(logits.detach(), before) == preserve
    leaf = case.logits().requires_grad_()
    out = distill_loss(leaf, case.x, case.top, objective, vp=VP, student_mask_T=case.mask)
    out.loss_sum.backward()
    assert torch.equal(leaf.detach(), case.logits()), "a leaf is the caller's"


def test_scores_and_candidates_equal_those_of_a_full_softmax() -> None:
    case = Case()
    leaf = case.logits().requires_grad_()
    ids = torch.stack([case.x, (case.x + 1) % V], dim=-1)
    logp, entropy = support_log_probs(leaf * 1.0, ids, vp=VP)
    expected = leaf.log_softmax(-1)
    torch.testing.assert_close(logp, expected.gather(-1, ids), rtol=1e-12, atol=0)
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(-1), rtol=1e-12, atol=0)
    top = distributed_topk(case.teacher, k=K, vp=VP, ids_TJ=case.x[..., None])
    assert torch.equal(top.ids_TK, case.top.ids_TK) and TeacherTopK.of(top).logp_T is not None
    torch.testing.assert_close(TeacherTopK.of(top).logp_T, case.log_q_x, rtol=1e-12, atol=0)
    with pytest.raises(LossInputError, match="k=38, expected 1 to vocab_size=37"):
        distributed_topk(case.teacher, k=38, vp=VP)


def test_a_message_names_the_function_that_was_called() -> None:
    case = Case()
    wrong_ids = torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(LossInputError, match=r"^support_log_probs: ids_TJ has shape \(2, 2\)"):
        support_log_probs(case.logits(), wrong_ids, vp=VP)
    with pytest.raises(LossInputError, match=r"^distributed_topk: ids_TJ has shape \(2, 2\)"):
        distributed_topk(case.logits(), k=K, vp=VP, ids_TJ=wrong_ids)
    with pytest.raises(LossInputError, match=r"^loss_from_log_probs: tropd\(.*needs trust_u_T"):
        loss_from_log_probs(case.log_q_x, case.top, student_topk_logp_TK=case.top.logp_TK)


def test_trust_uniforms_are_uniform_independent_between_seeds_and_determined_by_token_ids() -> None:
    count = 200_000
    one, two = trust_uniforms((count,), seed=1), trust_uniforms((count,), seed=2)
    for uniforms in (one, two):
        assert uniforms.dtype == torch.float32 and uniforms.min() >= 0 and uniforms.max() < 1
        shares = torch.histc(uniforms, bins=64, min=0.0, max=1.0) / count
        assert (shares - 1 / 64).abs().max() < 6 * (1 / 64 / count) ** 0.5
        neighbours = torch.corrcoef(torch.stack([uniforms[:-1], uniforms[1:]]))[0, 1]
        assert abs(float(neighbours)) < 5 / count**0.5
    assert abs(float(torch.corrcoef(torch.stack([one, two]))[0, 1])) < 5 / count**0.5
    shifted = trust_uniforms((10,), seed=1, token_ids=torch.arange(100, 110))
    assert torch.equal(shifted, one[100:110])
    assert torch.equal(trust_uniforms((4, 5), seed=1), one[:20].reshape(4, 5))
    assert trust_uniforms((3,), seed=1 << 40).tolist() != trust_uniforms((3,), seed=0).tolist()
    with pytest.raises(LossInputError, match="pass seed=.* or generator="):
        trust_uniforms((3,))
    with pytest.raises(LossInputError, match="generator= needs vp="):
        trust_uniforms((3,), generator=torch.Generator())
    drawn = trust_uniforms((3,), generator=torch.Generator().manual_seed(4), vp=VP)
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(4)))


@pytest.mark.slow
def test_a_compiled_step_calls_the_loss_outside_the_graph() -> None:
    case, objective = Case(), objectives.opd()
    expected, gradient = run(case, objective)

    @torch.compile(backend="eager")
    def step(leaf: Tensor) -> Tensor:
        out = distill_loss(leaf * 1.0, case.x, case.top, objective, vp=VP, **case.all_of(objective))
        return out.loss_sum * 2.0

    leaf = case.logits().requires_grad_()
    loss = step(leaf)
    loss.backward()
    torch.testing.assert_close(loss, 2.0 * expected.loss_sum, rtol=1e-12, atol=0)
    torch.testing.assert_close(leaf.grad, 2.0 * gradient, rtol=1e-12, atol=1e-14)
