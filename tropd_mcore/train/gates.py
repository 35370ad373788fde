"""Gates that need rollouts. A gate is a check that stops the run instead of training on numbers that cannot be right.

Other checks are elsewhere: the arithmetic of layout, batch and sequence in `config.checks`, vocabularies in
`teacher.vocabulary`, memory in `mcore.memory_probe`, a served teacher in `teacher.identity_check`. Invariants: the
compared log-probs are from before the step's first update. Noise of single tokens never stops a run after its first
step, nor a run in which an engine rounds.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from tropd_mcore.config.schema import Config
from tropd_mcore.config.teachers import TeacherSection, teachers_of
from tropd_mcore.errors import GateError
from tropd_mcore.monitor.record import GateState
from tropd_mcore.records.run_dir import RunDir
from tropd_mcore.serving.wire import ServerInfo, is_exact

log = logging.getLogger(__name__)

Columns = Mapping[str, npt.NDArray[np.generic]]

FLOAT32_BOUNDS = (1e-4, 1e-2)
"""(99th percentile, maximum) between two float32 engines on a CPU, nats. Measured: 8e-6 and 1e-4 (docs/numerics.md)."""
BFLOAT16_BOUNDS = (0.25, 2.0)
"""The same if one of the engines rounds: bfloat16, or float32 on a GPU, whose matrix products may be TF32."""
FLOAT32_MEAN = 2e-5
"""Bound on the mean between two float32 engines on a CPU, nats. Measured: 6e-7."""
BFLOAT16_MEAN = 0.05
"""The same if one of the engines rounds. Measured in bfloat16: 7e-3."""

LEAST_TOKENS = 500
"""With fewer tokens, a 99th percentile depends on a few tokens and is not judged. The share of tokens above its bound
is judged at any number of tokens; at least two tokens must be above."""
GROSS, GROSS_TOKENS = 10.0, 20
"""(factor, tokens): a step whose mean exceeds its bound by this factor over this many tokens stops the run at once."""
FIRST_STEP = 2.0
"""If an engine rounds, the first step stops the run above this multiple of the bounds, because one step may be noisier
than most. Between the bounds and this multiple it counts as the first of the steps in a row."""
WARN_EVERY = 20
"""Steps between two warnings about the maximum. Steps in between are counted."""


def engines_are_exact(config: Config, device: str, served: ServerInfo | None = None) -> bool:
    """Return whether trainer and sampler both compute in float32 on a CPU.

    `device` is the platform of the job. `served` is the information that a rollout server at a url reports; None if the
    job starts the server itself.
    """
    student = config.student.dtype
    sampler = served.exact if served is not None else is_exact(config.rollout.server.dtype or student, None, device)
    return sampler and is_exact(student, None, device)


@dataclass(frozen=True)
class SamplerBounds:
    """Bounds on |sampler - trainer| log-prob, nats.

    `share` bounds the share of tokens above `p99`. `steps` is the number of failed steps in a row that stops the run.
    """

    mean: float
    p99: float
    largest: float
    share: float
    steps: int
    exact: bool
    """Whether neither engine rounds (`engines_are_exact`). Then a single token above `largest` shows an error."""

    @classmethod
    def of(cls, config: Config, *, exact: bool) -> SamplerBounds:
        """Return the bounds of `gates.sampler_logprob_*`, or the defaults, which depend on `exact`."""
        gates = config.gates
        p99, largest = FLOAT32_BOUNDS if exact else BFLOAT16_BOUNDS
        return cls(
            mean=gates.sampler_logprob_mean or (FLOAT32_MEAN if exact else BFLOAT16_MEAN),
            p99=gates.sampler_logprob_p99 or p99,
            largest=gates.sampler_logprob_max or largest,
            share=gates.sampler_logprob_share,
            steps=gates.sampler_logprob_steps,
            exact=exact,
        )

    def of_first_step(self) -> SamplerBounds:
        """Return the bounds for the first step of a launch."""
        if self.exact:
            return self
        wider = {name: FIRST_STEP * getattr(self, name) for name in ("mean", "p99", "share")}
        return replace(self, **wider, largest=np.inf)


@dataclass(frozen=True)
class Difference:
    """|sampler - trainer| log-prob over the sampled tokens of a step, nats."""

    tokens: int
    mean: float
    p99: float
    largest: float
    share_above: float
    """Share of the tokens above the bound of the 99th percentile."""

    def off(self, bounds: SamplerBounds) -> list[str]:
        """Return which of mean, 99th percentile and share are above their bounds. The maximum is not checked here."""
        above = round(self.share_above * self.tokens)
        wrong = {
            "mean": self.mean > bounds.mean,
            "99th percentile": self.tokens >= LEAST_TOKENS and self.p99 > bounds.p99,
            "share": self.share_above > bounds.share and above >= 2,
        }
        return [name for name, is_wrong in wrong.items() if is_wrong]

    def describe(self, bounds: SamplerBounds) -> str:
        """Return the numbers and their bounds as one clause."""
        return (
            f"sampler and trainer log-probs differ by {self.mean:.1e} nats (mean), {self.p99:.1e} (99th percentile), "
            f"{self.largest:.1e} (maximum) over {self.tokens} tokens; allowed {bounds.mean:.0e}, {bounds.p99:.0e}, "
            f"{bounds.largest:.0e}; {self.share_above:.1%} of the tokens are above the second, allowed "
            f"{bounds.share:.0%}"
        )

    def cause(self) -> str:
        """Return the most likely cause, judged by the share of tokens that differ."""
        if self.share_above > 0.5:
            return (
                "other weights (a publication that did not arrive, a foreign or renamed checkpoint, rollouts that "
                "another run stored), another temperature (rollout.temperature) or another chat template in the server"
            )
        if self.share_above > 0.01:
            return (
                "another dtype (rollout.server.dtype, student.dtype), a tensor that was converted wrongly, or the "
                "weights of an earlier step"
            )
        return "single tokens only: special tokens, or padded vocabulary columns in one of the two softmaxes"


def compare(parts: Sequence[Columns], bounds: SamplerBounds) -> Difference | None:
    """Compare the rows of all ranks and updates in the first epoch; None if no sampled token was scored.

    A single non-finite number makes the difference infinite. NaN would compare as below every bound.
    """
    pieces = []
    for part in parts:
        if part:
            rows = part["on"].astype(bool) & (part["epoch"] == 0)
            pieces.append(part["old_logp"][rows].astype(np.float64) - part["rollout_logp"][rows].astype(np.float64))
    found = np.abs(np.concatenate(pieces)) if pieces else np.zeros(0)
    if not len(found):
        return None
    finite = np.isfinite(found)
    if not finite.all():
        above = float((~finite | (found > bounds.p99)).mean())
        return Difference(len(found), mean=np.inf, p99=np.inf, largest=np.inf, share_above=above)
    return Difference(
        tokens=len(found),
        mean=float(found.mean()),
        p99=float(np.quantile(found, 0.99)),
        largest=float(found.max()),
        share_above=float((found > bounds.p99).mean()),
    )


class SamplerGate:
    """Compares sampler and trainer at every step of a launch; used on rank 0.

    The first step with sampled tokens must pass. Between exact engines it must meet all bounds. Otherwise it must stay
    within twice the bounds, without the maximum, because the largest of many rounded tokens is noise. Later, a mean, a
    99th percentile or a share above its bound stops the run after `sampler_logprob_steps` such steps in a row, or at
    once if the mean is far above. A maximum above its bound causes a warning. In a replay of another run (`run.replay`)
    only the first step is judged: later rollouts come from weights that this run has only if nothing was changed.
    """

    def __init__(self, config: Config, bounds: SamplerBounds) -> None:
        self.bounds = bounds
        self.passed = False
        """Whether the first comparison of the launch is done."""
        self.warnings = 0
        """Steps whose maximum was above its bound."""
        self._off: list[int] = []
        """Latest steps in a row that were above a bound."""
        self._last_warned: int | None = None
        self._run_dir = RunDir(config.run.dir)
        self._replayed = config.run.replay is not None

    @property
    def state(self) -> GateState:
        """State for the metrics."""
        return GateState(p99_bound=self.bounds.p99, off_in_a_row=len(self._off), warnings=self.warnings)

    def check(self, step: int, parts: Sequence[Columns], *, first_update: bool = False) -> bool:
        """Judge the rows of `step`; returns whether anything has been compared in this launch. Raises GateError.

        `first_update` marks the rows of the first of several updates. They must pass if nothing has passed before, but
        they do not count as a step.
        """
        found = compare(parts, self.bounds)
        if found is not None:
            self.judge(step, found, first_update=first_update)
        return self.passed

    def judge(self, step: int, found: Difference, *, first_update: bool = False) -> None:
        """Judge the difference of `step`, as `check` does. Raises GateError."""
        is_first = not self.passed
        if is_first:
            first = self.bounds.of_first_step()
            if found.off(first) or found.largest > first.largest:
                raise self._error(found, [step], "")
            log.info("gates.sampler_logprob: sampler and trainer agree to %.1e nats (99th percentile)", found.p99)
            self.passed = True
        if first_update or (self._replayed and not is_first):
            return
        self._warn_of_maximum(step, found)
        self._judge_row(step, found)

    def _warn_of_maximum(self, step: int, found: Difference) -> None:
        if found.largest <= self.bounds.largest:
            return
        self.warnings += 1
        if self._last_warned is None or step - self._last_warned >= WARN_EVERY:
            self._last_warned = step
            log.warning("gates.sampler_logprob: step %d: %s (%d such steps)", step, self._text(found), self.warnings)

    def _judge_row(self, step: int, found: Difference) -> None:
        off = found.off(self.bounds)
        self._off = [*self._off, step] if off else []
        if found.tokens >= GROSS_TOKENS and found.mean > GROSS * self.bounds.mean:
            raise self._error(found, self._off, f", the mean by more than {GROSS:g} times what is allowed")
        if len(self._off) >= self.bounds.steps:
            raise self._error(found, self._off, f" in {len(self._off)} steps in a row ({', '.join(off)})")
        if off:
            log.warning(
                "gates.sampler_logprob: step %d: %s above the bound, %d of %d steps in a row that stop the run: %s",
                step,
                " and ".join(off),
                len(self._off),
                self.bounds.steps,
                self._text(found),
            )

    def _text(self, found: Difference) -> str:
        return found.describe(self.bounds)

    def _error(self, found: Difference, steps: list[int], since: str) -> GateError:
        stored = self._run_dir.rollouts(steps[0])
        more = f" to step {steps[-1]}" if len(steps) > 1 else ""
        remedy = (
            f"Stored rollouts are used again: once the cause is fixed, remove {stored}{more} to have them sampled again"
        )
        if self._replayed:
            remedy = (
                "The rollouts of run.replay are of another student, or their log-probs are rough: replay a run of this "
                "student, or set gates.sampler_logprob=false if that is meant"
            )
        return GateError(
            f"gates.sampler_logprob: step {steps[-1]}: {self._text(found)}{since}. Likely cause: {found.cause()}. "
            f"{remedy}. Bounds: gates.sampler_logprob_mean, gates.sampler_logprob_p99, gates.sampler_logprob_max, "
            "gates.sampler_logprob_share, gates.sampler_logprob_steps"
        )


SAME_MODEL = 3.0
"""If a served teacher's mean difference from the student is at most this times the sampler's, it is the student."""
SAME_MODEL_LEAST = 1e-6
"""Nats; least value of that bound, for engines that agree to the last bit."""


def check_teachers_are_others(
    parts: Sequence[Columns],
    config: Config,
    bounds: SamplerBounds,
    step: int,
    *,
    teachers: Sequence[str | None] = (),
) -> None:
    """Raise GateError if a served teacher's scores of a run's first rollouts are the student's own log-probs.

    `teachers` names the teacher of each rollout; with one teacher, it is not read. The sampler is a server with the
    student's weights, so its difference gives the size of the noise. A teacher that is as near to the student is also a
    server with the student's weights. This is checked only at temperature 1, where the two can be compared, and only at
    step 0, before the student has learnt anything.
    """
    if not config.gates.teacher_identity or step or config.rollout.temperature != 1.0 or config.run.replay is not None:
        return
    for teacher in teachers_of(config):
        if teacher.served and teacher.path.resolve() != config.student.path.resolve():
            mine = [part if teacher.name is None else _rows_of(part, teachers, teacher.name) for part in parts]
            _check_is_another(mine, bounds, teacher)


def _rows_of(part: Columns, teachers: Sequence[str | None], name: str) -> Columns:
    """The rows of the samples with this teacher."""
    if not part:
        return part
    rows = np.array([teacher == name for teacher in teachers], dtype=np.bool_)[part["sample_index"].astype(np.int64)]
    return {column: values[rows] for column, values in part.items()}


def _check_is_another(parts: Sequence[Columns], bounds: SamplerBounds, section: TeacherSection) -> None:
    sampler = compare(parts, bounds)
    teacher = compare([{**part, "rollout_logp": part["teacher_logp"]} if part else part for part in parts], bounds)
    if sampler is None or teacher is None:
        return
    if teacher.mean <= min(max(SAME_MODEL * sampler.mean, SAME_MODEL_LEAST), bounds.mean):
        raise GateError(
            f"gates.teacher_identity: the teacher's scores of the first {teacher.tokens} tokens differ by "
            f"{teacher.mean:.1e} nats (mean) from the student's own log-probs, the sampler's by {sampler.mean:.1e}: "
            f"{section.key}.server serves the student's weights, so there is nothing to learn. Expected the weights of "
            f"{section.path_key}; correct {section.key}.server.url, or {section.path_key} if it is a copy of the "
            "student"
        )
