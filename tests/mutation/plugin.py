"""A pytest plugin for mutation runs, loaded with `-p tests.mutation.plugin`.

It runs only the chosen tests, and writes how long each took and which failed first. In the run that finds the covering
tests, it tells coverage which test is running, also in the rank processes. It reads its settings from the environment.

A test that plants faults itself looks for a text in the source. If the fault of the mutation run changed that text, the
test would fail without detecting the fault, so it is skipped.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tropd_mcore

IMPORT = ""
"""Context of the lines that run before the first test: the module code."""
FIXTURES = "fixtures"
"""Context of fixtures that several tests share."""
TEXT_CHANGED = re.compile(r"has \d+ times ")
"""Message of tests/mutants.py and tests/glue/faults.py about a text that is not in the source exactly once."""

_context = IMPORT
_seconds: dict[str, float] = {}
_outcomes: dict[str, str] = {}
_first_failure: dict[str, str] = {}


def pytest_configure() -> None:
    folder = os.environ["MUTATION_COPY"]
    assert tropd_mcore.__file__ is not None and tropd_mcore.__file__.startswith(folder + os.sep), tropd_mcore.__file__
    if "COVERAGE_PROCESS_START" in os.environ:
        _tell_ranks()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "MUTATION_TESTS" not in os.environ:
        return
    chosen = set(json.loads(Path(os.environ["MUTATION_TESTS"]).read_text(encoding="utf-8")))
    renamed = chosen - {item.nodeid for item in items}  # the fault changed a parameter: run all tests of such a file
    files = {test.partition("::")[0] for test in renamed}
    kept = [item for item in items if item.nodeid in chosen or item.nodeid.partition("::")[0] in files]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    _enter(item.nodeid)
    os.environ["MUTATION_CONTEXT"] = item.nodeid
    try:
        return (yield)
    finally:
        os.environ.pop("MUTATION_CONTEXT", None)
        _enter(IMPORT)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Iterator[Any]:
    test = _context
    if fixturedef.scope != "function":
        _enter(FIXTURES)
    try:
        return (yield)
    finally:
        _enter(test)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    try:
        return (yield)
    except AssertionError as error:
        if TEXT_CHANGED.search(str(error)):
            pytest.skip("the fault changed the text that this test replaces")
        raise


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _seconds[report.nodeid] = _seconds.get(report.nodeid, 0.0) + report.duration
    if _outcomes.get(report.nodeid) != "failed" and (report.when == "call" or report.outcome != "passed"):
        _outcomes[report.nodeid] = report.outcome
    if report.failed:
        _note(report.nodeid, report.longreprtext)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _note(report.nodeid, report.longreprtext)


def pytest_sessionfinish() -> None:
    found = {"seconds": _seconds, "outcomes": _outcomes, "first_failure": _first_failure}
    Path(os.environ["MUTATION_REPORT"]).write_text(json.dumps(found), encoding="utf-8")


def _note(test: str, text: str) -> None:
    if not _first_failure:
        lines = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")] or text.splitlines()[-1:]
        _first_failure.update(test=test, message=" ".join(lines)[:300])


def _enter(context: str) -> None:
    """Lines that run from now on belong to this context."""
    global _context
    if context != _context:
        _context = context
        _switch(context)


def _switch(context: str) -> None:
    if "COVERAGE_PROCESS_START" in os.environ:
        import coverage

        running = coverage.Coverage.current()
        assert running is not None, "coverage did not start"
        running.switch_context(context)


def _tell_ranks() -> None:
    """Lines that run in `run_on_ranks` belong to the test that called it."""
    from tests import ranks

    def run_on_ranks(function: Callable[..., Any], world_size: int, *args: Any, **options: Any) -> list[Any]:
        inherited = os.environ.pop("MUTATION_CONTEXT", None)  # imports of a new rank belong to no test
        try:
            return original(in_context, world_size, _context, function, args, **options)
        finally:
            if inherited is not None:
                os.environ["MUTATION_CONTEXT"] = inherited

    original = ranks.run_on_ranks
    ranks.run_on_ranks = run_on_ranks


def in_context(context: str, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """On a rank: call the function, and count its lines for the context."""
    _switch(context)
    try:
        return function(*args)
    finally:
        _switch(IMPORT)
