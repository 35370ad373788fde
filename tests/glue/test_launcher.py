"""The launcher: torchrun's arguments pass through, and the exit code is that of the rank that failed first."""

from __future__ import annotations

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from tropd_mcore.train import launch


def failed(exitcode: int, at: int) -> ProcessFailure:
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=exitcode, error_file="no such file")
    failure.timestamp = at
    return failure


def test_the_arguments_go_to_torchrun_and_a_job_without_a_failure_ends_with_0(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr(launch, "torchrun", given.append)
    assert launch.main(["--nproc-per-node=2", "train.py"]) == 0
    assert given == [["--nproc-per-node=2", "train.py"]]


@pytest.mark.parametrize(
    ("exitcodes", "expected"),
    [
        pytest.param([2], 2, id="a message"),
        pytest.param([1], 1, id="a traceback"),
        pytest.param([-9], 1, id="a signal"),
        pytest.param([3, -15, 1], 3, id="others follow"),
        pytest.param([-9, 2], 1, id="others follow a signal"),
    ],
)
def test_the_exit_code_is_that_of_the_first_rank_that_failed_and_1_after_a_signal(
    monkeypatch: pytest.MonkeyPatch, exitcodes: list[int], expected: int
) -> None:
    def torchrun(arguments: list[str]) -> None:
        failures = {rank: failed(code, at=100 + rank) for rank, code in enumerate(exitcodes)}
        raise ChildFailedError("train", dict(reversed(failures.items())))

    monkeypatch.setattr(launch, "torchrun", torchrun)
    assert launch.main([]) == expected
