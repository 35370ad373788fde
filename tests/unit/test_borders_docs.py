"""The table of lies in docs/borders.md has a row for every lie that the tests tell, and no other."""

from __future__ import annotations

from pathlib import Path

from tests.liars import sampling_lies, scoring_lies

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "borders.md").read_text()


def first_cells(heading: str) -> list[str]:
    """The first cell of each row of the table whose heading begins with these words."""
    table = PAGE.split(f"| {heading}")[1].split("\n\n")[0].splitlines()[2:]
    return [row.split("|")[1].strip() for row in table]


def test_every_tested_lie_about_a_sample_has_a_row_in_the_docs() -> None:
    assert first_cells("the rollout server answers with") == list(sampling_lies(vocab_size=50, end=2))


def test_every_tested_lie_about_a_score_has_a_row_in_the_docs() -> None:
    assert first_cells("the teacher's server answers with") == list(scoring_lies(vocab_size=50))
