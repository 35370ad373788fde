"""The part of the fault suite that CI plays: real ranks and servers, at most 4 minutes on two idle cores."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e import jobs
from tests.faults.play import play_all
from tests.faults.registry import chosen
from tests.faults.stage import Stage, set_stage
from tests.faults.verdict import MISS

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(jobs.TEST_LIMIT_S)]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    root = tmp_path_factory.mktemp("faults")
    made = set_stage(root)
    try:
        yield made
    finally:
        made.close()


def test_no_representative_fault_is_lost_silent_hung_or_left_running(stage: Stage) -> None:
    played = play_all(stage, chosen([], representative=True), jobs=2, say=print)
    assert [(each.fault.id, each.verdict.reasons) for each in played if each.verdict.verdict == MISS] == []
    assert len({each.fault.group for each in played}) >= 7
