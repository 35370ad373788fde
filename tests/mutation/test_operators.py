"""The operators plant the faults that their names say, where they say, and the draw is reproducible."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

from tests.mutation.candidates import PACKAGES, all_candidates, candidates, draw
from tests.mutation.copies import REPOSITORY

FILE = "tropd_mcore/data/example.py"


def planted(text: str) -> dict[str, set[str]]:
    """{operator: texts of the whole source with one such fault}."""
    content = text.encode()
    found: dict[str, set[str]] = {}
    for fault in candidates(FILE, content):
        found.setdefault(fault.operator, set()).add(fault.planted(content).decode())
    return found


@pytest.mark.parametrize(
    ("right", "operator", "wrong"),
    [
        ("x = a < b", "comparison", {"x = a <= b"}),
        ("x = a < b <= c", "comparison", {"x = a <= b <= c", "x = a < b < c"}),
        ("x = (a) == (b)", "comparison", {"x = (a) != (b)"}),
        ("x = a is not b", "comparison", {"x = a is b"}),
        ("x = a not in b", "comparison", {"x = a in b"}),
        ("x = a and b and c", "boolean", {"x = a or b and c", "x = a and b or c"}),
        ("x = (a  # and\n  and b)", "boolean", {"x = (a  # and\n  or b)"}),
        ("x = not (a or b)", "negation", {"x = (a or b)"}),
        ("x = -a", "negation", {"x = +a"}),
        ("x = a // b", "arithmetic", {"x = a * b"}),
        ("x = a ** b", "arithmetic", {"x = a * b"}),
        ("x = on | off", "arithmetic", {"x = on & off"}),
        ("x += a", "arithmetic", {"x -= a"}),
        ("x = 'é' + a; y = b - c", "arithmetic", {"x = 'é' + a; y = b + c"}),
        ("x = 3", "constant", {"x = 4", "x = 0"}),
        ("x = 0", "constant", {"x = 1"}),
        ("x = f(strict=True)", "constant", {"x = f(strict=False)"}),
        ("if a:\n  b = c", "condition", {"if True:\n  b = c", "if False:\n  b = c"}),
        ("while a:\n  b = c", "condition", {"while False:\n  b = c"}),
        ("x = [a for a in b if a]", "condition", {"x = [a for a in b if True]", "x = [a for a in b if False]"}),
        ("def f():\n  return a", "result", {"def f():\n  return None"}),
        ("f(a)", "removed call", {"pass"}),
        ("async def f():\n  await g()", "removed call", {"async def f():\n  pass"}),
        ("raise Error(f'{a}', 1 < 2)", "removed raise", {"pass"}),
        ("for a in b:\n  continue", "left loop", {"for a in b:\n  break"}),
        ("x = np.minimum(a, b)", "swapped call", {"x = np.maximum(a, b)"}),
        ("x = a[b:c]", "bound", {"x = a[(b) + 1:c]", "x = a[b:(c) + 1]"}),
        ("def f(*, a='x'): ...", "default", {"def f(*, a='xx'): ..."}),
    ],
)
def test_each_operator_changes_exactly_one_place(right: str, operator: str, wrong: set[str]) -> None:
    assert planted(right)[operator] == wrong


@pytest.mark.parametrize(
    "text",
    [
        '"""Text with 1 < 2."""',
        "x: Literal[1] | None",
        "def f(a: A | B) -> A | B: ...",
        "log.info('%d', a + 1)",
        "x = f'{a + 1:06d}'",
        "__all__ = [f(1)]",
        "@dataclass(frozen=True)\nclass A: ...",
        "if TYPE_CHECKING:\n  x = 1",
        "if __name__ == '__main__':\n  main(1)",
    ],
)
def test_code_that_no_test_should_check_gets_no_fault(text: str) -> None:
    assert planted(text) == {}


def test_the_message_of_a_raise_gets_no_fault_but_its_condition_does() -> None:
    found = planted("if a < 1:\n  raise Error(f'{a}' + str(b + 2))")
    assert set(found) == {"comparison", "constant", "condition", "removed raise"}


def test_a_default_matters_once_the_function_runs_and_a_constant_once_the_module_is_imported() -> None:
    text = "A = 1\ndef f(a=2):\n  '''Doc.'''\n  if a:\n    return a\n  return g(a)\n"
    runs = {fault.before: (fault.runs, fault.at_import) for fault in candidates(FILE, text.encode())}
    assert runs["1"] == ((1, 1), True)
    assert runs["2"] == ((4, 6), False)
    assert runs["a"] == ((4, 4), False)


def test_the_draw_of_faults_depends_only_on_the_seed_and_a_larger_draw_only_adds() -> None:
    few, many, other = (draw(REPOSITORY, seed=seed, count=count) for seed, count in ((0, 20), (0, 150), (1, 20)))
    assert few == many[:20]
    assert len({fault.id for fault in many}) == 150
    assert few != other


def test_drawn_faults_are_python_and_differ_from_the_source() -> None:
    for fault in draw(REPOSITORY, seed=0, count=150):
        content = (REPOSITORY / fault.file).read_bytes()
        wrong = ast.parse(fault.planted(content))
        assert ast.dump(wrong) != ast.dump(ast.parse(content)), fault.id


def test_every_package_outside_the_loss_has_candidate_faults() -> None:
    found = Counter(fault.file.split("/")[1] for fault in all_candidates(REPOSITORY))
    assert set(found) == set(PACKAGES)
    assert min(found.values()) > 100, found


def test_a_fault_whose_text_has_moved_is_refused(tmp_path: Path) -> None:
    fault = candidates(FILE, b"x = a < b")[0]
    with pytest.raises(AssertionError, match="is not at byte"):
        fault.planted(b"xy = a < b")
