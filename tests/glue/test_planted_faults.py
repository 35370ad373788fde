"""Faults of statistics, schedules and the wire that tests once missed: each is planted, and a test must fail.

A row is (the fault in words, the planted change, the test that detects it). The test runs unchanged, also on its rank
processes (`faults.on_ranks`). Without the fault it passes in its own file.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.glue import (
    test_average_resume,
    test_batch_context,
    test_gates,
    test_policy_server,
    test_rollout_source,
    test_run_dir,
    test_score_source,
    test_trainer,
    test_wire,
)
from tests.glue.faults import PLANTED, Fault, planted
from tropd_mcore.errors import TropdError
from tropd_mcore.rollout.uniforms import trust_uniforms

Row = tuple[str, Fault, Callable[..., None], dict[str, Any]]
NOTICED = (AssertionError, pytest.fail.Exception, TropdError)
"""Exceptions of a failing test, or of the product if it detects the fault itself. Any other exception means that the
test is broken."""


def row(what: str, fault: Fault, claim: Callable[..., None], **arguments: Any) -> Row:
    return what, fault, claim, arguments


GATE = "if found.off(first) or found.largest > first.largest:"
FIRST = "if not components.config.gates.sampler_logprob or not (whole or first):"
ROW = "self._off = [*self._off, step] if off else []"
PROGRESS = "progress=batch.step / components.config.run.steps"
ROLLOUT_LOGP = '"rollout_logp_T": micro_batch.rollout_logp_T.double(),'
OLD = '"old_logp_T": found.logp_T.double(),'
SCORED = '"on_T": micro_batch.student_mask_T & scored.scored_T,'
NEW_STATISTIC = "statistic_of(self._config.objective, step / self._config.run.steps)"
LIMIT = "0 if count is None else min(step + 1 - count, needed_from)"

GATES = (
    row(
        "the sampler gate never refuses on the percentile",
        Fault("train.gates", "self.p99 > bounds.p99", "False"),
        test_gates.test_the_first_step_is_refused_if_only_the_percentile_is_above_its_bound,
    ),
    row(
        "the sampler gate never refuses on the mean",
        Fault("train.gates", "self.mean > bounds.mean", "False"),
        test_gates.test_the_first_step_is_refused_if_only_the_mean_is_above_its_bound,
    ),
    row(
        "the sampler gate never refuses on the share",
        Fault("train.gates", "self.share_above > bounds.share and above >= 2", "False"),
        test_gates.test_the_first_step_is_refused_if_only_the_share_is_above_its_bound,
    ),
    row(
        "the sampler gate never refuses on the maximum",
        Fault("train.gates", GATE, "if found.off(first):"),
        test_gates.test_with_exact_engines_the_first_step_is_refused_if_only_the_maximum_is_above_its_bound,
    ),
    row(
        "`and` for `or` between the bounds of the gate",
        Fault("train.gates", GATE, GATE.replace(" or ", " and ")),
        test_gates.test_with_exact_engines_the_first_step_is_refused_if_only_the_maximum_is_above_its_bound,
    ),
    row(
        "the bounds of later steps hold at a first step where an engine rounds",
        Fault("train.gates", "first = self.bounds.of_first_step()", "first = self.bounds"),
        test_gates.test_the_maximum_of_a_first_step_of_several_updates_is_warned_about_once,
    ),
    row(
        "the percentile of a few tokens is judged",
        Fault("train.gates", "self.tokens >= LEAST_TOKENS and self.p99", "self.p99"),
        test_gates.test_few_tokens_are_not_judged_by_their_percentile_and_one_token_not_by_its_share,
    ),
    row(
        "one token is a share",
        Fault("train.gates", "bounds.share and above >= 2", "bounds.share"),
        test_gates.test_few_tokens_are_not_judged_by_their_percentile_and_one_token_not_by_its_share,
    ),
    row(
        "the gate compares tokens that were not sampled",
        Fault("train.gates", 'part["on"].astype(bool) & ', ""),
        test_gates.test_the_gate_compares_only_sampled_tokens,
    ),
    row(
        "the gate compares rows of later epochs",
        Fault("train.gates", ' & (part["epoch"] == 0)', ""),
        test_gates.test_the_gate_compares_the_rows_of_all_ranks_but_not_of_later_epochs,
    ),
    row(
        "steps that are off are counted over the launch, not in a row",
        Fault("train.gates", ROW, "self._off = [*self._off, step] if off else self._off"),
        test_gates.test_the_run_stops_after_the_configured_number_of_consecutive_later_steps_above_a_bound,
        wrong=test_gates.P99_OFF,
        allowed=2,
    ),
    row(
        "later steps are never off",
        Fault("train.gates", ROW, "self._off = []"),
        test_gates.test_the_run_stops_after_the_configured_number_of_consecutive_later_steps_above_a_bound,
        wrong=test_gates.P99_OFF,
        allowed=2,
    ),
    row(
        "the rollouts of another run are judged at every step",
        Fault("train.gates", "if first_update or (self._replayed and not is_first):", "if first_update:"),
        test_gates.test_in_a_replay_of_another_run_only_the_first_step_is_judged,
    ),
    row(
        "the trainer never asks the gate",
        Fault("train.trainer", FIRST, "if True:"),
        test_trainer.test_the_gate_refuses_before_the_first_optimizer_step_of_any_launch,
    ),
    row(
        "the trainer asks the gate at step 0 of the run alone",
        Fault("train.trainer", FIRST, FIRST.replace("if ", "if batch.step or ")),
        test_trainer.test_the_gate_refuses_before_the_first_optimizer_step_of_any_launch,
    ),
    row(
        "the trainer asks the gate at the first step of a launch alone",
        Fault("train.trainer", FIRST, FIRST.replace("(whole or first)", "first")),
        test_trainer.test_a_sampler_with_stale_weights_stops_the_run_before_the_update_of_its_third_step,
    ),
    row(
        "with several updates, the trainer asks only once all of them have moved the student",
        Fault("train.trainer", FIRST, FIRST.replace("(whole or first)", "whole")),
        test_trainer.test_the_gate_compares_the_student_before_the_first_of_several_updates,
    ),
    row(
        "a served teacher is not looked at before a checkpoint",
        Fault("train.trainer", "components.teacher_check.before_checkpoint(done)", "pass"),
        test_trainer.test_a_served_teacher_is_checked_before_each_scoring_and_before_each_checkpoint,
    ),
)

SCHEDULES = (
    row(
        "progress fixed at 0 in the trainer: KDRL stays at beta_start",
        Fault("train.trainer", PROGRESS, "progress=0.0"),
        test_trainer.test_the_kdrl_objective_gets_the_progress_of_every_step,
    ),
    row(
        "progress fixed at 0 in the trainer: REOPOLD stays in phase 1",
        Fault("train.trainer", PROGRESS, "progress=0.0"),
        test_trainer.test_the_reopold_objective_changes_its_phase_at_the_configured_share_of_the_run,
    ),
    row(
        "progress counts from the launch",
        Fault("train.trainer", PROGRESS, "progress=(batch.step - self.first_step) / components.config.run.steps"),
        test_trainer.test_the_kdrl_objective_gets_the_progress_of_every_step,
    ),
    row(
        "progress fixed at 0 for the statistic",
        Fault("train.batch_context", NEW_STATISTIC, "statistic_of(self._config.objective, 0.0)"),
        test_batch_context.test_reopold_has_a_statistic_only_from_its_second_phase_on,
        step=2,
        has_statistic=True,
    ),
    row(
        "checkpoints one step late",
        Fault("train.trainer", "if done % self.components.config.run", "if step % self.components.config.run"),
        test_trainer.test_a_checkpoint_is_written_at_the_configured_interval_and_at_the_end_of_a_launch,
        first_step=0,
        last_step=7,
        every=3,
        expected=[3, 6, 7],
    ),
    row(
        "no checkpoint at the end of a launch",
        Fault("train.trainer", " == 0 or done == self.last_step:", " == 0:"),
        test_trainer.test_a_checkpoint_is_written_at_the_configured_interval_and_at_the_end_of_a_launch,
        first_step=3,
        last_step=5,
        every=3,
        expected=[5],
    ),
    row(
        "one epoch however many are asked for",
        Fault("train.trainer", "* self.components.config.objective.policy.epochs", "* 1"),
        test_trainer.test_mini_batches_are_trained_in_turn_in_every_epoch,
    ),
    row(
        "the average never follows",
        Fault("train.trainer", "components.average.update()", "pass"),
        test_trainer.test_the_average_is_updated_once_after_every_optimizer_step,
    ),
)

STATISTICS = (
    row(
        "the statistic of IW-OPD from the trainer's log-prob instead of the sampler's",
        Fault("train.batch_context", ROLLOUT_LOGP, ROLLOUT_LOGP.replace("micro_batch.rollout_logp_T", "found.logp_T")),
        test_batch_context.test_the_history_weight_uses_the_samplers_log_prob,
        unscored="none",
    ),
    row(
        "the same, inside the statistic",
        Fault("objectives.parts.batch_statistics", "_gap(rows, rows.rollout_logp_T)", "_gap(rows, rows.old_logp_T)"),
        test_batch_context.test_the_history_weight_uses_the_samplers_log_prob,
        unscored="none",
    ),
    row(
        "the statistic of TOP-D from the sampler's log-prob instead of the trainer's",
        Fault("train.batch_context", OLD, OLD.replace("found.logp_T", "micro_batch.rollout_logp_T")),
        test_batch_context.test_the_mixed_return_uses_the_trainers_log_prob_before_the_update,
        unscored="none",
    ),
    *(
        row(
            f"unscored rows ({unscored}) take part in the statistic: {claim.__name__}",
            Fault("train.batch_context", SCORED, SCORED.replace(" & scored.scored_T", "")),
            claim,
            unscored=unscored,
        )
        for claim in (
            test_batch_context.test_the_history_weight_uses_the_samplers_log_prob,
            test_batch_context.test_the_mixed_return_uses_the_trainers_log_prob_before_the_update,
            test_batch_context.test_the_most_uncertain_tokens_are_chosen_among_the_scored_ones,
        )
        for unscored in ("a sample", "some rows")
    ),
    row(
        "the statistic is of the rows of rank 0 alone",
        Fault("train.batch_context", "[part for part in parts if part]", "parts[:1]"),
        test_batch_context.test_the_statistic_is_computed_over_all_data_ranks_and_each_rank_gets_its_own_rows,
    ),
    row(
        "a statistic goes to the row before",
        Fault("train.batch_context", "values[starts[sample] + token]", "values[starts[sample] + token - 1]"),
        test_batch_context.test_the_history_weight_uses_the_samplers_log_prob,
        unscored="none",
    ),
)

STORED = (
    row(
        "one rank's stored scores taken as everybody's",
        Fault("mcore.collective", "return all(_of_every_rank(", "return any(_of_every_rank("),
        test_score_source.test_all_ranks_score_again_if_one_rank_has_no_scores,
        rank=1,
    ),
    row(
        "the same, where the other rank has scores of other rows",
        Fault("mcore.collective", "return all(_of_every_rank(", "return any(_of_every_rank("),
        test_score_source.test_all_ranks_score_again_if_one_rank_has_scores_of_other_rows,
        rank=0,
    ),
    row(
        "all ranks read and write the scores of rank 0",
        Fault("teacher.score_source", "(run_dir, step, self._layout.dp_rank,", "(run_dir, step, 0,"),
        test_score_source.test_scores_of_a_repeated_step_come_from_the_disk_on_every_rank,
    ),
    row(
        "scores that must not be kept are kept",
        Fault("teacher.score_source", "if not self._on_disk:", "if False:"),
        test_score_source.test_scores_of_a_source_without_storage_are_neither_written_nor_read,
    ),
    row(
        "the teacher's name is no part of what scores belong to",
        Fault("records.replay", '{"teacher": self.teacher,', '{"teacher": "",'),
        test_score_source.test_stored_scores_are_used_only_for_the_same_teacher_rows_and_candidates,
        change={"name": "another teacher"},
    ),
    row(
        "the scoring copy of the student's average is not restored on resume",
        Fault("mcore.average", "rounded[name].copy_(value)", "pass"),
        test_average_resume.test_after_a_resume_the_restored_average_scores,
        dtype="bfloat16",
    ),
    row(
        "the float32 average is not restored on resume",
        Fault("mcore.average", "value.copy_(loaded[str(index)][name])", "pass"),
        test_average_resume.test_a_resumed_average_continues_from_its_float32_numbers,
        dtype="bfloat16",
    ),
    row(
        "keep_rollouts keeps one step too few",
        Fault("records.run_dir", LIMIT, LIMIT.replace("+ 1", "+ 2")),
        test_trainer.test_after_a_checkpoint_the_newest_rollouts_are_kept_and_scores_removed,
        keep_rollouts=2,
        last_step=3,
        rollouts=[1, 2],
        scores=[],
    ),
    row(
        "keep_rollouts is not looked at",
        Fault("train.trainer", "rollouts=run.keep_rollouts,", "rollouts=None,"),
        test_trainer.test_after_a_checkpoint_the_newest_rollouts_are_kept_and_scores_removed,
        keep_rollouts=2,
        last_step=3,
        rollouts=[1, 2],
        scores=[],
    ),
    row(
        "without keep_rollouts none stay",
        Fault("records.run_dir", LIMIT, LIMIT.replace("0 if", "needed_from if")),
        test_trainer.test_after_a_checkpoint_the_newest_rollouts_are_kept_and_scores_removed,
        keep_rollouts=None,
        last_step=7,
        rollouts=[0, 1, 2, 3, 4, 5, 6],
        scores=[],
    ),
    row(
        "scores of checkpointed steps stay",
        Fault("train.trainer", "self.saved if served else step + 1", "0"),
        test_trainer.test_after_a_checkpoint_the_newest_rollouts_are_kept_and_scores_removed,
        keep_rollouts=None,
        last_step=7,
        rollouts=[0, 1, 2, 3, 4, 5, 6],
        scores=[],
    ),
    row(
        "`forget` removes the step at its bound as well",
        Fault("records.run_dir", "if _step_of(path) < limit:", "if _step_of(path) <= limit:"),
        test_run_dir.test_stored_steps_that_are_newest_or_needed_by_a_resume_are_kept,
        kept=test_run_dir.KEPT[2][0],
        first=test_run_dir.KEPT[2][1],
    ),
    row(
        "`forget` takes the bound of the scores for the rollouts",
        Fault("records.run_dir", '"rollouts": _limit(step, kept.rollouts,', '"rollouts": _limit(step, kept.scores,'),
        test_run_dir.test_stored_steps_that_are_newest_or_needed_by_a_resume_are_kept,
        kept=test_run_dir.KEPT[2][0],
        first=test_run_dir.KEPT[2][1],
    ),
    row(
        "a step that is on disk is sampled again",
        Fault("rollout.rollout_source", "if own.exists():", "if False:"),
        test_rollout_source.test_a_step_is_sampled_once_and_later_launches_get_the_same_rollouts,
    ),
    row(
        "replayed responses are not cut",
        Fault("rollout.rollout_source", "if self._config.rollout.truncate is not None:", "if False:"),
        test_rollout_source.test_a_replayed_response_is_cut_at_the_budget_of_its_step,
    ),
)

SERVED = (
    row(
        "uniforms of step 0 for every step",
        Fault("rollout.sampler", "trust_uniforms(self._seed, step,", "trust_uniforms(self._seed, 0,"),
        test_wire.test_the_uniforms_of_a_rollout_are_those_of_its_step,
    ),
    row(
        "the same, where they are drawn",
        Fault("rollout.uniforms", r'f"{seed}\n{step}\n{sample_id}"', r'f"{seed}\n{0}\n{sample_id}"'),
        test_wire.test_the_uniforms_of_a_rollout_are_those_of_its_step,
    ),
    row(
        "the same, from the step to the sampler",
        Fault("rollout.policy_server", "collect(requests, step=step,", "collect(requests, step=0,"),
        test_wire.test_rollouts_of_every_step_use_its_weights_its_prefix_and_its_uniforms,
    ),
    row(
        "uniforms of another seed than the run's",
        Fault("train.components", "seed=config.run.seed,", "seed=0,"),
        test_wire.test_rollouts_of_every_step_use_its_weights_its_prefix_and_its_uniforms,
    ),
    row(
        "no publication is proven",
        Fault("train.components", "verify_sync=config.gates.weight_sync", "verify_sync=False"),
        test_wire.test_the_first_publication_of_a_launch_is_proven_if_the_gate_is_on,
        weight_sync=True,
    ),
    row(
        "the prefix left out of the request",
        Fault("rollout.sampler", "[request.prompt_ids, request.prefix_ids]", "[request.prompt_ids]"),
        test_wire.test_the_input_of_a_request_is_the_prompt_followed_by_the_prefix,
    ),
    row(
        "the prefix before the prompt",
        Fault(
            "rollout.sampler",
            "[request.prompt_ids, request.prefix_ids]",
            "[request.prefix_ids, request.prompt_ids]",
        ),
        test_wire.test_the_input_of_a_request_is_the_prompt_followed_by_the_prefix,
    ),
    row(
        "the KV cache of old weights kept",
        Fault("rollout.fleet_update", "self.client.flush_cache()", "pass"),
        test_wire.test_after_an_update_no_token_is_sampled_from_the_cache_of_the_old_weights,
    ),
    row(
        "the KV cache of old weights kept, seen by a launch",
        Fault("rollout.fleet_update", "self.client.flush_cache()", "pass"),
        test_wire.test_rollouts_of_every_step_use_its_weights_its_prefix_and_its_uniforms,
    ),
    row(
        "temperature 1 on the wire",
        Fault("serving.wire", '"temperature": request.temperature,', '"temperature": 1.0,'),
        test_wire.test_every_request_has_the_sampling_settings_of_the_configuration,
        rollout={"temperature": 0.7},
        expected={"temperature": 0.7},
    ),
    row(
        "temperature 1 in the request",
        Fault("rollout.sampler", "temperature=self._config.temperature,", "temperature=1.0,"),
        test_wire.test_every_request_has_the_sampling_settings_of_the_configuration,
        rollout={"temperature": 0.7},
        expected={"temperature": 0.7},
    ),
    row(
        "another length on the wire",
        Fault("rollout.sampler", "max_new_tokens=request.max_new_tokens,", "max_new_tokens=6,"),
        test_wire.test_every_request_has_the_sampling_settings_of_the_configuration,
        rollout={},
        expected={},
    ),
    row(
        "weights published once a launch",
        Fault("rollout.policy_server", "if member.version != version]", "if member.version is None]"),
        test_policy_server.test_the_weights_of_a_step_are_published_once_and_before_it_is_sampled,
    ),
    row(
        "weights published for every request of a step",
        Fault("rollout.policy_server", "if member.version != version]", "if True]"),
        test_policy_server.test_the_weights_of_a_step_are_published_once_and_before_it_is_sampled,
    ),
    row(
        "every publication is proven",
        Fault("rollout.policy_server", "self._verify_sync = False", "pass"),
        test_policy_server.test_only_the_first_publication_of_a_launch_is_proven,
    ),
    row(
        "after a restart the weights of the folder are sampled from",
        Fault("rollout.member", "time.monotonic()\n        self.version = None", "time.monotonic()"),
        test_policy_server.test_after_a_server_death_weights_are_published_again_and_only_missing_samples_requested,
    ),
    row(
        "a server that missed an update takes requests",
        Fault("rollout.policy_server", "if member.version == version}", "if member}"),
        test_policy_server.test_a_server_that_refuses_an_update_is_started_again_while_the_others_go_on,
    ),
    row(
        "after a restart everything is sampled again",
        Fault("rollout.policy_server", "expected_version=version, found=found)",
              "expected_version=version, found=Collected())"),
        test_policy_server.test_after_a_server_death_weights_are_published_again_and_only_missing_samples_requested,
    ),
    row(
        "a launch uses the labels of an earlier one",
        Fault("rollout.policy_server", "uuid.uuid4().hex[:8]", '"launch"'),
        test_policy_server.test_a_version_label_contains_the_step_and_is_unique_to_its_launch,
    ),
    row(
        "rank 0 leaves a weight stream that failed before its end",
        Fault("rollout.policy_server", "streams.exhaust()", "self._layout.rank and streams.exhaust()"),
        test_policy_server.test_every_rank_finishes_all_weight_streams_of_a_publication_that_fails_on_rank_zero,
        verify_sync=True,
        taken=2,
    ),
)  # fmt: skip

ROWS = (*GATES, *SCHEDULES, *STATISTICS, *STORED, *SERVED)


@pytest.mark.parametrize(("fault", "claim", "arguments"), [pytest.param(*each[1:], id=each[0]) for each in ROWS])
def test_a_planted_fault_makes_its_glue_test_fail(
    fault: Fault, claim: Callable[..., None], arguments: dict[str, Any], tmp_path: Path
) -> None:
    if "tmp_path" in inspect.signature(claim).parameters:
        arguments = {**arguments, "tmp_path": tmp_path}
    with planted(fault), pytest.raises(NOTICED):
        claim(**arguments)
    assert PLANTED == []


@pytest.mark.parametrize("text", ["no such text", "p99"])
def test_a_fault_whose_text_is_missing_or_ambiguous_is_refused(text: str) -> None:
    message = f"tropd_mcore.train.gates has .* times {text!r}"
    with pytest.raises(AssertionError, match=message), planted(Fault("train.gates", text, "")):
        pass


def test_a_fault_outside_all_functions_is_refused() -> None:
    fault = Fault("train.gates", "FLOAT32_BOUNDS = (1e-4, 1e-2)", "FLOAT32_BOUNDS = (1.0, 1.0)")
    with pytest.raises(AssertionError, match=r"in no function of tropd_mcore.train.gates"), planted(fault):
        pass


def test_a_fault_reaches_importers_of_the_function_and_is_undone_at_the_end_of_its_block() -> None:
    def draw() -> list[float]:
        return trust_uniforms(1, 2, "s", 3).tolist()

    def fail(*_: object) -> None:
        with planted(Fault("rollout.uniforms", "return generator.random(", "return 0 * generator.random(")):
            assert draw() == [0.0] * 3
            raise KeyError

    before = draw()
    assert min(before) > 0
    with pytest.raises(KeyError):
        fail()
    assert draw() == before and PLANTED == []
