"""How the vocabulary and the tokens of a case are split over ranks.

Invariant: `cases.SHAPES` names the first and last real columns of every shard here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CaseLayout:
    """The split of the vocabulary over tensor ranks and of the tokens over context ranks."""

    name: str
    cuts: tuple[int, ...]
    """tensor rank r owns the columns [cuts[r], cuts[r + 1])"""
    padded: bool
    """columns beyond the vocabulary"""
    uneven: bool
    """shards of unequal width"""
    megatron: bool = False
    """run through Megatron's data-parallel wrapper, pipeline schedule and output layer, and our `mcore`"""
    sequence_parallel: bool = False
    context: int = 1
    """ranks that share the tokens of a sample"""

    @property
    def tensor(self) -> int:
        """Ranks that share the vocabulary."""
        return len(self.cuts) - 1

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.tensor * self.context


LAYOUTS = {
    layout.name: layout
    for layout in (
        CaseLayout("tp1", (0, 29), padded=False, uneven=False),
        CaseLayout("tp1-padded", (0, 32), padded=True, uneven=False),
        CaseLayout("tp2-padded", (0, 16, 32), padded=True, uneven=False),
        CaseLayout("tp2-uneven", (0, 19, 29), padded=False, uneven=True),
        CaseLayout("tp3-padding-only", (0, 16, 32, 48), padded=True, uneven=False),
        CaseLayout("tp3-uneven", (0, 11, 14, 29), padded=False, uneven=True),
    )
}
"""The loss alone."""

MEGATRON_LAYOUTS = {
    layout.name: layout
    for layout in (
        CaseLayout("megatron-tp1", (0, 256), padded=True, uneven=False, megatron=True),
        CaseLayout("megatron-tp2", (0, 128, 256), padded=True, uneven=False, megatron=True),
        CaseLayout("megatron-tp2-sp", (0, 128, 256), padded=True, uneven=False, megatron=True, sequence_parallel=True),
        CaseLayout("megatron-cp2", (0, 256), padded=True, uneven=False, megatron=True, context=2),
        CaseLayout(
            "megatron-tp2-sp-cp2",
            (0, 128, 256),
            padded=True,
            uneven=False,
            megatron=True,
            sequence_parallel=True,
            context=2,
        ),
    )
}
"""The loss at the end of a Megatron model; Megatron pads each shard to a multiple of 128."""

ALL_LAYOUTS = {**LAYOUTS, **MEGATRON_LAYOUTS}
