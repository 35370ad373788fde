"""A cell of the matrix (one experiment), and the plan of the cells of a run.

`matrix` runs them. Invariant: the plan depends only on its arguments and not on the machine. Cells that cannot run are
reported, not left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from tropd_mcore.conformance.cases import Conditions
from tropd_mcore.conformance.entries import Entry
from tropd_mcore.conformance.layouts import ALL_LAYOUTS, LAYOUTS, MEGATRON_LAYOUTS, CaseLayout

Form = Literal["fused", "logits"]
Schedule = Literal["whole", "chunks", "overlap"]
"""All tokens at once; or micro-batches of unequal size, one of them empty, in chunks of a few tokens; or the same with
the next chunk's logits made while this one's all-reduce runs."""

Settings = tuple[str, Form, str, str, str, Schedule]
"""(dtype, form, mode, layout, scaling, schedule)"""

FORMS: tuple[Form, ...] = ("fused", "logits")
MODES = ("deferred", "folded", "recompute")
BACKENDS = ("eager", "compile", "triton")
DTYPES = ("float64", "float32", "bfloat16")
SCALINGS = {"plain": (1.0, None), "scaled": (0.8, 6.0)}
"""(temperature, softcap)"""
PROBES = ("log_prob", "entropy", "tropd", "gkd/rkl-tail", "gkd/rkl-full", "rethinking/union")
"""Objectives that together use everything a backend computes: the dense part alone, with entropy, with few and many
candidates, with a divergence over the whole vocabulary."""


@dataclass(frozen=True)
class Cell:
    """One experiment, with everything that a rank needs to know."""

    objective: str
    """name in the catalogue"""
    layout: str
    dtype: str
    scaling: str = "plain"
    backend: str = "eager"
    form: Form = "logits"
    mode: str = "deferred"
    """when the weight gradient is multiplied by the factor of the backward pass (loss.weight_gradient)"""
    schedule: Schedule = "whole"
    peer: str | None = None
    """`module:function` of a peer's loss; None: ours"""

    @property
    def configuration(self) -> str:
        """Everything but the objective and the dtype, in words."""
        if self.peer is not None:
            return f"{self.layout} {self.scaling}"
        return f"{self.backend} {self.form}/{self.mode} {self.layout} {self.scaling} {self.schedule}"

    @property
    def divided(self) -> CaseLayout:
        """The layout."""
        return ALL_LAYOUTS[self.layout]

    def conditions(self) -> Conditions:
        """The inputs."""
        temperature, softcap = SCALINGS[self.scaling]
        return Conditions(
            dtype=self.dtype,
            shape="megatron" if self.divided.megatron else "small",
            temperature=temperature,
            softcap=softcap,
            weighted=self.peer is None or self.scaling == "scaled",
            hostile=self.peer is None,
        )


QUICK: tuple[Settings, ...] = (
    ("float64", "fused", "deferred", "tp1", "plain", "whole"),
    ("float64", "fused", "deferred", "tp2-padded", "scaled", "chunks"),
    ("float64", "fused", "folded", "tp3-uneven", "plain", "overlap"),
    ("float64", "fused", "recompute", "tp2-uneven", "scaled", "chunks"),
    ("float64", "logits", "deferred", "tp2-padded", "plain", "chunks"),
    ("float64", "logits", "folded", "tp1-padded", "scaled", "chunks"),
    ("float64", "logits", "recompute", "tp3-padding-only", "scaled", "chunks"),
    ("float32", "fused", "deferred", "tp2-uneven", "scaled", "overlap"),
    ("float32", "logits", "deferred", "tp3-padding-only", "plain", "chunks"),
    ("bfloat16", "fused", "folded", "tp2-padded", "plain", "chunks"),
    ("bfloat16", "logits", "deferred", "tp2-uneven", "scaled", "whole"),
)
"""Each value of each setting occurs, combined with several values of the others."""
QUICK_PROBES: tuple[Settings, ...] = (
    ("float64", "fused", "deferred", "tp2-padded", "scaled", "chunks"),
    ("float32", "fused", "folded", "tp2-uneven", "plain", "overlap"),
    ("float32", "logits", "recompute", "tp2-padded", "scaled", "chunks"),
    ("bfloat16", "fused", "deferred", "tp2-uneven", "plain", "chunks"),
    ("bfloat16", "logits", "deferred", "tp2-padded", "scaled", "whole"),
)
"""The same of the backends other than eager"""
BACKEND_LAYOUTS = ("tp1", "tp2-padded", "tp3-uneven")
"""Layouts of the backends other than eager in a full run; a backend sees only its shard"""
QUICK_MEGATRON: tuple[Settings, ...] = (
    ("float32", "fused", "folded", "megatron-tp2-sp", "plain", "chunks"),
    ("float32", "fused", "deferred", "megatron-cp2", "scaled", "overlap"),
    ("float32", "logits", "deferred", "megatron-tp2", "scaled", "chunks"),
    ("bfloat16", "fused", "recompute", "megatron-tp2-sp", "scaled", "chunks"),
)
"""The same at the end of a Megatron model"""
PEER_QUICK: tuple[tuple[str, str, str], ...] = (
    ("float64", "tp1", "plain"),
    ("float64", "tp2-padded", "plain"),
    ("float64", "tp2-uneven", "scaled"),
    ("float64", "tp3-uneven", "plain"),
    ("float64", "tp3-padding-only", "scaled"),
    ("float32", "tp2-padded", "plain"),
    ("bfloat16", "tp2-padded", "plain"),
)
"""(dtype, layout, scaling) of a peer's loss, which is given logits"""


def plan_ours(entries: tuple[Entry, ...], *, full: bool) -> list[Cell]:
    """Return the cells of our loss.

    quick: the eager backend on every objective, the other backends and the Megatron model on the probes. full: every
    combination of dtype, form, mode, layout and scaling for the eager backend and, on the probes, the Megatron model;
    of dtype, form, scaling and some layouts for the other backends on the probes; a few for these on every objective.
    """
    cells: list[Cell] = []
    for entry in entries:
        probe = entry.name in PROBES
        plans: list[tuple[str, Iterable[Settings]]] = [("eager", _everything(LAYOUTS, MODES) if full else QUICK)]
        if full or probe:
            deep = full and probe
            some = QUICK_PROBES if probe else QUICK_PROBES[1:4:2]
            plans += [(name, _everything(BACKEND_LAYOUTS, MODES[:1]) if deep else some) for name in BACKENDS[1:]]
            plans.append(("eager", _everything(MEGATRON_LAYOUTS, MODES) if deep else QUICK_MEGATRON))
        for backend, settings in plans:
            for dtype, form, mode, layout, scaling, schedule in settings:
                cell = Cell(entry.name, layout, dtype, scaling, backend, form, mode, schedule)
                if _exists(cell, entry):
                    cells.append(cell)
    return cells


def plan_peer(peer: str, entries: tuple[Entry, ...], *, full: bool) -> list[Cell]:
    """Return the cells of a peer's loss."""
    settings = itertools.product(DTYPES, LAYOUTS, SCALINGS) if full else PEER_QUICK
    chosen = list(settings)
    return [
        Cell(entry.name, layout, dtype, scaling, peer=peer) for entry in entries for dtype, layout, scaling in chosen
    ]


def _everything(layouts: Iterable[str], modes: Iterable[str]) -> Iterator[Settings]:
    """Yield every combination, with the schedules in turn."""
    turns: Iterator[Schedule] = itertools.cycle(("chunks", "overlap", "chunks", "whole", "chunks"))
    for dtype, form, mode, layout, scaling in itertools.product(DTYPES, FORMS, modes, layouts, SCALINGS):
        schedule = next(turns)
        yield dtype, form, mode, layout, scaling, "chunks" if form == "logits" and schedule == "overlap" else schedule


def _exists(cell: Cell, entry: Entry) -> bool:
    """Whether the combination is possible. A divergence over the whole vocabulary is computed in the forward pass, not
    with `recompute`, and the Megatron model here has no teacher for it. Megatron builds no model in float64."""
    if cell.divided.megatron:
        return cell.dtype != "float64" and entry.objective.full_vocabulary_divergence is None
    return not (cell.mode == "recompute" and (entry.objective.full_vocabulary_divergence is not None))
