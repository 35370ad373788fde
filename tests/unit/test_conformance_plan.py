"""The runs and options of `tropd conformance`: the plan, the names of objectives, the declaration of a peer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import get_args

import pytest

from tropd_mcore.cli import main as cli
from tropd_mcore.config.schema import LossConfig
from tropd_mcore.conformance import machine
from tropd_mcore.conformance.cases import SHAPES, Conditions, make_batch
from tropd_mcore.conformance.cells import BACKENDS, DTYPES, FORMS, MODES, PROBES, SCALINGS, Cell, plan_ours, plan_peer
from tropd_mcore.conformance.entries import ENTRIES, TOPK, select
from tropd_mcore.conformance.layouts import LAYOUTS, MEGATRON_LAYOUTS
from tropd_mcore.conformance.peers import Feature, covers, load_peer
from tropd_mcore.errors import TropdError

PEERS = "tests.dist.conformance_peers"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["conformance", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_matrix_has_every_form_mode_and_backend_of_the_configuration() -> None:
    fields = LossConfig.model_fields
    assert set(FORMS) == set(get_args(fields["form"].annotation))
    assert set(MODES) == set(get_args(fields["weight_gradient"].annotation))
    assert {*BACKENDS, "auto"} == set(get_args(fields["backend"].annotation))


@pytest.mark.parametrize("full", [False, True])
def test_the_plan_has_every_value_of_every_dimension_for_every_objective(full: bool) -> None:
    cells = plan_ours(ENTRIES, full=full)
    assert len(cells) == len(set(cells))
    for entry in ENTRIES:
        mine = [cell for cell in cells if cell.objective == entry.name]
        assert {cell.dtype for cell in mine} == set(DTYPES)
        assert {cell.form for cell in mine} == set(FORMS)
        assert {cell.layout for cell in mine} >= set(LAYOUTS)
        assert {cell.scaling for cell in mine} == set(SCALINGS)
        assert {cell.schedule for cell in mine} == {"whole", "chunks", "overlap"}
        if full or entry.name in PROBES:
            assert {cell.backend for cell in mine} == set(BACKENDS)
    in_megatron = {cell.layout for cell in cells} & set(MEGATRON_LAYOUTS)
    assert len(in_megatron) == (len(MEGATRON_LAYOUTS) if full else 3)


def test_the_border_ids_of_the_cases_are_the_shard_borders_of_the_layouts() -> None:
    for shape, layouts in ((SHAPES["small"], LAYOUTS), (SHAPES["megatron"], MEGATRON_LAYOUTS)):
        edges = set()
        for layout in layouts.values():
            for cut in layout.cuts:
                edges |= {cut - 1, cut}
        last = shape.vocabulary - 1
        assert set(shape.border_ids) == {edge for edge in edges if 0 <= edge <= last} | {last}
        assert max(layout.cuts[-1] for layout in layouts.values()) == shape.columns


def test_some_layout_has_a_shard_narrower_than_the_top_k_and_some_a_shard_of_padding_only() -> None:
    widths = [
        min(stop, SHAPES["small"].vocabulary) - start
        for layout in LAYOUTS.values()
        for start, stop in zip(layout.cuts, layout.cuts[1:], strict=False)
    ]
    assert min(width for width in widths if width > 0) < TOPK
    assert min(widths) <= 0


def test_a_conformance_case_contains_masks_padding_overlaps_and_both_signs_of_the_log_ratio() -> None:
    tokens = make_batch(Conditions()).tokens
    counted = tokens.student_mask_T | tokens.prefix_mask_T
    assert (
        tokens.student_mask_T.any()
        and tokens.prefix_mask_T.any()
        and not (tokens.student_mask_T & tokens.prefix_mask_T).any()
    )
    assert tokens.teacher_logp_T[~counted].isnan().all() and not tokens.teacher_logp_T[counted].isnan().any()
    inside = (tokens.topk_ids_TK == tokens.target_ids_T[:, None]).any(dim=1)
    assert inside.any() and not inside.all()
    assert (tokens.topk_ids_TK[counted] == -1).any()
    own_in_topk = (tokens.own_ids_TL[:, :, None] == tokens.topk_ids_TK[:, None, :]).any()
    assert own_in_topk
    log_ratio = (tokens.teacher_logp_T - tokens.old_logp_T)[counted]
    assert (log_ratio > 0).any() and (log_ratio < 0).any()
    for name in ("topk_ids_TK", "own_ids_TL"):
        for row in getattr(tokens, name).tolist():
            real = [vocabulary_id for vocabulary_id in row if vocabulary_id >= 0]
            assert len(real) == len(set(real)), name


def test_select_accepts_kinds_names_and_patterns() -> None:
    assert {entry.name for entry in select(("reopold",))} == {
        "reopold",
        "reopold/stage-1-of-2",
        "reopold/stage-2-of-2",
    }
    assert [entry.name for entry in select(("lsm/clipped",))] == ["lsm/clipped"]
    assert [entry.name for entry in select(("gkd/*-full",))] == ["gkd/fkl-full", "gkd/rkl-full", "gkd/jsd-full"]
    assert select(()) == ENTRIES
    with pytest.raises(KeyError):
        select(("opd", "nothing"))


def test_a_cell_that_cannot_run_here_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell("opd", "tp1", "float64")
    assert machine.not_runnable(cell, "cpu") is None
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert "triton is not installed" in str(machine.not_runnable(dataclasses.replace(cell, backend="triton"), "cpu"))
    assert "C++ compiler" in str(machine.not_runnable(dataclasses.replace(cell, backend="compile"), "cpu"))


def test_the_declared_coverage_of_a_peer_limits_its_cells() -> None:
    function, coverage = load_peer(f"{PEERS}:honest")
    assert callable(function)
    assert coverage.objective("gkd/fkl-tail") and not coverage.objective("gkd/fkl-renorm")
    assert load_peer(f"{PEERS}:padding_in_the_softmax")[1].without == {"uneven"}
    with pytest.raises(AssertionError, match="unknown features"):
        covers("opd", without=("colour",))  # type: ignore[arg-type]
    assert {cell.peer for cell in plan_peer("a:b", ENTRIES, full=False)} == {"a:b"}
    assert set(get_args(Feature)) == {"padding", "temperature", "softcap", "weights", "uneven"}


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("no_such_module:loss", "cannot import no_such_module"),
        (f"{PEERS}:no_such_function", "has no function 'no_such_function'"),
        (f"{PEERS}:undeclared", "declares no objectives"),
    ],
)
def test_a_peer_that_cannot_be_used_is_named(path: str, problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TropdError, match=problem):
        load_peer(path)
    code, _, errors = run(capsys, "--peer", path)
    assert code == 2
    assert problem in errors


def test_the_command_lists_the_objectives_and_refuses_a_selection_that_matches_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, _ = run(capsys, "--list")
    assert (code, out.split()) == (0, [entry.name for entry in ENTRIES])
    code, _, errors = run(capsys, "--objective", "opd/nothing")
    assert (code, errors.count("\n")) == (2, 1)
    assert "--objective opd/nothing names nothing" in errors
    code, _, errors = run(capsys, "--objective", "gkd/fkl-full", "--backend", "compile", "--tp", "1")
    assert code == 2
    assert "leave no cell" in errors


def test_the_documentation_states_the_sizes_of_the_plans() -> None:
    text = (Path(__file__).parents[2] / "docs" / "conformance.md").read_text(encoding="utf-8")
    sizes = [
        f"{len(plan_ours(ENTRIES, full=False))} cells",
        f"{len(plan_ours(ENTRIES, full=True)):,} cells",
        f"{len(ENTRIES)} rows",
    ]
    assert [size for size in sizes if size not in text] == [], "docs/conformance.md lacks these"


@pytest.mark.slow
def test_the_command_prints_json_of_one_objective(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, errors = run(capsys, "--objective", "opd", "--tp", "1", "--dtype", "float64", "--json", "-")
    document = json.loads(out)
    assert code == 0
    assert document["totals"] == {"ok": len(document["cells"])}
    assert "0 missed" in errors
