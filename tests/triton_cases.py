"""Logits, supports and shards for the tests of the Triton kernels, and the expected results of both passes.

This is not a test. Shapes: T tokens (3), V vocabulary (101), J support ids (16), W width of one shard.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests import oracles
from tropd_mcore.kernel.backend import Backend, RowGradient
from tropd_mcore.kernel.eager import EagerBackend
from tropd_mcore.kernel.shard import Scaling, VocabShard
from tropd_mcore.kernel.triton_backend import TritonBackend

TOKENS, VOCABULARY = 3, 101
DISTINCT = (1, 9, 6)
"""Runs of the support; ids of different runs may be equal."""
BLOCK = 32
"""Columns per block: most shards have several blocks and a partial one."""
LAYOUTS = {
    "whole": (0, 101),
    "padded": (0, 112),
    "uneven": (0, 60, 104),
    "support-wider-than-shard": (0, 50, 57, 104),
    "padding-only-shard": (0, 64, 101, 140),
    "empty-shard": (0, 101, 101, 105),
}
"""Shard borders; columns from 101 on are padding."""


@dataclass(frozen=True)
class Case:
    logits_TV: Tensor
    """padded"""
    ids_TJ: Tensor
    grad_logp_TJ: Tensor
    grad_entropy_T: Tensor | None
    borders: tuple[int, ...]
    scaling: Scaling
    unique_run_lengths: tuple[int, ...] = DISTINCT
    output: torch.dtype | None = None
    """None: over the logits; a narrower dtype: over the first bytes of their rows"""
    with_dense: bool = False
    block: int = BLOCK


@dataclass(frozen=True)
class Passes:
    """The results of a backend for all shards: [shards, T, 3], [shards, T, J] and, side by side, [T, V]."""

    stats: np.ndarray
    support: np.ndarray
    gradient_TV: Tensor


def make_case(layout: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Case:
    """Random rows. Unused slots are -1. Padding logits are 50, which would take all the probability."""
    random = torch.Generator().manual_seed(3)
    borders = LAYOUTS[layout]
    logits_TV = 4.0 * torch.randn(TOKENS, VOCABULARY, generator=random, dtype=torch.float64)
    padding = torch.full((TOKENS, borders[-1] - VOCABULARY), 50.0, dtype=torch.float64)
    runs = [[torch.randperm(VOCABULARY, generator=random)[:run] for run in DISTINCT] for _ in range(TOKENS)]
    for first, second, third in runs:
        second[4], third[2] = first[0], first[0]  # an id in all three runs,
        third[5] = second[7]  # and one in two
    ids_TJ = torch.stack([torch.cat(row) for row in runs])
    ids_TJ[1::2, -4:] = -1
    grad_logp_TJ = torch.randn(ids_TJ.shape, generator=random, dtype=torch.float64).masked_fill(ids_TJ == -1, 0.0)
    grad_entropy_T = torch.randn(TOKENS, generator=random, dtype=torch.float64)
    case = Case(
        torch.cat([logits_TV, padding], dim=1).to(dtype), ids_TJ, grad_logp_TJ, grad_entropy_T, borders, Scaling(0.7)
    )
    return replace(case, **changes)


def passes(case: Case, backend_name: str, mutation: tuple[str, str] | None = None) -> Passes:
    """Both passes over each shard. `triton` needs a process with Triton's interpreter. mutation: (right, wrong)."""
    if backend_name == "eager":
        return passes_of(EagerBackend(), case)
    backend = TritonBackend(block_columns=case.block)
    if mutation is None:
        return passes_of(backend, case)
    with mutant_kernels(*mutation) as kernels:
        backend._kernels = kernels
        return passes_of(backend, case)


def passes_of(backend: Backend, case: Case) -> Passes:
    """Both passes over each shard."""
    math = torch.float64 if case.logits_TV.dtype == torch.float64 else torch.float32
    lse_T, entropy_T = (torch.from_numpy(number).to(math) for number in lse_and_entropy(case))
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for start, stop in zip(case.borders[:-1], case.borders[1:], strict=True):
        shard = VocabShard(start, stop, VOCABULARY)
        logits_TW = case.logits_TV[:, start:stop].clone()
        stats_T3, support_TJ = backend.stats_and_support(logits_TW, case.ids_TJ, shard, case.scaling)
        row = RowGradient(
            ids_CJ=case.ids_TJ,
            grad_logp_CJ=case.grad_logp_TJ.to(math),
            grad_entropy_C=case.grad_entropy_T.to(math) if case.grad_entropy_T is not None else None,
            lse_C=lse_T,
            entropy_C=entropy_T,
            unique_run_lengths=case.unique_run_lengths,
            dense_CR=dense_term(case)[:, start : start + shard.real_width].to(math) if case.with_dense else None,
        )
        out_TW = logits_TW
        if case.output is not None:
            out_TW = logits_TW.view(case.output)[:, : shard.width]
        backend.write_gradient(logits_TW, row, shard, case.scaling, out_TW)
        found.append((stats_T3, support_TJ, out_TW))
    stats, support, gradient = zip(*found, strict=True)
    return Passes(torch.stack(stats).numpy(), torch.stack(support).numpy(), torch.cat(gradient, dim=1))


def dense_term(case: Case) -> Tensor:
    """A further derivative of every real column, [T, V]."""
    columns = torch.arange(VOCABULARY, dtype=torch.float64)
    return torch.sin(columns + torch.arange(len(case.ids_TJ))[:, None])


def capped(case: Case) -> np.ndarray:
    """The real logits [T, V] after the softcap, computed from the rounded logits."""
    logits, softcap = case.logits_TV[:, :VOCABULARY].double().numpy(), case.scaling.softcap
    return logits if softcap is None else softcap * np.tanh(logits / softcap)


def lse_and_entropy(case: Case) -> tuple[np.ndarray, np.ndarray]:
    temperature = case.scaling.temperature
    lse = [row[0] / temperature - oracles.log_softmax(row, temperature)[0] for row in capped(case)]
    return np.array(lse), np.array([oracles.entropy(row, temperature) for row in capped(case)])


def oracle(case: Case) -> Passes:
    """The same from the equations, in float64."""
    scaled, stats, support = capped(case) / case.scaling.temperature, [], []
    for start, stop in zip(case.borders[:-1], case.borders[1:], strict=True):
        real = range(start, max(start, min(stop, VOCABULARY)))
        for token, row in enumerate(scaled):
            top = max((row[v] for v in real), default=-1e30)
            shifted = [row[v] - top for v in real]
            stats.append([top, sum(np.exp(x) for x in shifted), sum(np.exp(x) * x for x in shifted)])
            support.append([row[v] if v in real else 0.0 for v in case.ids_TJ[token].tolist()])
    grad_entropy = case.grad_entropy_T.numpy() if case.grad_entropy_T is not None else np.zeros(len(scaled))
    gradient = oracles.support_gradient(
        capped(case), case.ids_TJ.numpy(), case.grad_logp_TJ.numpy(), grad_entropy, case.scaling.temperature
    )
    if case.with_dense:
        gradient = gradient + dense_term(case).numpy() / case.scaling.temperature
    if case.scaling.softcap is not None:
        gradient = gradient * (1.0 - (capped(case) / case.scaling.softcap) ** 2)
    padding = np.zeros((len(gradient), case.borders[-1] - VOCABULARY))
    shards = len(case.borders) - 1
    return Passes(
        np.array(stats).reshape(shards, len(scaled), 3),
        np.array(support).reshape(shards, *case.ids_TJ.shape),
        torch.from_numpy(np.concatenate([gradient, padding], axis=1)),
    )


def assert_close(actual: Passes, expected: Passes, tolerance: float) -> None:
    np.testing.assert_allclose(actual.stats, expected.stats, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(actual.support, expected.support, rtol=tolerance, atol=tolerance)
    gradient, right = actual.gradient_TV.double().numpy(), expected.gradient_TV.double().numpy()
    np.testing.assert_allclose(gradient, right, rtol=tolerance, atol=tolerance)
    assert not gradient[:, VOCABULARY:].any(), "padding columns have a gradient"


@contextmanager
def mutant_kernels(right: str, wrong: str) -> Iterator[ModuleType]:
    """The kernels' module with `right`, which occurs once, replaced by `wrong`. Its source file exists as long."""
    source = Path(str(TritonBackend()._kernels.__file__)).read_text(encoding="utf-8")
    assert source.count(right) == 1, f"the kernels have {source.count(right)} times {right!r}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "mutant_triton_kernels.py")
        path.write_text(source.replace(right, wrong), encoding="utf-8")
        spec = spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
