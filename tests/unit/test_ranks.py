"""The rank harness itself: results by rank, failures with their rank, hangs bounded."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_on_ranks


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


def _exit() -> None:
    os._exit(3)


def _threads() -> tuple[int, str | None]:
    return torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")


@pytest.mark.parametrize("world_size", [1, 3, 2])
def test_results_come_by_rank_after_a_real_collective(world_size: int) -> None:
    expected = 2.0 * sum(range(1, world_size + 1))
    assert run_on_ranks(_rank_and_sum, world_size, 2.0) == [(rank, world_size, expected) for rank in range(world_size)]


def test_workers_are_kept_between_calls_and_use_one_thread() -> None:
    assert run_on_ranks(_process_id, 2) == run_on_ranks(_process_id, 2)
    assert run_on_ranks(_threads, 2) == [(1, "1")] * 2


def test_an_exception_keeps_its_type_and_names_its_rank() -> None:
    with pytest.raises(KeyError, match="only rank 1") as caught:
        run_on_ranks(_fail_on, 2, 1)
    assert any("rank 1 of 2" in note and "_fail_on" in note for note in caught.value.__notes__)


def test_the_cause_is_raised_and_not_its_consequence_on_another_rank() -> None:
    for rank in (0, 1, 2):
        with pytest.raises(KeyError, match=f"only rank {rank}"):
            run_on_ranks(_fail_on, 3, rank)


def test_a_hang_ends_at_the_timeout_with_the_stack_and_the_pool_recovers() -> None:
    """On a busy machine the ranks may not be at the place where they hang in time: then the next bound is tried."""
    for timeout_s in (3.0, 15.0, 75.0):
        run_on_ranks(_process_id, 2)  # the workers run: the timeout below is not spent on their start
        with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] of 2") as caught:
            run_on_ranks(_hang_on, 2, 1, timeout_s=timeout_s)
        if "_hang_on" in str(caught.value):
            break
    assert "_hang_on" in str(caught.value)
    assert run_on_ranks(_rank_and_sum, 2, 1.0) == [(0, 2, 3.0), (1, 2, 3.0)]


def test_a_dead_rank_is_reported_with_its_exit_code() -> None:
    with pytest.raises(RuntimeError, match="exit code 3"):
        run_on_ranks(_exit, 1)
