"""Every key of the schema has a rule: whether it may change between two launches of a run, or the reason why not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tropd_mcore.config.explain import schema_keys
from tropd_mcore.train.resume_rules import RULES, WHOLE_SECTIONS, rule_of

DECIDED_AS_A_WHOLE = {
    "platform", "parallel", "teacher.server", "data.chat_template_kwargs", "rollout.truncate", "rollout.server",
    "teacher.servers", "rollout.servers", "rollout.router",
    "objective", "verifier", "held_out", "monitor", "gates",
}  # fmt: skip
"""Sections in which a new key needs no rule of its own."""


def named_by(key: str) -> str | None:
    """The rule of a key by its name: its own, or that of the nearest section with a rule for the whole section."""
    if key in RULES:
        return key
    parts = key.split(".")
    around = [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]
    return next((section for section in around if section in RULES and section in DECIDED_AS_A_WHOLE), None)


def test_every_key_of_the_schema_has_a_rule_of_its_own_or_of_its_section() -> None:
    undecided = [key for key in schema_keys() if named_by(key) is None]
    assert undecided == [], "give each of them a rule in train/resume_rules.py"
    assert all(rule_of(key) == RULES[str(named_by(key))] for key in schema_keys())


def test_every_resume_rule_is_for_an_existing_key() -> None:
    known = {".".join(key.split(".")[:end]) for key in schema_keys() for end in range(1, key.count(".") + 2)}
    assert set(RULES) - known == set()
    assert WHOLE_SECTIONS == DECIDED_AS_A_WHOLE


def test_a_new_key_outside_those_sections_has_no_rule_until_one_is_added() -> None:
    for key in ("run.new", "optimizer.new", "student.new", "teacher.new", "data.new", "rollout.new", "loss.new", "new"):
        assert rule_of(key) is None


def test_every_rule_that_refuses_has_a_reason() -> None:
    assert [key for key, rule in RULES.items() if rule.kind != "free" and not rule.reason] == []


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("free", "optimizer.learning_rate optimizer.min_learning_rate optimizer.schedule optimizer.warmup_steps"),
        ("free", "run.steps run.checkpoint_every run.keep_checkpoints run.export_at_end run.stop_after run.dir"),
        ("free", "rollout.server.url rollout.server.dtype teacher.server.port teacher.kind teacher.on_failure"),
        ("free", "parallel.tensor parallel.data platform.kind batch.tokens_per_micro_batch student.recompute"),
        ("free", "teacher.pipeline_layers teacher.offload"),
        ("free", "loss.form loss.backend loss.chunk_tokens monitor.topk_overlap gates.sampler_logprob"),
        ("refused", "student.dtype teacher.dtype teacher.server.dtype run.seed run.replay data.shuffle"),
        ("refused", "objective.kind objective.outlier.topk objective.arguments.beta objective.policy_gradient.epochs"),
        ("refused", "rollout.temperature rollout.end_tokens rollout.truncate.start rollout.max_new_tokens"),
        ("refused", "loss.aggregation loss.ignore_tokens loss.logit_softcap data.chat_template_kwargs.enable_thinking"),
        ("refused", "optimizer.weight_decay optimizer.beta2 optimizer.eps optimizer.distributed"),
        ("content", "student.path teacher.path objective.reference data.prompts data.teacher_responses"),
        ("verdicts", "verifier.kind verifier.pattern verifier.thinking"),
        ("beginning", "run.init_from run.init_optimizer"),
    ],
)
def test_the_resume_rules_of_selected_keys_are_as_listed(kind: str, keys: str) -> None:
    found = {key: rule.kind for key in keys.split() if (rule := rule_of(key)) is not None}
    assert found == dict.fromkeys(keys.split(), kind)


PAGE = (Path(__file__).resolve().parents[2] / "docs" / "resume.md").read_text()


def keys_in(part: str) -> set[str]:
    """The names in backticks in the first cells of the tables of a part of the page."""
    cells = [line.split("|")[1] for line in part.splitlines() if line.startswith("|")]
    return {key for cell in cells for key in re.findall(r"`([\w.]+)`", cell)}


def test_the_resume_page_lists_every_rule_in_the_right_section() -> None:
    may = keys_in(PAGE.split("## What may change")[1].split("## What may not change")[0])
    not_ = PAGE.split("## What may not change")[1].split("## Beginning from a checkpoint")[0]
    by_content = set(re.findall(r"`([\w.]+)`", not_.split("are compared by")[0].split("\n\n")[-1]))
    rules = {kind: {key for key, rule in RULES.items() if rule.kind in kind.split()} for kind in (
        "free verdicts", "refused beginning", "content",
    )}  # fmt: skip
    assert (may, keys_in(not_), by_content) == tuple(rules.values())
