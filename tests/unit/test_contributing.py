"""The tour of the code in CONTRIBUTING.md names files, classes, functions and methods that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TOUR = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Tour of the code")[1].split("\n## ")[0]
STOPS = re.findall(r"`([\w/]+\.py)(?:: (\w+))?`", TOUR)


@pytest.mark.parametrize(("file", "name"), STOPS, ids=lambda part: part or "file")
def test_every_stop_of_the_code_tour_exists(file: str, name: str) -> None:
    folder = REPOSITORY if file.startswith("tests/") else REPOSITORY / "tropd_mcore"
    source = (folder / file).read_text(encoding="utf-8")
    assert not name or re.search(rf"^(def|class) {name}\b", source, flags=re.MULTILINE)


def test_the_code_tour_has_enough_stops_and_names_existing_methods_of_the_loop() -> None:
    trainer = (REPOSITORY / "tropd_mcore" / "train" / "trainer.py").read_text(encoding="utf-8")
    (methods,) = re.findall(r"methods (.+?) \|", TOUR)
    assert all(f"    def {name}(" in trainer for name in re.findall(r"`(\w+)`", methods))
    assert len(STOPS) > 40
