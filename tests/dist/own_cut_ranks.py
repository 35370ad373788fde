"""Code that the ranks of the tests of a teacher's own pipeline cut run. Not a test module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.dist.layouts import Case, layout_of, pack_for
from tropd_mcore.errors import ModelError
from tropd_mcore.mcore.model import Model, build_model
from tropd_mcore.mcore.scoring import score_micro_batches
from tropd_mcore.mcore.weights_io import load_hf
from tropd_mcore.types import Rollout
from tropd_mcore.weights.architecture import read_architecture


def scores_of(
    folder: Path, rollouts: list[Rollout], cases: dict[str, tuple[Case, tuple[int, ...] | None]], k: int
) -> dict[str, dict[str, Any]]:
    """{case: layers of each stage, log-probs and top-k of every row in the order of (sample, token)}."""
    return {name: _scores(folder, rollouts, case, stage_layers, k) for name, (case, stage_layers) in cases.items()}


def refused(folder: Path, case: Case, stage_layers: tuple[int, ...] | None) -> str:
    """The error of a cut that is impossible."""
    with layout_of(case) as (layout, platform):
        try:
            _teacher(folder, case, stage_layers, layout, platform)
        except ModelError as error:
            return str(error)
    return "built"


def _teacher(folder: Path, case: Case, stage_layers: tuple[int, ...] | None, layout: Any, platform: Any) -> Model:
    return build_model(
        read_architecture(folder), case.parallel, layout, platform, dtype=case.dtype, trainable=False,
        stage_layers=stage_layers,
    )  # fmt: skip


def _scores(
    folder: Path, rollouts: list[Rollout], case: Case, stage_layers: tuple[int, ...] | None, k: int
) -> dict[str, Any]:
    with layout_of(case) as (layout, platform):
        teacher = _teacher(folder, case, stage_layers, layout, platform)
        load_hf(teacher, folder, layout)
        packed = pack_for(rollouts, case, layout)
        found = score_micro_batches(teacher, packed.micro_batches, packed.pack_length, k=k, settings=case.settings(1.0))
        mine: dict[str, Any] = {"stage": (layout.pp_rank, sum(len(part.decoder.layers) for part in teacher.modules))}
        if layout.is_last_stage and layout.tp_rank == 0:
            batches = packed.micro_batches
            scores = [item for item in found if item is not None]
            assert len(scores) == len(batches)
            place = torch.cat([batch.sample_index_T * 10_000 + batch.token_index_T for batch in batches])
            mine["rows"] = (place, torch.cat([s.logp_T for s in scores]), torch.cat([s.topk_logp_TK for s in scores]))
        everyone: list[Any] = [None] * layout.world_size
        dist.all_gather_object(everyone, mine, group=layout.groups.control)
    place, logp, topk = (torch.cat(parts) for parts in zip(*(e["rows"] for e in everyone if "rows" in e), strict=True))
    order = torch.argsort(place)
    layers = dict(entry["stage"] for entry in everyone)
    return {"layers": [layers[stage] for stage in sorted(layers)], "logp": logp[order], "topk": topk[order]}
