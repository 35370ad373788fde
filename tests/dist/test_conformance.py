"""`tropd conformance` detects planted faults, hung ranks and dead ranks, and passes correct losses."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.dist.conformance_peers import run_cells
from tests.ranks import run_on_ranks
from tropd_mcore.cli import main as cli
from tropd_mcore.conformance import matrix
from tropd_mcore.conformance.cells import QUICK, Cell, plan_ours, plan_peer
from tropd_mcore.conformance.entries import ENTRIES, select
from tropd_mcore.conformance.matrix import Result
from tropd_mcore.conformance.peers import load_peer

PEERS = "tests.dist.conformance_peers"
FAULTS = {
    "sampled_token_lost": True,
    "teacher_mass_taken_for_one": True,
    "padding_in_the_softmax": False,
    "gradient_times_ranks": True,
    "tail_lost": False,
    "duplicates_overwrite": True,
}
"""Fault -> whether the value of the loss is still right"""


def judged(cells: list[Cell], world_size: int) -> list[Result]:
    """The results of cells of one world size, by the ranks of the test session."""
    answers = run_on_ranks(run_cells, world_size, cells)
    by_cell = zip(cells, zip(*answers, strict=True), strict=True)
    return [matrix.judged(cell, "cpu", list(of_ranks)) for cell, of_ranks in by_cell]


def claimed(name: str, dtype: str = "float64") -> list[Cell]:
    """The cells on two ranks that a peer claims, of one dtype."""
    peer = f"{PEERS}:{name}"
    _, coverage = load_peer(peer)
    return [
        cell
        for cell in plan_peer(peer, ENTRIES, full=False)
        if coverage.objective(cell.objective) and cell.divided.tensor == 2 and cell.dtype == dtype
        if not (cell.divided.uneven and "uneven" in coverage.without)
    ]


def test_a_correct_peer_has_no_miss() -> None:
    results = judged([*claimed("honest"), *claimed("honest", "float32"), *claimed("honest", "bfloat16")], 2)
    assert [result for result in results if result.status != "ok"] == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_a_miss(fault: str) -> None:
    missed = [result for result in judged(claimed(fault), 2) if result.status == "miss"]
    plain = next(result for result in missed if result.cell.scaling == "plain")
    assert not plain.errors["logits"].ok
    assert plain.errors["loss"].ok == FAULTS[fault]
    if fault == "gradient_times_ranks":
        assert plain.errors["logits"].factor == pytest.approx(2.0)


@pytest.mark.parametrize("kind", ["tropd", "rethinking/union", "gkd/jsd-full", "iw_opd"])
def test_our_loss_has_no_miss_on_two_ranks(kind: str) -> None:
    cells = [
        cell
        for cell in plan_ours(select((kind,)), full=False)
        if cell.backend == "eager" and cell.divided.world_size == 2 and not cell.divided.megatron
    ]
    assert len(cells) >= len([settings for settings in QUICK if settings[3].startswith("tp2")]) - 1
    assert [result for result in judged(cells, 2) if result.status != "ok"] == []


@pytest.mark.slow
def test_the_command_exits_with_1_and_names_each_planted_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "found.json"
    arguments = [text for fault in FAULTS for text in ("--peer", f"{PEERS}:{fault}")]
    assert cli.main(["conformance", "--dtype", "float64", "--json", str(document), *arguments]) == 1
    cells = json.loads(document.read_text())["cells"]
    missed = Counter(cell["peer"] for cell in cells if cell["status"] == "miss")
    assert set(missed) == {f"{PEERS}:{fault}" for fault in FAULTS}
    assert "2 x the truth, cosine 1.0000" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_exits_with_0_for_a_correct_peer_and_with_2_if_nothing_ran() -> None:
    assert cli.main(["conformance", "--peer", f"{PEERS}:honest"]) == 0
    nothing_claimed = ["--objective", "jsd", "--peer", f"{PEERS}:honest"]
    assert cli.main(["conformance", *nothing_claimed]) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "text", "detail"),
    [
        ("hangs_on_rank_1", "no answer in 20 s", "in hangs_on_rank_1"),
        ("dies_on_rank_1", "rank 1 died with exit code 3", ""),
        ("raises_on_rank_1", "only rank 1 failed: ArithmeticError: rank 1 alone", "in raises_on_rank_1"),
    ],
)
def test_lost_ranks_count_as_a_miss_and_the_remaining_cells_still_run(
    name: str, text: str, detail: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "hangs_on_rank_1":
        monkeypatch.setattr(matrix, "PEER_LIMIT_S", 20.0)  # enough time for the correct peer, even on a busy machine
    monkeypatch.setattr(matrix, "LOST_SETS", 1)
    results = matrix.run([*claimed("honest")[:1], *claimed(name)], "cpu", lambda _: None)
    assert [result.status for result in results] == ["ok", "miss", "not run"]
    assert text in results[1].reason and detail in results[1].traceback


@pytest.mark.slow
def test_a_peer_that_always_raises_is_a_miss_and_one_that_is_not_installed_is_not_run() -> None:
    cells = [*claimed("raises")[:1], *claimed("is_not_installed")[:1], *claimed("honest")[:1]]
    results = matrix.run(cells, "cpu", lambda _: None)
    assert [result.status for result in results] == ["miss", "not run", "ok"]
    assert results[0].reason == "ArithmeticError: everywhere"
    assert "SOME_ROOT" in results[1].reason


@pytest.mark.slow
def test_our_loss_has_no_miss_at_the_end_of_a_megatron_model() -> None:
    cells = [cell for cell in plan_ours(select(("tropd", "log_prob")), full=False) if cell.divided.megatron]
    assert {cell.divided.name for cell in cells} == {"megatron-tp2", "megatron-tp2-sp", "megatron-cp2"}
    assert [result for result in matrix.run(cells, "cpu", lambda _: None) if result.status != "ok"] == []
