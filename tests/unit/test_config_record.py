"""The recorded configuration compared with that of a launch: every change by its dotted key, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tropd_mcore.config.loader import leaves, load
from tropd_mcore.config.plan import resolved_yaml
from tropd_mcore.config.record import Change, compare, read_record, show
from tropd_mcore.errors import ConfigError

FIRST = """
run: {dir: unused, seed: 3}
student: {path: models/small, dtype: float32}
teacher: {path: models/large, dtype: bfloat16}
data: {prompts: prompts.jsonl}
objective: {kind: opd}
"""


def resolved(folder: Path, *overrides: str, text: str = FIRST) -> str:
    (folder / "config.yaml").write_text(text)
    return resolved_yaml(*load(folder / "config.yaml", list(overrides)))


def changes(folder: Path, *overrides: str, before: str | None = None, text: str = FIRST) -> list[str]:
    """The changes of a launch with `overrides` since one with `before`."""
    recorded = read_record(resolved(folder, text=text) if before is None else before, "record").values
    (folder / "config.yaml").write_text(text)
    return [str(change) for change in compare(recorded, leaves(load(folder / "config.yaml", list(overrides))[0]))]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("student.path=models/large", "student.path: models/small -> models/large"),
        ("student.dtype=bfloat16", "student.dtype: float32 -> bfloat16"),
        ("teacher.dtype=float32", "teacher.dtype: bfloat16 -> float32"),
        ("rollout.temperature=0.7", "rollout.temperature: 1.0 -> 0.7"),
        ("rollout.server.port=3000", "rollout.server.port: none -> 3000"),
        ("loss.ignore_tokens=[a, b]", 'loss.ignore_tokens: [] -> ["a", "b"]'),
        ("optimizer.overlap_grad_reduce=true", "optimizer.overlap_grad_reduce: false -> true"),
        (
            "data.chat_template_kwargs={enable_thinking: false}",
            "data.chat_template_kwargs.enable_thinking: none -> false",
        ),
    ],
)
def test_a_changed_value_is_reported_even_if_it_occurs_elsewhere_in_the_record(
    tmp_path: Path, override: str, line: str
) -> None:
    """`models/large`, `bfloat16` and `float32` all occur in the record under another section."""
    assert changes(tmp_path, override) == [line]


def test_the_same_values_from_another_source_are_not_a_change(tmp_path: Path) -> None:
    assert changes(tmp_path) == []
    assert changes(tmp_path, "run.seed=3", "student.dtype=float32", "rollout.temperature=1.0") == []


def test_a_key_unknown_to_an_older_version_counts_as_its_default(tmp_path: Path) -> None:
    old = "\n".join(line for line in resolved(tmp_path).splitlines() if "temperature" not in line)
    assert changes(tmp_path, before=old) == []
    assert changes(tmp_path, "rollout.temperature=0.7", before=old) == ["rollout.temperature: 1.0 -> 0.7"]


def test_a_key_of_another_version_is_named_and_otherwise_ignored(tmp_path: Path) -> None:
    old = resolved(tmp_path).replace("  seed: 3", "  seed: 3\n  fashion: old")
    found = read_record(old + "costume:\n  hat: red\n", "record")
    assert set(found.unknown) == {"run.fashion", "costume"} and found.values["run.seed"] == 3


def test_another_objective_is_reported_as_one_line_and_the_keys_that_both_have(tmp_path: Path) -> None:
    found = changes(tmp_path, "objective={kind: lsm}")
    assert found[0] == "objective.kind: opd -> lsm" and found[1:] == ["objective.topk: 64 -> 32"]


def test_an_added_or_removed_section_is_reported_by_its_keys(tmp_path: Path) -> None:
    cut = "rollout.truncate={start: 3, increment: 2, every: 1}"
    keys = {"start": 3, "increment": 2, "every": 1}
    comes = [f"rollout.truncate.{key}: none -> {value}" for key, value in keys.items()]
    goes = [f"rollout.truncate.{key}: {value} -> none" for key, value in keys.items()]
    assert changes(tmp_path, cut) == comes
    assert changes(tmp_path, before=resolved(tmp_path, cut)) == goes


def test_a_removed_entry_of_a_free_mapping_is_a_change(tmp_path: Path) -> None:
    before = resolved(tmp_path, "data.chat_template_kwargs={enable_thinking: false}")
    assert changes(tmp_path, before=before) == ["data.chat_template_kwargs.enable_thinking: false -> none"]


def test_a_boolean_that_becomes_a_number_is_a_change(tmp_path: Path) -> None:
    """Python calls False and 0 equal; `is false` of a template does not."""
    before = resolved(tmp_path, "data.chat_template_kwargs={enable_thinking: false}")
    assert changes(tmp_path, "data.chat_template_kwargs={enable_thinking: 0}", before=before) == [
        "data.chat_template_kwargs.enable_thinking: false -> 0"
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected the sections of a configuration, found nothing"),
        ("run: {dir: x", "not valid YAML"),
        ("just a word\n", "expected the sections of a configuration"),
        ("run:\n  dir: unused\n", "missing"),
        (FIRST.replace("seed: 3", "seed: three"), "run.seed"),
        (FIRST + "student: {path: b}\n", "given twice"),
        (FIRST.replace("kind: opd", "kind: unheard"), "objective"),
    ],
)
def test_a_truncated_or_edited_record_gives_a_one_line_error_that_says_what_to_do(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_record(text, "run/config.resolved.yaml")
    (line,) = caught.value.problems
    assert line.startswith("run/config.resolved.yaml") and words in line and "\n" not in line
    assert "restore it, or remove it" in line


def test_a_record_preserves_every_kind_of_value(tmp_path: Path) -> None:
    text = FIRST.replace("kind: opd", 'kind: sdpo, template: "{prompt}\\n\\n# {solution}"').replace("large", "small")
    text += "verifier: {kind: exact_match}\n"
    again = ("data.template_date=2025-01-02", "verifier.thinking=null", "rollout.end_tokens=['<|im_end|>', 'off']")
    before = resolved(tmp_path, *again, text=text)
    assert changes(tmp_path, *again, before=before, text=text) == []


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "none"),
        ("a b", "a b"),
        ("a\nb", '"a\\nb"'),
        ("", '""'),
        (True, "true"),
        (5e-6, "5e-06"),
        (["é"], '["é"]'),
    ],
    ids=repr,
)
def test_changed_values_are_shown_on_one_line(value: Any, shown: str) -> None:
    assert show(value) == shown
    assert len(show("x" * 1000)) < 200
    assert str(Change("a.b", new=value)) == f"a.b: none -> {shown}"


def test_a_renamed_key_is_not_a_change(tmp_path: Path) -> None:
    text = FIRST.replace("{kind: opd}", "{kind: vopd, student_topk: 7}")
    before = resolved(tmp_path, text=text)
    assert "  student_topk: 7" in before
    assert changes(tmp_path, before=before.replace("student_topk: 7", "own_topk: 7"), text=text) == []
    assert read_record(before.replace("student_topk: 7", "own_topk: 7"), "record").unknown == ()
