"""The rank harness: results by rank, failures with their rank, bounded hangs, and groups that are kept if needed.

`run_on_ranks` is `Pool.run` on the pool of the tests.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_on_ranks
from tropd_mcore.conformance.ranks import Failure, Pool, Ranks, RanksLost, on_fresh_ranks


def _rank_and_sum(value: float) -> tuple[int, int, float]:
    total = torch.tensor([value * (dist.get_rank() + 1)], dtype=torch.float64)
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), float(total)


def _process_id() -> int:
    return os.getpid()


def _fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise KeyError(f"only rank {rank}")
    dist.barrier()


def _hang_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(600)


def _die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(3)
    dist.barrier()


def _crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _fail(error: Exception) -> None:
    raise error


def _fail_unportably() -> None:
    raise _Unportable(1, 2)


class _Unportable(Exception):
    """Cannot be rebuilt from its text."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


def _threads() -> tuple[int, str | None]:
    return torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")


def _environment(name: str) -> str | None:
    return os.environ.get(name)


def _group() -> int:
    return id(dist.group.WORLD)


@pytest.mark.parametrize("world_size", [1, 3, 2])
def test_results_are_ordered_by_rank_after_a_real_collective(world_size: int) -> None:
    expected = 2.0 * sum(range(1, world_size + 1))
    assert run_on_ranks(_rank_and_sum, world_size, 2.0) == [(rank, world_size, expected) for rank in range(world_size)]


def test_rank_workers_are_kept_between_calls_and_use_one_thread() -> None:
    assert run_on_ranks(_process_id, 2) == run_on_ranks(_process_id, 2)
    assert run_on_ranks(_threads, 2) == [(1, "1")] * 2


def test_an_exception_keeps_its_type_and_names_its_rank() -> None:
    with pytest.raises(KeyError, match="only rank 1") as caught:
        run_on_ranks(_fail_on, 2, 1)
    assert any("rank 1 of 2" in note and "_fail_on" in note for note in caught.value.__notes__)


def test_the_first_failure_is_raised_and_not_its_consequence_on_another_rank() -> None:
    for rank in (0, 1, 2):
        with pytest.raises(KeyError, match=f"only rank {rank}"):
            run_on_ranks(_fail_on, 3, rank)


def test_a_hang_ends_at_the_timeout_with_the_stack_and_the_pool_recovers() -> None:
    """On a busy machine the ranks may not reach the hang in time. Then the next, longer bound is tried."""
    for timeout_s in (3.0, 15.0, 75.0):
        run_on_ranks(_process_id, 2)  # start the workers, so that the timeout below does not include their start
        with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] of 2") as caught:
            run_on_ranks(_hang_on, 2, 1, timeout_s=timeout_s)
        if "_hang_on" in caught.value.__notes__[0]:
            break
    assert "_hang_on" in caught.value.__notes__[0]
    assert run_on_ranks(_rank_and_sum, 2, 1.0) == [(0, 2, 3.0), (1, 2, 3.0)]


def test_a_dead_rank_is_reported_with_its_exit_code() -> None:
    with pytest.raises(RuntimeError, match="exit code 3"):
        run_on_ranks(_die_on, 1, 0)


def test_a_crash_is_reported_with_its_stack() -> None:
    with pytest.raises(RuntimeError, match="exit code -11") as caught:
        run_on_ranks(_crash, 1)
    assert "_crash" in caught.value.__notes__[0]


def test_an_exception_that_cannot_be_rebuilt_becomes_a_runtime_error_with_its_text() -> None:
    with pytest.raises(RuntimeError, match="_Unportable: 1 and 2") as caught:
        run_on_ranks(_fail_unportably, 1)
    assert "_fail_unportably" in caught.value.__notes__[0]


def test_a_rank_has_the_environment_of_its_pool_and_this_process_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with closing(Pool({"ONLY_HERE": "yes"})) as pool:
        assert pool.run(_environment, 1, "ONLY_HERE") == ["yes"]
        assert pool.run(_threads, 1) == [(1, "1")]
    assert [_environment(name) for name in ("OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "ONLY_HERE")] == ["7", None, None]


def test_fresh_ranks_are_new_processes_in_each_call_and_end_with_it() -> None:
    first, second = (on_fresh_ranks(_process_id, 1) for _ in range(2))
    assert first != second
    assert not any(psutil.pid_exists(pid) for pid in first + second)
    with pytest.raises(KeyError, match="everywhere") as caught:
        on_fresh_ranks(_fail, 1, KeyError("everywhere"))
    assert "rank 0 of 1" in caught.value.__notes__[0] and "_fail" in caught.value.__notes__[0]


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    with closing(Ranks(2)) as ranks:
        yield ranks


def test_kept_ranks_keep_their_group_even_after_a_failure_on_all(ranks: Ranks) -> None:
    group, processes = ranks.call(_group, timeout_s=60), ranks.call(_process_id, timeout_s=60)
    failure = ranks.call(_fail, ArithmeticError("everywhere"), timeout_s=60)
    assert isinstance(failure, Failure)
    assert (failure.kind, failure.summary) == ("ArithmeticError", "ArithmeticError: everywhere")
    assert "_fail" in failure.detail
    assert (ranks.call(_group, timeout_s=60), ranks.call(_process_id, timeout_s=60)) == (group, processes)
    assert ranks.call(_rank_and_sum, 1.0, timeout_s=60) == [(0, 2, 3.0), (1, 2, 3.0)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "reason", "detail"),
    [
        (_hang_on, r"ranks \[1\] of 2 gave no answer in 3 s", "_hang_on"),
        (_die_on, "rank 1 died with exit code 3", ""),
        (_fail_on, "only rank 1 failed: KeyError: 'only rank 1'", "rank 1 of 2"),
    ],
    ids=["hangs", "dies", "fails alone"],
)
def test_all_kept_ranks_are_ended_if_one_is_lost(
    function: Callable[..., Any], reason: str, detail: str, ranks: Ranks
) -> None:
    processes = ranks.call(_process_id, timeout_s=60)
    assert isinstance(processes, list)
    with pytest.raises(RanksLost, match=reason) as caught:
        ranks.call(function, 1, timeout_s=3)
    assert detail in caught.value.__notes__[0]
    assert not any(psutil.pid_exists(pid) for pid in processes)
