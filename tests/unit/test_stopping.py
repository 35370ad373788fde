"""A request to stop: who sees it, and when it is held back."""

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


def test_nobody_stops_unasked() -> None:
    stopping.check()
    assert stopping.requested() is None


def test_the_first_reason_stays_and_is_what_is_raised() -> None:
    stopping.request("SIGTERM")
    stopping.request("SIGHUP")
    assert stopping.requested() == "SIGTERM"
    with pytest.raises(StopRequested, match="^SIGTERM$"):
        stopping.check()


def test_what_is_held_is_finished_and_the_request_waits() -> None:
    stopping.request("SIGTERM")
    with stopping.held():
        with stopping.held():
            stopping.check()
        stopping.check()
        assert stopping.requested() == "SIGTERM"
    with pytest.raises(StopRequested):
        stopping.check()


def test_a_stop_may_come_at_once_only_outside_blocks_that_have_something_to_save() -> None:
    assert not stopping.waits()
    with stopping.safe_points():
        with stopping.safe_points():
            assert stopping.waits()
        assert stopping.waits()
    assert not stopping.waits()
