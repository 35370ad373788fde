"""A request to stop: where it is raised, and when it is held back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tropd_mcore import stopping
from tropd_mcore.errors import StopRequested


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    stopping.forget()
    yield
    stopping.forget()


def test_nothing_stops_without_a_request() -> None:
    stopping.check()
    assert stopping.requested() is None


def test_the_first_stop_reason_is_kept_and_raised() -> None:
    stopping.request("SIGTERM")
    stopping.request("SIGHUP")
    assert stopping.requested() == "SIGTERM"
    with pytest.raises(StopRequested, match="^SIGTERM$"):
        stopping.check()


def test_a_stop_request_waits_until_a_held_block_is_finished() -> None:
    stopping.request("SIGTERM")
    with stopping.held():
        with stopping.held():
            stopping.check()
        stopping.check()
        assert stopping.requested() == "SIGTERM"
    with pytest.raises(StopRequested):
        stopping.check()


def test_a_stop_is_immediate_only_outside_blocks_with_something_to_save() -> None:
    assert not stopping.waits()
    with stopping.safe_points():
        with stopping.safe_points():
            assert stopping.waits()
        assert stopping.waits()
    assert not stopping.waits()
