"""The error of gradients on vocabulary shards relative to those of the whole vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, cat


def largest_error(every: Sequence[Sequence[Tensor]], expected: Sequence[Tensor]) -> float:
    """Largest error of an element, divided by the largest element. Padding must have no gradient.

    `every`: the gradients [..., W] of each rank; `expected`: the same whole, [..., V] in float64.
    """
    largest = max(float(gradient.abs().max()) for gradient in expected)
    errors = []
    for parts, gradient in zip(zip(*every, strict=True), expected, strict=True):
        whole, vocabulary = cat(parts, dim=-1).double(), gradient.shape[-1]
        assert not whole[..., vocabulary:].any(), "padding has no gradient"
        errors.append(float((whole[..., :vocabulary] - gradient).abs().max()) / largest)
    return max(errors)
