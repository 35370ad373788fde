"""A slow server is left out of publications and sampling, and is tried again less and less often."""

from __future__ import annotations

from typing import Any

import pytest

from tests.glue.policy_site import PolicySite, key_of, site_of
from tropd_mcore.errors import ServerDied, ServerHung
from tropd_mcore.rollout.member import LONGEST_REST, Member


def fleet(steps: int, **given: Any) -> PolicySite:
    """Steps -1 to `steps` - 1 of a single rank with three servers, which are warm from step 0 on."""
    return site_of(list(range(-1, steps)), servers=3, **given)


def published(site: PolicySite) -> list[tuple[int, ...]]:
    """Places of the servers of each publication but the first."""
    return [event[2:] for event in site.did("publish")][1:]


ALL, FIRST_TWO = (0, 1, 2), (0, 1)


def test_a_slow_server_is_left_out_for_twice_as_many_steps_each_time(caplog: pytest.LogCaptureFixture) -> None:
    site = fleet(9, slow={step: {2} for step in range(9)})
    assert published(site) == [ALL, *[FIRST_TWO] * 2, ALL, *[FIRST_TWO] * 4, ALL]
    assert site.did("recover") == [] and len(site.did("sample")) == 10
    warning = f"{key_of(2)}: too slow for the others; left out until step 3: 2 of 3 rollout servers go on"
    assert warning in caplog.messages


def test_a_server_that_is_fast_again_stays_and_its_next_rest_is_short(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    site = fleet(8, slow={0: {2}, 4: {2}})
    assert published(site) == [ALL, *[FIRST_TWO] * 2, ALL, ALL, *[FIRST_TWO] * 2, ALL]
    assert caplog.messages.count(f"{key_of(2)}: it takes requests again") == 2
    assert site.connections == 3 + 2  # its identity is checked again each time


def test_a_server_that_got_no_sample_when_it_was_tried_again_rests_again() -> None:
    site = fleet(9, slow={0: {2}}, unseen={3: {2}})
    assert published(site) == [ALL, *[FIRST_TWO] * 2, ALL, *[FIRST_TWO] * 4, ALL]


def test_servers_of_which_nothing_is_known_do_not_rest() -> None:
    assert published(fleet(2, unseen={0: {0, 1, 2}})) == [ALL, ALL]


def test_the_last_servers_do_not_rest() -> None:
    assert published(fleet(2, slow={0: {0, 1, 2}})) == [ALL, ALL]
    site = site_of([0, 1, 2], servers=1, slow={1: {0}})
    assert len(site.did("publish")) == 3


def test_a_resting_server_is_used_at_once_if_no_other_is_left() -> None:
    gone = {0: ServerDied("gone"), 1: ServerDied("gone too")}
    site = fleet(3, slow={0: {2}}, sample_faults=[None, None, gone], starting={0: 99, 1: 99})
    assert published(site) == [ALL, FIRST_TWO, (2,), (2,)]


def test_a_server_that_died_at_rest_is_started_again_when_it_is_tried_again() -> None:
    site = fleet(5, slow={0: {2}}, publish_faults=[None, None, None, None, {2: ServerDied("gone at rest")}])
    assert published(site)[:4] == [ALL, FIRST_TWO, FIRST_TWO, ALL] and site.did("recover") == [
        ("recover", "gone at rest")
    ]


def test_a_server_too_slow_to_end_its_requests_rests_too() -> None:
    """It was lost for the step, but needs no new start."""
    hung = {2: ServerHung("it did not end 3 requests", "url")}
    site = fleet(4, slow={0: {2}}, sample_faults=[None, hung], alive={key_of(2)})
    assert published(site) == [ALL, *[FIRST_TWO] * 2, ALL] and site.did("recover") == []


def test_a_server_at_rest_gave_its_memory_back_and_is_not_asked_to() -> None:
    site = fleet(3, slow={0: {2}}, release=True)
    assert [len(site.did(what)) for what in ("resume", "release")] == [3 + 3 + 2 + 2] * 2


def test_the_first_step_after_a_start_says_nothing() -> None:
    """Engines compile in their first requests."""
    assert published(fleet(2, slow={-1: {2}})) == [ALL, ALL]
    site = fleet(4, slow={1: {2}}, sample_faults=[None, {2: ServerDied("gone")}])
    assert published(site) == [ALL, ALL, ALL, ALL] and site.did("recover") == [("recover", "gone")]


def test_rests_have_a_longest() -> None:
    member = Member(server=None)  # type: ignore[arg-type]
    rests = []
    for step in range(8):
        member.rest_after(step)
        rests.append(member.rests_until - step - 1)
    assert rests == [2, 4, 8, 16, 32, 64, 64, 64] and LONGEST_REST == 64
