"""Defaults of the objectives follow their sources: the configuration has the values stated in docs/settings.md.

Also the one default that changes a gradient before any update: `rlad` has no dual clip.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import TypeAdapter

from tests import oracles
from tests.objective_batch import TOKENS, Batch, at
from tropd_mcore.config.fields import Section
from tropd_mcore.config.objectives import KINDS as CLASSES
from tropd_mcore.config.objectives import ObjectiveConfig
from tropd_mcore.config.objectives.base import PolicyGradientConfig, PolicyGradientObjective
from tropd_mcore.config.objectives.user_function import CustomObjective
from tropd_mcore.config.objectives.verified import RladObjective
from tropd_mcore.config.schema import LossConfig, RolloutConfig
from tropd_mcore.objectives.registry import bind_objective

REPOSITORY = Path(__file__).resolve().parents[2]
TEXT = (REPOSITORY / "docs" / "settings.md").read_text(encoding="utf-8")
KINDS = sorted(CLASSES)
WITH_POLICY_GRADIENT = [kind for kind in KINDS if issubclass(CLASSES[kind], PolicyGradientObjective)]
PARSE = TypeAdapter[ObjectiveConfig](ObjectiveConfig).validate_python


# ---- rlad ----


def with_teacher_ratios(batch: Batch) -> Batch:
    """The teacher's probabilities of the sampled tokens are 1/1000 to 4 times those of the old policy."""
    log_q_T = at(batch.old_z_TV.log_softmax(dim=1), batch.x_T) + torch.linspace(
        math.log(1e-3), math.log(4.0), TOKENS, dtype=torch.float64
    )
    batch.log_q_TV[torch.arange(TOKENS), batch.x_T] = log_q_T
    batch.statistic_T = torch.where(torch.arange(TOKENS) % 4 == 3, 0.9, -1.1).to(torch.float64)
    return batch


@pytest.mark.parametrize("keys", [{}, {"clip_high": 0.3}], ids=["defaults", "another key given"])
@pytest.mark.parametrize("moved", [0.0, 0.4])
def test_rlad_has_the_gradient_of_the_grpo_surrogate_even_where_the_teacher_finds_bad_tokens_unlikely(
    moved: float, keys: dict[str, float]
) -> None:
    """d/dz of -min(w A, clip(w) A), w = p / sqrt(p_old q), is -A w (e_x - p), or 0 where the clip holds w."""
    batch = with_teacher_ratios(Batch(moved=moved))
    objective = bind_objective(PARSE({"kind": "rlad", "policy_gradient": keys}))
    gradient_TV = batch.gradient(objective(batch.inputs()).loss_sum).numpy()
    low, high = 0.8, 1.0 + keys.get("clip_high", 0.2)
    far_below = 0
    for token in range(TOKENS):
        x, advantage = int(batch.x_T[token]), float(batch.statistic_T[token])
        log_p = oracles.log_softmax(batch.z_TV[token].detach().numpy())
        log_p_old = oracles.log_softmax(batch.old_z_TV[token].numpy())[x]
        log_q = float(batch.log_q_TV[token, x])
        w = math.exp(log_p[x] - 0.5 * log_p_old - 0.5 * log_q)
        held = w > high if advantage > 0 else w < low
        slope = 0.0 if held or batch.origin[token] != "student" else -advantage * w * float(batch.weight_T[token])
        expected = slope * (np.eye(len(log_p))[x] - np.exp(log_p))
        np.testing.assert_allclose(gradient_TV[token], expected, rtol=1e-12, atol=1e-12)
        if advantage < 0 and log_q < log_p[x] - math.log(9.0) and batch.origin[token] == "student":
            far_below += 1
            assert np.abs(gradient_TV[token]).max() > 0.1
    assert far_below >= 5


def test_with_a_dual_clip_of_three_rlad_would_drop_negative_tokens_that_the_teacher_finds_unlikely() -> None:
    """Why it has none: w = sqrt(p / q) > 3 where q < p / 9."""
    batch = with_teacher_ratios(Batch())
    inputs = replace(batch.inputs(), student_mask_T=torch.ones(TOKENS, dtype=torch.bool))
    policy = PolicyGradientConfig(ratio="ppo_clip", dual_clip=3.0)
    gradient_TV = batch.gradient(bind_objective(RladObjective(policy_gradient=policy))(inputs).loss_sum)
    old_logp_T = at(batch.old_z_TV.log_softmax(dim=1), batch.x_T)
    ratio_T = inputs.teacher_logp_T - old_logp_T
    dropped_T = (batch.statistic_T < 0) & (ratio_T < -math.log(9.0))
    assert dropped_T.any() and not gradient_TV[dropped_T].any()
    assert gradient_TV[(batch.statistic_T < 0) & (ratio_T > -math.log(9.0)) & (ratio_T < 0)].any(dim=1).all()


# ---- defaults of the kind, key by key ----


def default_of(kind: str) -> PolicyGradientConfig:
    default = CLASSES[kind].default_policy_gradient()
    assert isinstance(default, PolicyGradientConfig)
    return default


@pytest.mark.parametrize("kind", WITH_POLICY_GRADIENT)
def test_a_missing_policy_gradient_key_has_the_default_of_its_objective_kind(kind: str) -> None:
    function = {"function": "package.module:function"} if kind == "custom" else {}
    section = {"kind": kind, **function, "policy_gradient": {"epochs": 3}}
    assert PARSE(section).policy_gradient == default_of(kind).model_copy(update={"epochs": 3})


@pytest.mark.parametrize("kind", WITH_POLICY_GRADIENT)
def test_every_kind_specific_default_can_be_overridden_with_the_general_one(kind: str) -> None:
    function = {"function": "package.module:function"} if kind == "custom" else {}
    plain = PolicyGradientConfig()
    assert PARSE({"kind": kind, **function, "policy_gradient": plain.model_dump()}).policy_gradient == plain
    assert PARSE({"kind": kind, **function, "policy_gradient": plain}).policy_gradient == plain


# ---- docs/settings.md ----


def rows(heading: str) -> list[list[str]]:
    """The cells of the tables under a heading, without their headers."""
    section = re.split(r"^## ", TEXT, flags=re.MULTILINE)
    (found,) = [part for part in section if part.startswith(f"{heading}\n")]
    lines = [line for line in found.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def value_of(cell: str) -> Any:
    """A cell in backticks, read as YAML."""
    assert re.fullmatch(r"`[^`]+`", cell), cell
    text = cell.strip("`")
    return text if text == "off" else yaml.safe_load(text)  # YAML 1.1 reads `off` as false


def leaves(section: Section, prefix: str = "") -> dict[str, Any]:
    """{dotted key: value}; without the kind and the policy gradient."""
    flat: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, PolicyGradientConfig) or name == "kind":
            continue
        if isinstance(value, Section):
            flat |= leaves(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def assert_equal(found: Any, stated: Any, where: str) -> None:
    if isinstance(stated, float) and isinstance(found, float):
        assert found == pytest.approx(stated, rel=1e-4), where
    else:
        assert found == (tuple(stated) if isinstance(stated, list) else stated), where


POLICY_ROWS = [row for row in rows("From an advantage to a gradient") if len(row) == 6]
SHARED_ROWS = [row for row in rows("From an advantage to a gradient") if len(row) == 3]
POLICY_COLUMNS = ("ratio", "dual_clip", "mismatch", "tis_cap")


def test_the_page_has_one_row_per_kind_and_lists_every_policy_gradient_key() -> None:
    assert sorted(row[0].strip("`") for row in POLICY_ROWS) == KINDS
    assert {*POLICY_COLUMNS, *(row[0].strip("`") for row in SHARED_ROWS)} == set(PolicyGradientConfig.model_fields)
    sources = [kind for row in rows("Sources") for kind in re.findall(r"`(\w+)`", row[0])]
    assert sorted(sources) == sorted(set(KINDS) - {"custom"})


@pytest.mark.parametrize("row", POLICY_ROWS, ids=lambda row: row[0].strip("`"))
def test_the_policy_gradient_defaults_of_a_kind_match_the_table(row: list[str]) -> None:
    kind, cells = row[0].strip("`"), row[1:5]
    if kind not in WITH_POLICY_GRADIENT:
        assert cells == ["-"] * 4
        return
    default = default_of(kind)
    for name, cell in zip(POLICY_COLUMNS, cells, strict=True):
        assert_equal(getattr(default, name), value_of(cell), f"{kind}.{name}")
    for shared, cell, _ in SHARED_ROWS:
        assert_equal(getattr(default, shared.strip("`")), value_of(cell), f"{kind}.{shared}")


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"custom"}))
def test_the_settings_specific_to_a_kind_match_the_table(kind: str) -> None:
    stated = {
        row[1].strip("`"): value_of(row[2]) for row in rows("The objective's own settings") if row[0] == f"`{kind}`"
    }
    if kind == "tropd_aopd":  # the page says that it has those of tropd too
        stated |= {
            row[1].strip("`"): value_of(row[2]) for row in rows("The objective's own settings") if row[0] == "`tropd`"
        }
    found = leaves(CLASSES[kind]())
    found.pop("template", None)  # text of ours; the page says so
    assert stated.keys() == found.keys()
    for name, value in stated.items():
        assert_equal(found[name], value, f"{kind}.{name}")


def test_the_top_k_defaults_of_a_custom_objective_match_the_page() -> None:
    custom = CustomObjective(function="package.module:function")
    assert "`topk` is 64 and its `student_topk` 0" in TEXT
    assert (custom.topk, custom.student_topk) == (64, 0)


@pytest.mark.parametrize("row", rows("Settings of other sections"), ids=lambda row: f"{row[0]} {row[1]}")
def test_the_defaults_of_other_sections_match_the_table(row: list[str]) -> None:
    """A source's value is bold if and only if it differs."""
    section, name = row[1].strip("`").split(".")
    default = getattr({"rollout": RolloutConfig(), "loss": LossConfig()}[section], name)
    assert row[0].strip("`") in KINDS
    assert_equal(default, value_of(row[2]), row[1])
    bold = re.match(r"\*\*(.+?)\*\*", row[3])
    of_source = bold[1].strip("`") if bold else re.split(r"[ ,]", row[3])[0].strip("`")
    assert (of_source == row[2].strip("`")) == (bold is None)


def test_the_settings_page_is_linked_from_the_objectives_page() -> None:
    assert "(settings.md)" in (REPOSITORY / "docs" / "objectives.md").read_text(encoding="utf-8")
