"""The claims about the kernel are sharp: each fault, planted in a copy of its source, breaks one of them.

A mutant is the package with one text of one module replaced (`tests.mutants`). The loss of `dist.kernel_cases` must
then differ from its oracle on some rank by more than 1000 times the tolerance of the real kernel (1e-12, see
tests/dist/test_support_loss.py). test_mutations.py has the faults that the golden vector finds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests import oracles
from tests.dist.kernel_cases import (
    DISTINCT,
    FORMS,
    TOKENS,
    Case,
    RankResult,
    assert_equals_the_oracle,
    make_case,
    result_on_this_rank,
)
from tests.mutants import mutant_losses
from tests.ranks import run_on_ranks

FAULT = 1e-9
"""Smallest relative error that counts as detected."""


@dataclass(frozen=True)
class Mutation:
    module: str
    right: str
    """Text of the source, found exactly once"""
    wrong: str
    changes: dict[str, Any]
    """To the case"""


DEFERRED, RECOMPUTE, LOGITS = FORMS["fused, deferred"], FORMS["fused, recompute"], FORMS["logits"]
NO_ENTROPY = {**DEFERRED, "c_T": torch.zeros(TOKENS, dtype=torch.float64)}
NO_SUPPORT = torch.zeros(TOKENS, sum(DISTINCT), dtype=torch.float64)
ENTROPY_ALONE = {**LOGITS, "a_TJ": NO_SUPPORT, "b_TJ": NO_SUPPORT}
UNCHANGED = "from __future__ import annotations"
"""A text that every module has once: replaced by itself it gives a copy."""
MODULES = ("backend", "eager", "exchange", "shard", "support_log_probs", "support_loss", "gradients")
MUTATIONS = {
    "dense coefficient 1 instead of the sum over the support": Mutation(
        "eager", "row_sum_C = row.grad_logp_CJ.sum(dim=1)", "row_sum_C = row.grad_logp_CJ.sum(dim=1) * 0 + 1", DEFERRED
    ),
    "entropy term lost": Mutation("eager", "if row.grad_entropy_C is None:", "if True:", DEFERRED),
    "entropy gradient without the row sum": Mutation("eager", ".add_(row_sum_C[rows, None]).neg_()", ".neg_()", LOGITS),
    "entropy gradient lost on its way to the backend": Mutation(
        "support_loss", "grad_entropy_C=grad_entropy_C,", "grad_entropy_C=None,", DEFERRED
    ),
    "padding not masked": Mutation(
        "shard",
        "return max(0, min(self.stop, self.vocab_size) - self.start)",
        "return self.stop - self.start",
        DEFERRED,
    ),
    "gradient of the padding not cleared": Mutation("eager", "out_CW[:, real:] = 0.0", "pass", DEFERRED),
    "an entry that is in two runs loses an update": Mutation(
        "eager", "grad_BR.scatter_add_(1, local, owned)", "grad_BR.scatter_(1, local, owned)", DEFERRED
    ),
    "only the first run is added": Mutation(
        "eager",
        "local_BJ.split(unique_run_lengths, 1), owned_BJ.split(unique_run_lengths, 1), strict=True",
        "local_BJ.split(unique_run_lengths, 1)[:1], owned_BJ.split(unique_run_lengths, 1)[:1], strict=True",
        RECOMPUTE,
    ),
    "entries of other shards go to column 0": Mutation(
        "eager",
        "owned_CJ = row.grad_logp_CJ.masked_fill(~here_CJ, 0.0)",
        "owned_CJ = row.grad_logp_CJ",
        DEFERRED,
    ),
    "logits of other shards are sent too": Mutation(
        "shard", "return scaling.apply_(value_CJ).masked_fill(~here_CJ, 0.0)", "return scaling.apply_(value_CJ)", LOGITS
    ),
    "unused slots have a gradient": Mutation(
        "backend",
        "return grad_logp_CJ.masked_fill(ids_CJ == NO_ENTRY, 0.0)",
        "return grad_logp_CJ + 0.0",
        DEFERRED,
    ),
    "unused slots have a gradient, made in the backward pass": Mutation(
        "backend",
        "return grad_logp_CJ.masked_fill(ids_CJ == NO_ENTRY, 0.0)",
        "return grad_logp_CJ + 0.0",
        RECOMPUTE,
    ),
    "temperature not in the gradient": Mutation(
        "shard", "return grad if self.temperature == 1.0 else grad.div_(self.temperature)", "return grad", DEFERRED
    ),
    "softcap not in the gradient": Mutation(
        "shard", "grad.sub_(scaled.mul_(", "(scaled.mul_(", {**LOGITS, "softcap": 5.0}
    ),
    "softcap of the scaled logits, not of the logits": Mutation(
        "shard",
        "scaled.mul_(self.temperature / self.softcap)",
        "scaled.mul_(1.0 / self.softcap)",
        {**DEFERRED, "softcap": 5.0},
    ),
    "statistics of the first rank in every slot": Mutation(
        "exchange", "packed_CX[:, slot * group.rank() : slot * (group.rank() + 1)]", "packed_CX[:, :slot]", DEFERRED
    ),
    "sum not moved to the common maximum": Mutation(
        "exchange", "weight_CN = shift_CN.exp()", "weight_CN = torch.ones_like(shift_CN)", DEFERRED
    ),
    "the last chunk is lost where chunks overlap": Mutation(
        "support_loss", "if kernel.overlap and started is not None:", "if False:", {**DEFERRED, "overlap": True}
    ),
    "one buffer for two chunks that overlap": Mutation(
        "support_loss", "range(2 if kernel.overlap else 1)", "range(1)", {**DEFERRED, "overlap": True}
    ),
    "weight gradient of the last chunk only": Mutation(
        "gradients", "accumulate=not first)", "accumulate=False)", DEFERRED
    ),
    "weight gradient not scaled": Mutation(
        "gradients", "return self._sum.mul_(factor).to", "return self._sum.to", DEFERRED
    ),
    "weight gradient not scaled into main_grad": Mutation(
        "gradients",
        "self._main_grad.addcmul_(self._sum, factor.to(self._sum.dtype))",
        "self._main_grad.add_(self._sum)",
        {**DEFERRED, "with_main_grad": True},
    ),
    "main_grad overwritten": Mutation(
        "gradients",
        "self._main_grad.addcmul_(self._sum, factor.to(self._sum.dtype))",
        "self._main_grad.copy_(self._sum * factor)",
        {**DEFERRED, "with_main_grad": True},
    ),
    "a row counts as one without a gradient because of its last entry": Mutation(
        "backend", "live_C = (grad_logp_CJ != 0).any(dim=1)", "live_C = grad_logp_CJ[:, -1] != 0", NO_ENTROPY
    ),
    "a row with an entropy gradient alone counts as one without": Mutation(
        "backend", "live_C = live_C | (grad_C != 0)", "live_C = live_C & (grad_C != 0)", ENTROPY_ALONE
    ),
    "hidden gradient not scaled": Mutation("support_loss", "first_gradient.mul_(factor)", "pass", DEFERRED),
    "hidden gradient not summed over the ranks": Mutation("support_loss", "if ctx.reduce:", "if False:", DEFERRED),
    "hidden gradient not summed over the ranks, made in the backward pass": Mutation(
        "support_log_probs",
        "if weight_WD is not None and first_gradient is not None and ctx.reduce:",
        "if False:",
        RECOMPUTE,
    ),
}


def case_of(mutation: Mutation) -> Case:
    return make_case("tp2-uneven", **mutation.changes)


def _results_of_all(mutations: list[Mutation]) -> list[RankResult]:
    return [
        result_on_this_rank(
            case_of(mutation), mutant_losses(f"kernel.{mutation.module}", mutation.right, mutation.wrong)
        )
        for mutation in mutations
    ]


@pytest.fixture(scope="module")
def results() -> dict[str, list[RankResult]]:
    """Of every mutant, by rank."""
    by_rank = run_on_ranks(_results_of_all, 2, list(MUTATIONS.values()))
    return dict(zip(MUTATIONS, map(list, zip(*by_rank, strict=True)), strict=True))


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_fault_in_the_kernel_is_detected_by_the_oracle(
    name: str, results: dict[str, list[RankResult]]
) -> None:
    with pytest.raises(AssertionError, match="error"):
        assert_equals_the_oracle(results[name], case_of(MUTATIONS[name]), FAULT)


def test_an_unchanged_copy_of_the_kernel_equals_the_oracle() -> None:
    copies = [
        Mutation(module, UNCHANGED, UNCHANGED, RECOMPUTE if module == "support_log_probs" else DEFERRED)
        for module in MODULES
    ]
    by_rank = run_on_ranks(_results_of_all, 2, copies)
    for copy, ranks in zip(copies, zip(*by_rank, strict=True), strict=True):
        assert_equals_the_oracle(list(ranks), case_of(copy), 1e-12)


# ---- top-k ----

BORDERS, K = (0, 645, 1300), 7
"""Two shards of more than 2 K tiles, the first with a part of a tile at its end; the last 10 columns are padding."""
TOPK_MUTATIONS = {
    "ties as torch.topk likes": (
        "return LAST_COLUMN - (best_key_BK & LAST_COLUMN)",
        "return value_BX.to(torch.float32).topk(count, dim=1).indices",
    ),
    "the two zeros are not equal": ("(value_BX + 0.0)", "value_BX.contiguous()"),
    "candidates in the order of their tiles' maxima": (".sort(dim=1).values * TILE", " * TILE"),
    "a part of a tile at the end is not looked at": ("if tiles * TILE < columns:", "if False:"),
    "one tile fewer than entries": ("first_BK = _best(max_BX, count)", "first_BK = _best(max_BX, count - 1)"),
    "ids of the shard instead of the vocabulary": ("column_BK + shard.start", "column_BK"),
    "padding among the candidates": ("logits_CW[:, : shard.real_width]", "logits_CW"),
}


def tied_logits() -> Tensor:
    """Multiples of 1/4, mostly negative, [T, V]: the cut is a tie.

    The best of row 3 are the last columns of a shard, those of row 4 each in a tile of its own, those of row 5 zeros of
    both signs.
    """
    random = torch.Generator().manual_seed(6)
    logits_TV = (4.0 * (torch.randn(11, BORDERS[-1], generator=random) - 4.0)).round() / 4.0
    logits_TV[3, 636:645], logits_TV[4, 3 : 3 + 40 * K : 40] = 1.0, 1.0
    logits_TV[5].clamp_(max=-1.0)[::3], logits_TV[5, 1::6] = 0.0, -0.0
    logits_TV[:, -10:] = 50.0
    return logits_TV


def _topk_of_all(texts: list[tuple[str, str]]) -> list[list[list[int]]]:
    logits_TV = tied_logits()
    start, stop = BORDERS[dist.get_rank() :][:2]
    found = []
    for right, wrong in texts:
        losses = mutant_losses("kernel.topk", right, wrong)
        kernel = losses["kernel.backend"].Kernel(
            shard=losses["kernel.shard"].VocabShard(start, stop, BORDERS[-1] - 10),
            group=dist.group.WORLD,
            backend=losses["kernel.eager"].EagerBackend(),
            scaling=losses["kernel.shard"].Scaling(),
            chunk_tokens=4,
        )
        source = losses["kernel.source"].GivenLogits(logits_TV[:, start:stop])
        found.append(losses["kernel.topk"].distributed_topk(source, k=K, kernel=kernel).ids_TK.tolist())
    return found


def test_every_fault_of_the_topk_changes_an_id_and_an_unchanged_copy_none() -> None:
    rows = tied_logits()[:, : BORDERS[-1] - 10].double().numpy()
    right = [oracles.top_ids(row, K) for row in rows]
    texts = [(UNCHANGED, UNCHANGED), *TOPK_MUTATIONS.values()]
    for copy, *mutants in run_on_ranks(_topk_of_all, 2, texts):
        assert copy == right
        assert [name for name, found in zip(TOPK_MUTATIONS, mutants, strict=True) if found == right] == []
