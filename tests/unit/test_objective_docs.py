"""docs/objectives.md names functions and tests that exist, and has a row for every kind."""

from __future__ import annotations

import math
import re
from pathlib import Path

from tropd_mcore.config.objectives import KINDS
from tropd_mcore.config.phase_metrics import PHASE_METRICS

REPOSITORY = Path(__file__).resolve().parents[2]
TEXT = (REPOSITORY / "docs" / "objectives.md").read_text(encoding="utf-8")
TESTS = "\n".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "tests").rglob("*.py"))


def test_every_function_named_in_the_table_of_objectives_exists() -> None:
    named = re.findall(r"`([\w/]+\.py): (\w+)`", TEXT)
    assert len(named) > 20
    for file, name in named:
        source = (REPOSITORY / "tropd_mcore" / file).read_text(encoding="utf-8")
        assert re.search(rf"(def|class) {name}\b", source), f"{file} has no {name}"


def test_every_test_named_in_the_docs_of_objectives_exists() -> None:
    """A name that ends in ... is the beginning of one."""
    named = re.findall(r"`(test_\w+?)(_?\.\.\.)?`", TEXT)
    assert len(named) > 10
    for name, open_end in named:
        beginning = f"def {name}" if open_end else f"def {name}("
        assert beginning in TESTS, f"no test {name}"


def test_every_file_named_in_the_docs_of_objectives_exists() -> None:
    for file in re.findall(r"`((?:unit|dist)/\w+\.py|\w+_claims\.py)`", TEXT):
        assert (REPOSITORY / "tests" / file).is_file(), file


def test_the_readme_lists_every_objective_kind() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    (row,) = [line for line in readme.splitlines() if line.startswith("| objectives |")]
    assert set(KINDS) - set(re.findall(r"`(\w+)`", row)) == set()


def test_every_objective_kind_has_a_paper_with_its_arxiv_number() -> None:
    """Two kinds have none: a post without a number, and a function of the user."""
    table = TEXT.partition("## Symbols")[0]
    papers = dict(re.findall(r"^\| `(\w+)` \| .+ \| (.+) \|$", table, flags=re.MULTILINE))
    assert set(papers) == set(KINDS)
    for kind, paper in papers.items():
        for number, link in re.findall(r"\[(\S+)\]\(https://arxiv.org/abs/(\S+)\)", paper):
            assert number == link and re.fullmatch(r"\d{4}\.\d{5}", number), kind
        assert "arxiv.org" in paper or kind in ("opd", "custom"), kind


def test_the_table_of_phases_has_every_metric_that_can_end_one_with_its_range() -> None:
    table = TEXT.partition("| `until.metric` |")[2].partition("\n\n")[0]
    found = {}
    for row in table.splitlines()[2:]:
        names, ends = row.split("|")[1], row.split("|")[2].strip()
        found |= dict.fromkeys(re.findall(r"`([\w/]+)`", names), ends)
    ranges = {(0.0, 1.0): "0 to 1", (0.0, math.inf): "0 or more", (-math.inf, math.inf): "any"}
    assert found == {name: ranges[metric.lowest, metric.highest] for name, metric in PHASE_METRICS.items()}


def test_every_objective_kind_has_a_row() -> None:
    rows = set(re.findall(r"^\| `(\w+)` \|", TEXT, flags=re.MULTILINE))
    assert set(KINDS) - {"tropd", "opd"} <= rows
