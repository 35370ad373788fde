"""Runs cells: ranks compute, this process judges.

Cells of one world size share one set of processes, which is replaced if a cell breaks it. `cells` makes the plan,
`oracle` computes the correct results, `report` prints. Invariant: every cell of the plan has one result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import torch
import torch.distributed as dist

from tropd_mcore.conformance.cases import Conditions, make_batch
from tropd_mcore.conformance.cells import Cell
from tropd_mcore.conformance.entries import BY_NAME
from tropd_mcore.conformance.judge import Error, judge
from tropd_mcore.conformance.machine import environment_of, not_runnable, truncates
from tropd_mcore.conformance.oracle.truth import Truth, evaluate
from tropd_mcore.conformance.our_loss import Answer, run_ours
from tropd_mcore.conformance.peer_run import run_peer
from tropd_mcore.conformance.peers import PeerMissing, load_peer
from tropd_mcore.conformance.ranks import Failure, Ranks, RanksLost
from tropd_mcore.errors import TropdError

CELL_LIMIT_S = 180.0
"""Long, because the first cell of a compiled backend builds its kernels"""
PEER_LIMIT_S = 60.0
"""Long, because the first cell of a peer imports it"""
LOST_SETS = 3
"""Sets of processes that one subject may lose before the rest of its cells is given up"""
TELL_EVERY_S = 30.0
LEAST_MARGIN = 1e-4
"""Closer comparisons could come out differently in float32"""

Status = Literal["ok", "miss", "-", "not run"]


@dataclass(frozen=True)
class Result:
    """The result of a cell: within tolerance (ok), a miss, not claimed by its subject (-), or not run."""

    cell: Cell
    status: Status
    errors: dict[str, Error] = field(default_factory=dict)
    reason: str = ""
    """for a miss without numbers and for a cell that was not run"""
    traceback: str = ""
    """of the subject's exception, and the stacks of ranks that hung"""


def run(cells: list[Cell], device: str, say: Callable[[str], None]) -> list[Result]:
    """Return the results in the order of the plan. `say` receives progress lines.

    Raises TropdError if `device` is cuda and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise TropdError("tropd conformance: --device cuda, but PyTorch finds no CUDA device; use --device cpu")
    results: dict[Cell, Result] = {}
    runnable: dict[tuple[int, bool, tuple[tuple[str, str], ...]], list[Cell]] = {}
    for cell in cells:
        ruled_out = _ruled_out(cell, device)
        if ruled_out is not None:
            results[cell] = ruled_out
        else:
            # Megatron's CPU platform changes the process for other cells, so Megatron's cells have separate ranks.
            environment = tuple(sorted(environment_of(cell, device).items()))
            runnable.setdefault((cell.divided.world_size, cell.divided.megatron, environment), []).append(cell)
    for (world_size, megatron, environment), unsorted in sorted(runnable.items()):
        # Sorted by layout, because a process keeps the groups of every layout it has run, with their threads.
        group = sorted(unsorted, key=lambda cell: (cell.layout, cell.dtype))
        words = ["Megatron"] * megatron + [f"{name}={value}" for name, value in environment]
        say(" ".join([f"{len(group)} cells on {world_size} ranks", *words]))
        told = time.monotonic()
        for done, result in enumerate(_run_group(group, world_size, dict(environment), device), start=1):
            results[result.cell] = result
            if time.monotonic() - told > TELL_EVERY_S:
                told = time.monotonic()
                say(f"  {done} of {len(group)}, {sum(found.status == 'miss' for found in results.values())} missed")
    return [results[cell] for cell in cells]


def _ruled_out(cell: Cell, device: str) -> Result | None:
    """The result of a cell that is known without running it; None if it must run."""
    if cell.peer is not None:
        try:
            _, coverage = load_peer(cell.peer)
        except PeerMissing as error:
            return Result(cell, "not run", reason=str(error))
        layout = cell.divided
        features = {
            "padding": layout.padded,
            "uneven": layout.uneven,
            "temperature": cell.conditions().temperature != 1.0,
            "softcap": cell.conditions().softcap is not None,
            "weights": cell.conditions().weighted,
        }
        declined = any(present and name in coverage.without for name, present in features.items())
        if declined or cell.dtype not in coverage.dtypes or not coverage.objective(cell.objective):
            return Result(cell, "-")
        return None
    reason = not_runnable(cell, device)
    return Result(cell, "not run", reason=reason) if reason else None


def _run_group(cells: list[Cell], world_size: int, environment: dict[str, str], device: str) -> Iterator[Result]:
    """Run the cells of one world size, with as many sets of processes as needed."""
    lost: dict[str | None, int] = {}
    ranks: Ranks | None = None
    try:
        for cell in cells:
            if lost.get(cell.peer, 0) >= LOST_SETS:
                yield Result(cell, "not run", reason=f"{LOST_SETS} sets of processes were lost before")
                continue
            try:
                ranks = ranks or Ranks(world_size, environment)
                timeout_s = CELL_LIMIT_S if cell.peer is None else PEER_LIMIT_S
                answers = ranks.call(run_on_rank, cell, device, timeout_s=timeout_s)
            except RanksLost as error:
                lost[cell.peer] = lost.get(cell.peer, 0) + 1
                if ranks is not None:
                    ranks.close()
                ranks = None
                yield Result(cell, "miss", reason=str(error), traceback="\n".join(error.__notes__))
                continue
            yield judged(cell, device, answers)
    finally:
        if ranks is not None:
            ranks.close()


def run_on_rank(cell: Cell, device: str) -> Answer:
    """Run a cell; called on every rank."""
    place = torch.device("cpu")
    if device == "cuda":
        place = torch.device("cuda", dist.get_rank() % torch.cuda.device_count())
    entry = BY_NAME[cell.objective]
    if cell.peer is not None:
        return run_peer(cell, entry, place)
    if cell.divided.megatron:
        from tropd_mcore.conformance.megatron import run_megatron  # Megatron takes seconds to import

        return run_megatron(cell, entry)
    return run_ours(cell, entry, place)


def judged(cell: Cell, device: str, answers: list[Answer] | Failure) -> Result:
    """Return the result of a cell that was run, from its ranks' answers or the failure common to all of them."""
    if isinstance(answers, Failure):
        status: Status = "not run" if answers.kind == PeerMissing.__name__ else "miss"
        return Result(cell, status, reason=answers.summary, traceback=answers.detail)
    conditions = cell.conditions()
    truth = _truth(cell.objective, cell.form, conditions)
    errors = judge(answers, truth, make_batch(conditions), cell, truncates=truncates(cell, device))
    return Result(cell, "ok" if all(error.ok for error in errors.values()) else "miss", errors)


@lru_cache(maxsize=64)
def _truth(objective: str, form: str, conditions: Conditions) -> Truth:
    """The truth of a case. Asserts that its comparisons are not too close for float32."""
    entry = BY_NAME[objective]
    truth = evaluate(entry.objective, make_batch(conditions), entry.progress, "fused" if form == "fused" else "logits")
    assert conditions.dtype == "float64" or truth.decisions.margin > LEAST_MARGIN, (
        f"{objective}: two numbers of the case {conditions} are compared that differ by {truth.decisions.margin:g}"
    )
    return truth
