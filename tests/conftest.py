"""Settings of all tests: the tier of each folder, Ctrl-C, and property tests that try the same examples each time."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from hypothesis import settings

MARK_OF_FOLDER = ("sglang", "e2e")
"""Every test below tests/<name> carries the mark <name>."""
SLOW = pytest.StashKey[list[tuple[str, str]]]()
"""In the stash of the configuration: (file, test function) of each slow test that was collected."""

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # started in the background of a script: processes that the tests start would also ignore Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("project", deadline=None, derandomize=True, database=None)
settings.load_profile("project")


@pytest.hookimpl(tryfirst=True)  # before tests are deselected by their marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _refuse_files_left_out(config, items)
    for item in items:
        for name in MARK_OF_FOLDER:
            if name in item.path.parts:
                item.add_marker(getattr(pytest.mark, name))
    slow = {_function(config, item) for item in items if item.get_closest_marker("slow")}
    config.stash[SLOW] = sorted(slow)


def _function(config: pytest.Config, item: pytest.Item) -> tuple[str, str]:
    """(file, test function) of a test, without its parameters."""
    return item.path.relative_to(config.rootpath).as_posix(), item.name.split("[")[0]


def _refuse_files_left_out(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Stop a run of all tests that would skip some of them. Pytest silently skips folders with certain names."""
    if config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return
    left_out = {Path(path).resolve() for path in config.getoption("ignore") or ()}
    files = {path for path in Path(__file__).parent.rglob("test_*.py") if not left_out & set(path.parents)}
    if missing := files - {item.path for item in items}:
        names = ", ".join(sorted(str(path.relative_to(config.rootpath)) for path in missing)[:3])
        raise pytest.UsageError(f"{len(missing)} files of tests were not collected: {names}; look at norecursedirs")
