"""Makes one scorer, one name and one check of the teachers of a run, however many there are.

The teachers themselves are built in `components`. Invariant: a run with one teacher, whose name is None, gets exactly
that teacher, its name and its check.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tropd_mcore.config.schema import Config
from tropd_mcore.config.teachers import alone
from tropd_mcore.data.supervision import IgnoredTokens
from tropd_mcore.mcore.model import Model
from tropd_mcore.teacher.identity_check import TeacherCheck
from tropd_mcore.teacher.own_packs import Packing
from tropd_mcore.teacher.score_source import Teacher
from tropd_mcore.teacher.teacher_set import TeacherChecks, TeacherSet
from tropd_mcore.train.inputs import Inputs, teacher_name
from tropd_mcore.train.loaded_inputs import LoadedInputs

if TYPE_CHECKING:
    from tropd_mcore.train.components import JobContext


def joined(
    scorers: Mapping[str | None, Teacher], context: JobContext, student: Model, ignored: IgnoredTokens
) -> Teacher:
    """Return the scorer of the run: the only one of `scorers`, or one that asks the teacher of each sample."""
    if None in scorers:
        return scorers[None]
    tokens = context.config.batch.tokens_per_micro_batch
    named = {name: scorer for name, scorer in scorers.items() if name is not None}
    return TeacherSet(named, Packing(context.layout, student.platform.device, tokens, ignored))


def scorer_name(
    config: Config, inputs: Inputs, identities: Mapping[str | None, str], *, candidates: int | None = None
) -> str:
    """Return text that distinguishes the scores of other teachers (`inputs.teacher_name`), of one or of several."""
    texts = {
        name: teacher_name(alone(config, name), inputs, identity, candidates=candidates)
        for name, identity in identities.items()
    }
    return texts[None] if None in texts else "; ".join(f"{name}: {text}" for name, text in texts.items())


def excluded_of(loaded: LoadedInputs, teacher: str | None) -> tuple[int, ...]:
    """Return the ids that cannot be candidates of this teacher (teacher.extra_tokens)."""
    return loaded.excluded if isinstance(loaded.excluded, tuple) else loaded.excluded[teacher or ""]


def joined_checks(checks: Mapping[str | None, TeacherCheck]) -> TeacherCheck | TeacherChecks | None:
    """Return what checks the served teachers; None if there is nothing to check."""
    if None in checks:
        return checks[None]
    return TeacherChecks({str(name): check for name, check in checks.items()}) if checks else None
