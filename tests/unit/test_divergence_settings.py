"""From the configuration to an objective with a divergence: keys, refused settings, a custom function.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.objective_batch import Batch
from tropd_mcore.config.objective_checks import objective_problems
from tropd_mcore.config.objectives.base import PolicyGradientConfig
from tropd_mcore.config.objectives.matching import EopdObjective, GkdObjective, JsdObjective, LsmObjective
from tropd_mcore.config.objectives.self_distillation import OpsdObjective, SdpoObjective
from tropd_mcore.config.objectives.trust_region import AopdObjective, TropdAopdObjective, TropdObjective
from tropd_mcore.config.objectives.user_function import CustomObjective
from tropd_mcore.config.schema import Config
from tropd_mcore.errors import ConfigError
from tropd_mcore.kernel.token_losses import TokenLosses
from tropd_mcore.objectives.inputs import TokenInputs
from tropd_mcore.objectives.matching import eopd, gkd, jsd, lsm
from tropd_mcore.objectives.parts.policy_gradient import PolicyGradient
from tropd_mcore.objectives.registry import bind_objective
from tropd_mcore.objectives.self_distillation import opsd, sdpo
from tropd_mcore.objectives.trust_region import aopd, opd, tropd_aopd

Objective = Callable[[TokenInputs], TokenLosses]

POLICY = PolicyGradientConfig(ratio="importance", mismatch="tis", tis_cap=1.2, advantage_clip=1.5)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            EopdObjective(entropy_threshold=3.1, norm="tail", policy_gradient=POLICY),
            partial(eopd, entropy_threshold=3.1, norm="tail"),
        ),
        (
            AopdObjective(threshold=0.01, norm="renorm", policy_gradient=POLICY),
            partial(aopd, threshold=0.01, norm="renorm"),
        ),
        (JsdObjective(beta=0.7, policy_gradient=POLICY), partial(jsd, beta=0.7)),
        (
            SdpoObjective(alpha=0.2, norm="renorm", ratio_cap=1.1, policy_gradient=POLICY),
            partial(sdpo, alpha=0.2, norm="renorm", ratio_cap=1.1),
        ),
    ],
    ids=["eopd", "aopd", "jsd", "sdpo"],
)
def test_keys_of_a_divergence_objective_reach_it(config: Any, expected: Callable[..., TokenLosses]) -> None:
    inputs = Batch(moved=0.2).inputs()
    policy = PolicyGradient(ratio="importance", mismatch="tis", tis_cap=1.2, advantage_clip=1.5)
    assert torch.equal(bind_objective(config)(inputs).loss_sum, expected(inputs, policy=policy).loss_sum)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            GkdObjective(divergence="jsd", beta=0.8, norm="renorm"),
            partial(gkd, divergence="jsd", beta=0.8, norm="renorm", full_vocabulary=False),
        ),
        (
            GkdObjective(divergence="rkl", full_vocabulary=True),
            partial(gkd, divergence="rkl", beta=0.5, norm="tail", full_vocabulary=True),
        ),
        (LsmObjective(sampled_tail=True, clip_log_ratio=0.3), partial(lsm, sampled_tail=True, clip_log_ratio=0.3)),
        (OpsdObjective(entry_clip=0.02, norm="truncated"), partial(opsd, entry_clip=0.02, norm="truncated")),
    ],
    ids=["gkd", "gkd over the vocabulary", "lsm", "opsd"],
)
def test_keys_of_an_objective_without_a_policy_gradient_reach_it(config: Any, expected: Objective) -> None:
    batch = Batch()
    inputs = replace(batch.inputs(), divergence_T=batch.z_TV.square().sum(dim=1))
    assert torch.equal(bind_objective(config)(inputs).loss_sum, expected(inputs).loss_sum)


def test_keys_of_tropd_and_of_tropd_aopd_reach_tropd_aopd() -> None:
    keys: dict[str, Any] = {"trust": {"mode": "soft"}, "outlier": {"weight": 0.6, "norm": "tail"}}
    inputs = Batch(moved=0.2).inputs()
    bound = bind_objective(TropdAopdObjective(aopd_threshold=0.02, aopd_weight=0.3, **keys))(inputs)
    of_tropd = TropdObjective(**keys).constants(0.0)
    expected = tropd_aopd(inputs, aopd_threshold=0.02, aopd_weight=0.3, **of_tropd)
    assert torch.equal(bound.loss_sum, expected.loss_sum)


# ---- settings that are refused ----


def problems(objective: dict[str, Any], **sections: dict[str, Any]) -> list[str]:
    """The problems, without those of ineffective keys, of a configuration whose other keys have their defaults."""
    base: dict[str, Any] = {
        "run": {"dir": "run", "steps": 100},
        "student": {"path": "student"},
        "teacher": {"kind": "megatron", "path": "student" if objective["kind"] in ("sdpo", "opsd") else "teacher"},
        "data": {"prompts": "prompts.jsonl"},
        "verifier": {"kind": "exact_match"},
    }
    merged = {name: base.get(name, {}) | values for name, values in sections.items()}
    found = objective_problems(Config.model_validate({**base, **merged, "objective": objective}))
    return [problem for problem in found if "has no effect with" not in problem]


@pytest.mark.parametrize("kind", ["eopd", "aopd", "tropd_aopd", "jsd", "gkd", "lsm", "sdpo", "opsd"])
def test_the_defaults_of_every_divergence_kind_have_no_problem(kind: str) -> None:
    assert problems({"kind": kind}) == []


SGLANG = {"teacher": {"kind": "sglang"}}


@pytest.mark.parametrize(
    ("objective", "sections", "expected"),
    [
        ({"kind": "gkd", "divergence": "k1"}, {}, "objective.divergence=k1: the expected gradient of the one-sample"),
        (
            {"kind": "gkd", "gradient": "advantage"},
            {},
            "objective.gradient=advantage: a divergence does not depend on the sampled token",
        ),
        (
            {"kind": "gkd", "divergence": "rkl", "norm": "truncated"},
            {},
            "objective.norm=truncated with objective.divergence=rkl",
        ),
        ({"kind": "gkd", "topk": 1, "norm": "renorm"}, {}, "objective.topk = 1 with norm=renorm"),
        ({"kind": "eopd", "topk": 1, "norm": "renorm"}, {}, "objective.topk = 1 with norm=renorm"),
        ({"kind": "aopd", "topk": 1, "norm": "renorm"}, {}, "objective.topk = 1 with norm=renorm"),
        ({"kind": "lsm", "topk": 1}, {}, "objective.topk = 1 with norm=renorm"),
        ({"kind": "sdpo", "student_topk": 1, "norm": "renorm"}, {}, "objective.student_topk = 1 with norm=renorm"),
        (
            {"kind": "tropd_aopd", "outlier": {"topk": 1, "norm": "renorm"}},
            {},
            "objective.outlier.topk = 1 with norm=renorm",
        ),
        (
            {"kind": "sdpo", "policy_gradient": {"ratio": "ppo_clip"}},
            {},
            "objective.policy_gradient.ratio=ppo_clip: objective.kind=sdpo has no policy gradient",
        ),
        (
            {"kind": "sdpo", "policy_gradient": {"advantage_clip": 1.0}},
            {},
            "objective.policy_gradient.advantage_clip: objective.kind=sdpo has no advantage",
        ),
        ({"kind": "eopd"}, SGLANG, "objective.kind=eopd needs the teacher's entropy over the whole vocabulary"),
        ({"kind": "sdpo"}, SGLANG, "objective.kind=sdpo needs the teacher's log-probs of the student's own candidates"),
        ({"kind": "opsd"}, SGLANG, "objective.kind=opsd needs the teacher's log-probs of the student's own candidates"),
        ({"kind": "vopd"}, SGLANG, "objective.kind=vopd needs the teacher's log-probs of the student's own candidates"),
        (
            {"kind": "custom", "function": "a:b", "student_topk": 4},
            SGLANG,
            "objective.kind=custom needs the teacher's log-probs of the student's own candidates",
        ),
        ({"kind": "gkd", "full_vocabulary": True}, SGLANG, "objective.full_vocabulary needs the teacher's logits"),
        (
            {"kind": "gkd", "full_vocabulary": True},
            {"loss": {"form": "logits"}},
            "objective.full_vocabulary is computed in the fused output layer, found loss.form=logits",
        ),
        (
            {"kind": "gkd", "full_vocabulary": True},
            {"teacher": {"extra_tokens": "exclude"}},
            "teacher.extra_tokens=exclude takes tokens out of the teacher's candidates, and objective.full_vocabulary",
        ),
    ],
    ids=str,
)
def test_a_setting_that_cannot_train_is_refused_with_the_reason(
    objective: dict[str, Any], sections: dict[str, Any], expected: str
) -> None:
    (problem,) = problems(objective, **sections)
    assert problem.startswith(expected) and "\n" not in problem
    assert "; set " in problem or "; remove " in problem


@pytest.mark.parametrize(
    "objective",
    [
        {"kind": "gkd", "topk": 1, "norm": "tail"},
        {"kind": "gkd", "divergence": "jsd", "norm": "truncated"},
        {"kind": "gkd", "divergence": "rkl", "norm": "truncated", "topk": 1, "full_vocabulary": True},
        {"kind": "gkd", "full_vocabulary": True, "topk": 1, "norm": "renorm"},
        {"kind": "aopd", "topk": 1, "norm": "teacher_renorm"},
        {"kind": "lsm", "topk": 1, "sampled_tail": True},
        {"kind": "sdpo", "student_topk": 1},
        {"kind": "opsd", "student_topk": 1},
        {"kind": "sdpo", "policy_gradient": {"mini_batches": 2, "mismatch": "tis"}},
    ],
    ids=str,
)
def test_a_setting_that_trains_is_not_refused(objective: dict[str, Any]) -> None:
    assert problems(objective) == []


def test_refused_settings_really_have_no_gradient() -> None:
    """Renormalised on one token the divergence is 0; the expected gradient of the K1 estimate is 0."""
    batch = Batch(topk=1, student_topk=1)
    for objective in (
        *(GkdObjective(divergence=kind, norm="renorm", topk=1) for kind in ("fkl", "rkl", "jsd")),
        LsmObjective(topk=1),
        SdpoObjective(student_topk=1, norm="renorm"),
    ):
        assert not batch.gradient(bind_objective(objective)(batch.inputs()).loss_sum).any()
    log_p_V = batch.z_TV[0].log_softmax(0)
    estimate = (log_p_V.exp().detach() * (log_p_V - batch.log_q_TV[0])).sum()
    assert batch.gradient(estimate).abs().max() <= 1e-16


# ---- a custom function ----


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module with correct functions and with functions of every kind of fault."""
    (tmp_path / "own_objectives.py").write_text(
        "from dataclasses import replace\n"
        "import torch\n"
        "from tropd_mcore.objectives.trust_region import opd\n"
        "from tropd_mcore.objectives.parts.policy_gradient import PolicyGradient\n"
        "NUMBER = 3\n"
        "def scaled(inputs, *, factor, policy):\n"
        "    output = opd(inputs, policy=policy)\n"
        "    return replace(output, loss_T=factor * output.loss_T)\n"
        "def plain(inputs):\n"
        "    return opd(inputs, policy=PolicyGradient())\n"
        "def a_number(inputs):\n"
        "    return 3.0\n"
        "def no_columns(inputs):\n"
        "    return replace(plain(inputs), columns={'loss': torch.zeros(2)})\n"
        "def summed(inputs):\n"
        "    return replace(plain(inputs), loss_T=inputs.student_logp_T.sum())\n"
    )
    (tmp_path / "own_broken.py").write_text("1 / 0\n")
    (tmp_path / "own_missing.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "own_objectives"


def custom(function: str, arguments: dict[str, Any] | None = None, **policy: Any) -> Objective:
    section = CustomObjective(
        function=function, arguments=arguments or {}, policy_gradient=PolicyGradientConfig(**policy)
    )
    return bind_objective(section)


def test_a_custom_function_is_called_with_its_arguments_and_the_policy_gradient(module: str) -> None:
    inputs = Batch(moved=0.2).inputs()
    output = custom(f"{module}:scaled", {"factor": 3.0}, ratio="importance")(inputs)
    expected = opd(inputs, policy=PolicyGradient(ratio="importance"))
    assert torch.equal(output.loss_T, 3.0 * expected.loss_T)
    assert custom(f"{module}:plain")(inputs).loss_sum.isfinite()


@pytest.mark.parametrize(
    ("function", "arguments", "policy", "expected"),
    [
        ("scaled", {}, {}, r"objective\.function: expected an import path package\.module:function, found 'scaled'"),
        ("own_objectives.scaled", {}, {}, "expected an import path"),
        ("own objectives:scaled", {}, {}, "expected an import path"),
        ("own_objectives:scaled:x", {}, {}, "expected an import path"),
        ("not_there:f", {}, {}, "no module 'not_there'; is its folder on PYTHONPATH"),
        ("own_missing:f", {}, {}, "no module 'a_module_that_is_not_there'"),
        ("own_broken:f", {}, {}, "importing own_broken failed: ZeroDivisionError: division by zero"),
        ("own_objectives:nothing", {}, {}, r"own_objectives\.py\) has no 'nothing'"),
        ("own_objectives:NUMBER", {}, {}, "expected a function, found int"),
        ("own_objectives:scaled", {}, {}, "missing a required argument: 'factor'"),
        ("own_objectives:scaled", {"factor": 1.0, "other": 2}, {}, "unexpected keyword argument 'other'"),
        ("own_objectives:scaled", {"factor": 1.0, "policy": 2}, {}, "`policy` comes from objective.policy_gradient"),
        ("own_objectives:plain", {}, {"mismatch": "tis"}, "has no keyword `policy`"),
    ],
)
def test_each_wrong_custom_function_gives_one_clear_line(
    module: str, function: str, arguments: dict[str, Any], policy: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        custom(function, arguments, **policy)
    assert "objective." in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("a_number", "expected a TokenLosses, found float"),
        ("no_columns", r"missing: \['advantage', .*\], of another shape: \['loss'\]"),
        ("summed", r"expected one number per token, \(37,\), found loss_T \(\)"),
    ],
)
def test_each_unusable_result_of_a_custom_function_gives_one_clear_line(
    module: str, function: str, expected: str
) -> None:
    objective = custom(f"{module}:{function}")
    with pytest.raises(ConfigError, match=expected):
        objective(Batch().inputs())
