"""The packs of a teacher that does not read what the student reads: other contexts, or only some of the samples.

Invariants: each replica packs its own samples, so no row leaves it. The scored tokens are rows of the student, and each
has the same values in the student's packs as in the teacher's. The ranks of a replica's last stage call the same
methods in the same order.

Shapes: S samples of the step, R rows of this rank in the student's packs, of which N have this teacher, Q rows in the
teacher's packs, T rows of one micro-batch, L student top-k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tropd_mcore.data.packing import PackedStep, pack
from tropd_mcore.data.supervision import IgnoredTokens
from tropd_mcore.mcore.collective import union
from tropd_mcore.mcore.parallel import Layout
from tropd_mcore.mcore.row_exchange import RowExchange, row_keys, row_samples
from tropd_mcore.sentinels import ABSENT, NO_ENTRY
from tropd_mcore.types import Rollout, TeacherScores

BLANKS = {
    "logp_T": 0.0,
    "topk_ids_TK": NO_ENTRY,
    "topk_logp_TK": ABSENT,
    "tail_mass_T": 1.0,
    "entropy_T": 0.0,
    "scored_T": False,
    "logp_of_student_topk_TL": ABSENT,
    "excluded_T": 0,
}
"""The scores of a row without a teacher."""


@dataclass(frozen=True)
class Packing:
    """How a teacher's samples are packed: as the student's are, but by replica."""

    layout: Layout
    device: torch.device
    tokens_per_micro_batch: int
    ignored: IgnoredTokens
    """Tokens that the student does not train on; they are no rows"""

    def packs(self, rollouts: list[Rollout]) -> PackedStep:
        """Return packs of this replica only: a forward pass of a frozen model never waits for another replica."""
        layout = self.layout
        return pack(
            rollouts,
            tokens_per_micro_batch=self.tokens_per_micro_batch,
            dp_size=1,
            dp_rank=0,
            cp_size=layout.cp_size,
            cp_rank=layout.cp_rank,
            tp_size=layout.tp_size,
            aggregation="token_mean",
            prefix_denominator="joint",
            device=self.device,
            ignored=self.ignored,
        )

    def samples(self, packed: PackedStep) -> list[int]:
        """Return the samples that have rows in the student's packs of this replica, ascending. Collective over the
        context group."""
        return sorted(union(packed.samples, self.layout.groups.cp))

    def tensor(self, values: npt.NDArray[np.generic]) -> Tensor:
        """Return `values` on the device."""
        return torch.from_numpy(values).to(self.device)


@dataclass(frozen=True)
class TeacherPacks:
    """The teacher's packs, and the exchange between the student's rows and the teacher's rows."""

    packed: PackedStep
    has_teacher_R: Tensor
    """bool [R], whether a row of the student's packs is one of the N that have this teacher"""
    exchange: RowExchange
    """from those N to the Q rows of the teacher's packs"""
    rows: list[int]
    """T of each of the student's micro-batches"""

    @classmethod
    def of(
        cls, read: Mapping[int, Rollout], rollouts: Sequence[Rollout], packed: PackedStep, packing: Packing
    ) -> TeacherPacks:
        """Pack what the teacher reads: `read` has it by sample, for this replica's samples with this teacher.

        A sample's prefix and response must be those of `rollouts`; its prompt may differ. If there are none, there is
        one empty pack. The packs' `sample_index_T` is a place in `read`.
        """
        theirs = packing.packs(list(read.values()))
        # The key of a token: its position when the prefixes and responses of `read` are concatenated.
        lengths = [len(rollout.prefix_ids) + len(rollout.response_ids) for rollout in read.values()]
        starts = np.cumsum([0, *lengths])
        first_S = np.zeros(len(rollouts), dtype=np.int64)
        first_read = np.zeros(len(read), dtype=np.int64)
        for index, (sample, rollout) in enumerate(read.items()):
            first_S[sample] = starts[index] - len(rollouts[sample].prompt_ids)
            first_read[index] = starts[index] - len(rollout.prompt_ids)
        has_teacher_S = np.isin(np.arange(len(rollouts)), list(read))

        has_teacher_R = packing.tensor(has_teacher_S)[row_samples(packed.micro_batches)]
        exchange = RowExchange(
            row_keys(packed.micro_batches, packing.tensor(first_S))[has_teacher_R],
            row_keys(theirs.micro_batches, packing.tensor(first_read)),
            int(starts[-1]),
            packing.layout.groups.cp,
        )
        return cls(theirs, has_teacher_R, exchange, [len(batch.rows_T) for batch in packed.micro_batches])

    def renumbered(self, places: npt.NDArray[np.int64]) -> TeacherPacks:
        """Return the same packs with `places[index]` as the index of each sample."""
        places_S = torch.from_numpy(places)
        batches = [
            replace(batch, sample_index_T=places_S.to(batch.sample_index_T.device)[batch.sample_index_T])
            for batch in self.packed.micro_batches
        ]
        return replace(self, packed=replace(self.packed, micro_batches=batches))

    def own_candidates(self, own_ids: Sequence[Tensor | None]) -> list[Tensor] | None:
        """Return the student's top-k candidates, int64 [T, L] for each micro-batch of the student's packs, for each of
        the teacher's micro-batches; None if none are requested."""
        present = [ids_TL for ids_TL in own_ids if ids_TL is not None]
        if not present:
            return None
        assert len(present) == len(own_ids), "the candidates of some micro-batches are missing"
        sizes = [len(micro_batch.rows_T) for micro_batch in self.packed.micro_batches]
        return list(self.exchange.send(torch.cat(present)[self.has_teacher_R]).split(sizes))

    def put(
        self,
        theirs: Sequence[TeacherScores | None],
        columns_R: dict[str, Tensor],
        blanks: Mapping[str, float] = BLANKS,
    ) -> None:
        """Write the teacher's scores of its packs into the columns of the student's rows, by the names of
        `TeacherScores`. A column that is not there yet begins with `blanks`. Hidden states are left out."""
        pieces = [vars(score) for score in theirs if score is not None]
        back = self.exchange.reversed()
        for name, blank in blanks.items():
            column = [piece[name] for piece in pieces]
            if column[0] is None:
                continue
            values_NX = back.send(torch.cat(column))
            if name not in columns_R:
                columns_R[name] = values_NX.new_full((len(self.has_teacher_R), *values_NX.shape[1:]), blank)
            columns_R[name][self.has_teacher_R] = values_NX


def by_micro_batch(columns_R: Mapping[str, Tensor], rows: Sequence[int]) -> list[TeacherScores | None]:
    """Return the scores of each of the student's micro-batches, which have this many `rows`."""
    split = {name: column_RX.split(list(rows)) for name, column_RX in columns_R.items()}
    return [
        TeacherScores(**{"entropy_T": None, **{name: pieces[index] for name, pieces in split.items()}})
        for index in range(len(rows))
    ]
