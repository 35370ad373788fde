"""docs/configuration.md and docs/metrics.md match the code, row for row."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tropd_mcore.config.reference import reference
from tropd_mcore.monitor.catalogue import DESCRIBED

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def made() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_references", DOCS / "make_references.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_pages_are_those_that_the_script_writes(made: ModuleType) -> None:
    for name in ("configuration", "metrics"):
        page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
        assert page == getattr(made, name)(), f"run python docs/make_references.py: docs/{name}.md is not of this code"


def _group(names: list[str]) -> Callable[[str], int]:
    """The order of the first name of each group. Names within a group keep their order."""
    order = list(dict.fromkeys(re.split(r"[./]", name)[0] for name in names))
    return lambda name: order.index(re.split(r"[./]", name)[0])


def test_every_key_and_every_metric_has_a_row_and_each_section_one_table() -> None:
    for name, wanted in (
        ("configuration", [key.dotted for key in reference()]),
        ("metrics", [metric.name for metric in DESCRIBED]),
    ):
        text = (DOCS / f"{name}.md").read_text(encoding="utf-8")
        assert re.findall(r"^\| `([^`]+)`", text, flags=re.MULTILINE) == sorted(wanted, key=_group(wanted))
        headings = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
        assert len(set(headings)) == len(headings)
        for row in re.findall(r"^\| `.*$", text, flags=re.MULTILINE):
            assert len(re.findall(r"(?<!\\)\|", row)) == 5, row
