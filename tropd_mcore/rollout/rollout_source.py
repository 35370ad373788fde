"""Provides the rollouts of a step: from the run directory if the step was sampled before, otherwise from the server.

For an objective that samples nothing, they are the teacher's stored responses.

Invariants: a step's rollouts are saved before anything is computed from them. Every rank gets the same list. A step of
a run never has two sets of rollouts. The objective of this run decides which samples carry the loss of their prefix,
also if another run sampled them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from tropd_mcore.config.derived import new_token_budget
from tropd_mcore.config.schema import Config
from tropd_mcore.config.teachers import names_of
from tropd_mcore.data.prompts import PromptSet
from tropd_mcore.data.supervision import with_carriers
from tropd_mcore.errors import DataError
from tropd_mcore.mcore.collective import on_rank_zero
from tropd_mcore.mcore.parallel import Layout
from tropd_mcore.records.replay import load_left_out, load_rollouts, save_rollouts
from tropd_mcore.records.run_dir import RunDir
from tropd_mcore.rollout.policy_server import PolicyServer
from tropd_mcore.rollout.requests import are_taught, build_requests, cut_response, responses_as_rollouts
from tropd_mcore.rollout.sampler import check_ids
from tropd_mcore.types import Rollout

log = logging.getLogger(__name__)


class RolloutSource:
    """Rollouts by step. `policy` samples the steps that are not on disk; it is None in a replay.

    `vocab_size` is the student's vocabulary size. Stored rollouts with ids outside it are refused. `end_id` ends a
    teacher's response that finished, with several teachers one id for each; an objective without rollouts trains on
    those. The teacher of a stored rollout is that of its prompt in this run, also if another run sampled it.
    """

    def __init__(
        self,
        config: Config,
        run_dir: RunDir,
        prompts: PromptSet,
        policy: PolicyServer | None,
        layout: Layout,
        *,
        vocab_size: int,
        end_id: int | Mapping[str, int] | None = None,
    ) -> None:
        self._config = config
        self._run_dir = run_dir
        self._prompts = prompts
        self._policy = policy
        self._vocab_size = vocab_size
        self._end_id = end_id
        self._names = names_of(config)
        self._teachers = {prompt.prompt_id: prompt.teacher for prompt in prompts.prompts} if self._names else {}
        """Prompt id -> name of its teacher, in a run with several"""
        self._control = layout.groups.control
        self.left_out = 0
        """Number of samples that the current step left out because they got no usable answer; valid on rank 0."""

    def at_step(self, step: int) -> list[Rollout]:
        """Return the rollouts of `step` on every rank. Collective. Raises DataError and the errors of `policy`."""
        stored = on_rank_zero(lambda: self._stored(step), self._control)
        if stored is not None:
            return with_carriers(stored, prefix_loss=self._config.objective.has_prefix_loss)
        if not self._config.objective.samples:
            rollouts = self._taught(step)
            self.save(step, rollouts)
            return rollouts
        assert self._policy is not None
        prompts = self._prompts.at_step(step, self._config.rollout.prompts_per_step)
        requests = build_requests(
            prompts, step=step, config=self._config, longest_response=self._prompts.longest_response
        )
        sampled = self._policy.sample(requests, step=step)
        self.left_out = len(requests) - len(sampled)
        # a sample that was left out may be the one that carried the loss of its prefix
        rollouts = with_carriers(sampled, prefix_loss=self._config.objective.has_prefix_loss)
        self.save(step, rollouts)
        return rollouts

    def _taught(self, step: int) -> list[Rollout]:
        """Return the teacher's responses to the prompts of `step`, as many as a step samples otherwise."""
        rollout = self._config.rollout
        prompts = self._prompts.at_step(step, rollout.prompts_per_step * rollout.samples_per_prompt)
        assert self._end_id is not None, "the end of a finished response"
        return responses_as_rollouts(prompts, step=step, end_id=self._end_id)

    def save(self, step: int, rollouts: list[Rollout]) -> None:
        """Save the rollouts that a repetition of `step` starts from. Rank 0 writes. Collective."""
        on_rank_zero(lambda: self._save(step, rollouts), self._control)

    def _save(self, step: int, rollouts: list[Rollout]) -> None:
        self._run_dir.check_held()
        save_rollouts(self._run_dir.rollouts(step), rollouts, left_out=self.left_out)

    def _stored(self, step: int) -> list[Rollout] | None:
        own, samples = self._run_dir.rollouts(step), self._config.objective.samples
        if own.exists():
            rollouts = self._load(own)
            if are_taught(rollouts) != samples:
                log.info("step %d: rollouts from %s", step, own)
                return rollouts
            log.warning("step %d: the rollouts in %s are of another phase and are made again", step, own)
        if self._config.run.replay is None or not samples:
            return None
        other: Path = RunDir(self._config.run.replay).rollouts(step)
        if not other.exists():
            raise DataError(f"run.replay: {other} does not exist; expected the rollouts of step {step} there")
        rollouts = self._load(other)
        if are_taught(rollouts):
            raise DataError(
                f"run.replay: {other} holds responses of the teacher, and objective.kind="
                f"{self._config.objective.kind} learns from answers of the student; replay a run that sampled this "
                "step (with objective.phases: one whose phases begin at the same steps)"
            )
        if self._config.rollout.truncate is not None:
            budgets = [new_token_budget(step, len(rollout.prefix_ids), self._config) for rollout in rollouts]
            rollouts = [cut_response(rollout, budget) for rollout, budget in zip(rollouts, budgets, strict=True)]
        self._save(step, rollouts)
        return rollouts

    def _load(self, path: Path) -> list[Rollout]:
        """Load the rollouts in `path`. Raises DataError if they are damaged or hold ids outside the vocabulary."""
        rollouts = load_rollouts(path)
        self.left_out = load_left_out(path)
        for rollout in rollouts:
            check_ids(rollout.token_ids, self._vocab_size, what=f"{path}: sample {rollout.sample_id}")
        return [self._with_teacher(path, rollout) for rollout in rollouts]

    def _with_teacher(self, path: Path, rollout: Rollout) -> Rollout:
        """The rollout with the teacher that this run gives to its prompt. Raises DataError if it gives none."""
        if not self._names:
            return rollout if rollout.teacher is None else replace(rollout, teacher=None)
        teacher = self._teachers.get(rollout.prompt_id, rollout.teacher)
        if teacher not in self._names:
            found = "none" if teacher is None else repr(teacher)
            raise DataError(
                f"{path}: sample {rollout.sample_id}: expected one of `teachers` ({', '.join(self._names)}) as its "
                f"teacher, found {found}; data.prompts has no prompt {rollout.prompt_id!r}, which would name it: add it"
            )
        return rollout if teacher == rollout.teacher else replace(rollout, teacher=teacher)
