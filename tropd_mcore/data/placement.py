"""Assigns samples to packs and packs to data-parallel ranks: bin packing on lengths alone.

This module has no tensors (see `packing`). Invariants: the same lengths give the same result everywhere. No pack
exceeds the budget. Every rank gets the same number of packs.
"""

from __future__ import annotations


def bin_pack(lengths: list[int], *, budget: int, ranks: int, multiple: int = 1) -> list[list[list[int]]]:
    """Return, for each rank, its packs, each the ascending list of the samples (indices into `lengths`) in it.

    First-fit decreasing finds the number of packs of `budget` tokens that are needed. The number is rounded up, so
    every rank gets the same number of packs, a multiple of `multiple` and at least `multiple`. Then the samples are
    spread evenly over the packs, because the longest pack of the step determines its cost. No length may exceed the
    budget.
    """
    assert not lengths or max(lengths) <= budget, f"sample of {max(lengths)} tokens over the budget {budget}"
    order = sorted(range(len(lengths)), key=lambda sample: (-lengths[sample], sample))
    packs = _first_fit(lengths, order, budget)
    group = ranks * multiple
    count = max(1, -(-len(packs) // group)) * group
    packs = _spread(lengths, order, budget, count) or packs + [[] for _ in range(count - len(packs))]
    return _distribute(lengths, [sorted(samples) for samples in packs], ranks)


def _first_fit(lengths: list[int], order: list[int], budget: int) -> list[list[int]]:
    packs: list[list[int]] = []
    loads: list[int] = []
    for sample in order:
        fitting = (pack for pack, load in enumerate(loads) if load + lengths[sample] <= budget)
        pack = next(fitting, len(packs))
        if pack == len(packs):
            packs.append([])
            loads.append(0)
        packs[pack].append(sample)
        loads[pack] += lengths[sample]
    return packs


def _spread(lengths: list[int], order: list[int], budget: int, count: int) -> list[list[int]] | None:
    """Put samples, longest first, into the emptiest of `count` packs; None if a pack would exceed the budget."""
    packs: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for sample in order:
        pack = min(range(count), key=loads.__getitem__)
        if loads[pack] + lengths[sample] > budget:
            return None
        packs[pack].append(sample)
        loads[pack] += lengths[sample]
    return packs


def _distribute(lengths: list[int], packs: list[list[int]], ranks: int) -> list[list[list[int]]]:
    """Give packs, heaviest first, to the rank with the fewest tokens among those that still need packs."""
    each = len(packs) // ranks
    dealt: list[list[list[int]]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for samples in sorted(packs, key=lambda samples: (-sum(lengths[sample] for sample in samples), samples)):
        rank = min((rank for rank in range(ranks) if len(dealt[rank]) < each), key=loads.__getitem__)
        dealt[rank].append(samples)
        loads[rank] += sum(lengths[sample] for sample in samples)
    return dealt
