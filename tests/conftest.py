"""What holds for all tests: the tier of a folder, Ctrl-C, and property tests that try the same examples each time."""

from __future__ import annotations

import signal

import pytest
from hypothesis import settings

MARK_OF_FOLDER = ("sglang", "e2e")
"""Every test below tests/<name> carries the mark <name>."""

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # started in the background of a script: what tests start would ignore Ctrl-C as well
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("project", deadline=None, derandomize=True, database=None)
settings.load_profile("project")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for name in MARK_OF_FOLDER:
            if name in item.path.parts:
                item.add_marker(getattr(pytest.mark, name))
