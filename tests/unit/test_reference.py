"""`tropd config --explain` and `tropd metrics` describe every key and metric as the code uses it."""

from __future__ import annotations

import re

import pytest

from tropd_mcore.cli.main import main
from tropd_mcore.config.explain import schema_keys
from tropd_mcore.config.objectives import KINDS
from tropd_mcore.config.reference import explain, reference
from tropd_mcore.errors import ConfigError
from tropd_mcore.monitor.catalogue import DESCRIBED


def test_every_key_of_the_schema_is_in_the_reference_with_its_meaning() -> None:
    keys = reference()
    leaves = {dotted for dotted in schema_keys() if not dotted.endswith(".kind") or dotted == "platform.kind"}
    assert leaves <= {key.dotted for key in keys}
    assert [key.dotted for key in keys if not key.meaning or not key.accepts] == []


def test_a_key_that_differs_between_kinds_has_one_entry_per_variant() -> None:
    rows = [key for key in reference() if key.dotted == "objective.topk"]
    by_default = {key.default: key.kinds for key in rows if "metrics only" not in key.meaning}
    assert by_default["default 32"] == ("lsm",)
    assert sum(len(key.kinds) for key in rows) == sum("topk" in section.model_fields for section in KINDS.values())


@pytest.mark.parametrize(("kind", "clip"), [("opd", "3.0"), ("reopold", "null"), ("rlad", "null")])
def test_the_reference_shows_the_default_of_the_objective_and_not_that_of_the_section(kind: str, clip: str) -> None:
    rows = [key for key in reference() if key.dotted == "objective.policy_gradient.dual_clip" and kind in key.kinds]
    assert [key.default for key in rows] == [f"default {clip}"]


def test_the_explanation_of_a_key_has_type_range_default_meaning_and_source() -> None:
    text = explain("objective.policy_gradient.clip_low")
    assert text == explain("objective.policy_gradient.clip_low=0.3")
    assert "number > 0, < 1; default 0.2" in text and "Source: PPO (0.2)" in text


def test_explaining_a_section_lists_all_of_its_keys_and_no_others() -> None:
    text = explain("loss")
    assert "loss.chunk_tokens" in text and "batch." not in text


def test_all_keys_are_listed_under_the_heading_of_their_section() -> None:
    lines = explain("").splitlines()
    head, section = lines.index(""), ""
    assert re.fullmatch(r"\d+ keys; --explain SECTION .*: run, platform, .*", " ".join(lines[:head]))
    for line in lines[head:]:
        if heading := re.fullmatch(r"== (\w+) ==", line):
            section = heading[1]
        elif line and not line.startswith(" "):
            assert line.startswith(f"{section}.") or line == section, line


@pytest.mark.parametrize(
    ("asked", "hint"),
    [
        ("lr", "optimizer.learning_rate"),
        ("optimizer.lr", "optimizer.learning_rate"),
        ("chunk_tokens", "loss.chunk_tokens"),
        ("loss.chunk_token", "loss.chunk_tokens"),
    ],
)
def test_an_unknown_key_is_refused_in_one_line_with_suggestions(asked: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"no such key; did you mean {hint}"):
        explain(asked)


def test_config_explain_and_metrics_print_known_names_and_refuse_unknown_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["config", "--explain", "run.dir"]) == 0
    assert "path; required" in capsys.readouterr().out
    assert main(["config"]) == 2
    assert "expected CONFIG" in capsys.readouterr().err
    assert main(["metrics"]) == 0
    told = capsys.readouterr().out
    assert [line.split("  [")[0] for line in told.splitlines() if not line.startswith(" ")] == [
        metric.name for metric in DESCRIBED
    ]
    assert main(["metrics", "gradd"]) == 2
    assert "no such metric" in capsys.readouterr().err
