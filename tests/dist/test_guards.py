"""Wrong numbers stop a step before they reach the parameters, and settings that make wrong numbers are refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from tests.dist import guard_ranks, reference
from tests.dist.layouts import Case, run_cases
from tests.dist.test_layouts import CONSTANTS, LENGTHS, relative_error
from tests.ranks import run_on_ranks
from tropd_mcore.config.schema import OptimizerConfig, ParallelConfig
from tropd_mcore.errors import ConfigError, ModelError
from tropd_mcore.mcore.checks import check_optimizer_config, check_transformer_config
from tropd_mcore.mcore.model import _rope_scaling, padded_vocabulary
from tropd_mcore.mcore.parallel import RankEnvironment, initialize
from tropd_mcore.mcore.platform import choose
from tropd_mcore.weights.architecture import cut_problems, read_architecture


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    teacher = reference.write_model(reference.TEACHER, folder / "teacher", seed=11)
    return reference.write_model(reference.STUDENTS["qwen3"], folder / "student", seed=5), teacher


@pytest.mark.parametrize("case", [Case(), Case(pipeline=2), Case(tensor=2)], ids=["dp2", "pp2", "tp2"])
def test_a_non_finite_loss_names_the_sample_and_moves_no_parameter(folders: tuple[Path, Path], case: Case) -> None:
    rollouts = reference.make_rollouts(LENGTHS)
    case = replace(case, optimizer=OptimizerConfig())
    answers = run_on_ranks(guard_ranks.non_finite_step, 2, *folders, rollouts, case, 16, True)
    loss_errors = {loss_error for loss_error, _, _ in answers if loss_error}
    assert len(loss_errors) == 1, "the last stage that has the sample reports it"
    message = loss_errors.pop()
    assert re.search(r"step 7: the loss of micro-batch \d+ is nan", message)
    assert f"sample-{guard_ranks.BROKEN_SAMPLE}, token {guard_ranks.BROKEN_TOKEN} " in message
    assert len({optimizer_error for _, optimizer_error, _ in answers}) == 1, "all ranks stop with the same words"
    assert re.search(r"step 7: the gradient norm is nan.* first in \S+ of rank 0", answers[0][1])
    assert all(untouched for _, _, untouched in answers)


def test_a_nan_teacher_log_prob_is_not_treated_as_distrust(folders: tuple[Path, Path]) -> None:
    """A comparison with NaN is false. Without a check, the token would be an outlier with a finite loss."""
    case = Case(optimizer=OptimizerConfig())
    rollouts = reference.make_rollouts(LENGTHS)
    ((loss_error, _, _),) = run_on_ranks(guard_ranks.non_finite_step, 1, *folders, rollouts, case, 16, False)
    assert f"sample-{guard_ranks.BROKEN_SAMPLE}, token {guard_ranks.BROKEN_TOKEN} " in loss_error
    assert "teacher_logp nan" in loss_error


def test_a_model_without_loaded_weights_has_no_finite_logit(folders: tuple[Path, Path]) -> None:
    rollouts = reference.make_rollouts(LENGTHS)
    assert run_on_ranks(guard_ranks.logits_of_a_model_without_weights, 1, folders[0], rollouts) == [True]


def test_the_dry_run_reaches_every_gradient_and_leaves_nothing_behind(folders: tuple[Path, Path]) -> None:
    cases = {
        "tp2": Case(tensor=2, sequence_parallel=True),
        "pp2-vpp2": Case(pipeline=2, virtual_pipeline=2),
        "cp2": Case(context=2),
    }
    for answers in run_on_ranks(guard_ranks.dry_run_and_look, 2, folders[0], cases, 50, 16, 3):
        assert answers == dict.fromkeys(cases, (True, True, True))


def test_sampled_log_probs_equal_those_of_the_training_forward(folders: tuple[Path, Path]) -> None:
    rollouts = reference.make_rollouts(LENGTHS)
    constants = replace(CONSTANTS, temperature=1.0)
    step = run_on_ranks(run_cases, 1, *folders, rollouts, {"one": Case()}, constants)[0]["one"]
    pieces = run_on_ranks(guard_ranks.log_probs_without_gradients, 1, folders[0], rollouts, Case())[0]
    found = torch.cat([piece for piece in pieces if piece is not None])
    assert not found.requires_grad
    assert torch.equal(found.double().sort().values, step["columns"]["student_logp"].sort().values)


def test_samples_without_teacher_scores_are_left_out_of_loss_and_denominator(folders: tuple[Path, Path]) -> None:
    """Dropping them before or after scoring gives the same step. The prefix rows of sample 2 are dropped too."""
    rollouts = reference.make_rollouts(LENGTHS)
    assert len(rollouts[2].prefix_ids) and rollouts[2].carries_prefix_loss
    kept = [rollouts[index] for index in (0, 3, 4, 5, 6)]
    run = guard_ranks.step_with_unscored_samples
    masked, gradients = run_on_ranks(run, 2, *folders, rollouts, Case(), 16, [1, 2])[0]
    expected, expected_gradients = run_on_ranks(run, 1, *folders, kept, Case(), 16, [])[0]
    assert masked["token_count"] == expected["token_count"]
    assert masked["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    for name, gradient in expected_gradients.items():
        assert relative_error(gradients[name], gradient) <= 1e-5, name


def test_tokens_that_the_teacher_lacks_are_not_scored_and_have_probability_zero_as_candidates(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    small = reference.write_model(reference.small_vocabulary(70), tmp_path / "small", seed=3)
    rollouts = reference.make_rollouts(LENGTHS)
    run = guard_ranks.teacher_of_smaller_vocabulary
    for target_ids, scored, candidates in run_on_ranks(run, 1, small, rollouts, 16, [0, 70, 69])[0]:
        assert torch.equal(scored, target_ids < 70)
        assert candidates[:, [0, 2]].isfinite().all() and candidates[:, 1].isneginf().all()


def test_bfloat16_gradients_are_close_to_those_of_float32(folders: tuple[Path, Path]) -> None:
    rollouts = [replace(r, trust_u=0.0 * r.trust_u) for r in reference.make_rollouts(LENGTHS)]
    sharded = Case(tensor=2, sequence_parallel=True, dtype="bfloat16")
    cases = {
        "float32": replace(sharded, dtype="float32"),
        "deferred": sharded,
        "folded": replace(sharded, weight_gradient="folded", overlap_chunks=True),
        "logits": replace(sharded, form="logits"),
        "pipeline": Case(pipeline=2, dtype="bfloat16", weight_gradient="recompute"),
    }
    found = run_on_ranks(run_cases, 2, *folders, rollouts, cases, CONSTANTS)[0]
    expected = found.pop("float32")
    for case, step in found.items():
        assert step["loss"] == pytest.approx(expected["loss"], rel=0.03), case
        for name, exact in expected["gradients"].items():
            rounded = step["gradients"][name].float()
            similarity = torch.nn.functional.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0)
            assert similarity > 0.98, (case, name)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"overlap_p2p_comm": False, "batch_p2p_comm": True}, "batch_p2p_comm must be False"),
        ({"deallocate_pipeline_outputs": True}, "deallocate_pipeline_outputs must be False"),
        ({"calculate_per_token_loss": False}, "calculate_per_token_loss must be True"),
        ({"cross_entropy_loss_fusion": True}, "cross_entropy_loss_fusion must be False"),
    ],
)
def test_model_settings_that_would_silently_train_wrongly_are_refused(changed: dict[str, bool], words: str) -> None:
    right = {
        "overlap_p2p_comm": True,
        "batch_p2p_comm": False,
        "deallocate_pipeline_outputs": False,
        "calculate_per_token_loss": True,
    }
    sizes = {
        "num_layers": 4,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
        "pipeline_dtype": torch.float32,
    }
    check_transformer_config(TransformerConfig(**sizes, **right))
    with pytest.raises(ConfigError, match=words):
        check_transformer_config(TransformerConfig(**sizes, **{**right, **changed}))


def test_optimizer_settings_that_update_wrongly_are_refused() -> None:
    check_optimizer_config(MegatronOptimizerConfig(), {})
    with pytest.raises(ConfigError, match="config_overrides must be given"):
        check_optimizer_config(MegatronOptimizerConfig(), None)
    with pytest.raises(ConfigError, match="fp16 is not supported"):
        check_optimizer_config(MegatronOptimizerConfig(fp16=True), {})


def test_every_parallel_size_that_does_not_divide_the_model_is_named(folders: tuple[Path, Path]) -> None:
    problems = "; ".join(
        cut_problems(read_architecture(folders[0]), ParallelConfig(tensor=4, pipeline=3), virtual_pipeline=None)
    )
    assert "num_hidden_layers = 4 of qwen3 is not divisible by parallel.pipeline" in problems
    assert "num_key_value_heads = 2 of qwen3 is not divisible by parallel.tensor = 4" in problems


def test_a_rope_scaling_that_megatron_computes_differently_is_refused(tmp_path: Path) -> None:
    arch = read_architecture(reference.write_model(reference.STUDENTS["llama"], tmp_path / "llama", seed=1))
    assert _rope_scaling(arch) == {"rope_scaling": True, "rope_scaling_factor": 8.0}
    assert arch.rope_scaling is not None
    other = replace(arch, rope_scaling={**arch.rope_scaling, "high_freq_factor": 2.0})
    with pytest.raises(ModelError, match="high_freq_factor"):
        _rope_scaling(other)


def test_the_vocabulary_is_padded_to_128_columns_per_tensor_rank() -> None:
    assert [padded_vocabulary(151936, tp) for tp in (1, 2, 8)] == [151936, 152064, 152576]


def test_a_world_of_the_wrong_size_is_refused_before_any_group_is_made() -> None:
    environment = RankEnvironment(rank=0, world_size=16, local_rank=0)
    with pytest.raises(ConfigError, match=r"2\*2\*1\*3 = 12, but this launch has 16 ranks; .*launch 12 ranks"):
        initialize(ParallelConfig(tensor=2, pipeline=2, data=3), choose("cpu"), seed=1, environment=environment)


def test_a_job_started_without_torchrun_is_told_to_use_it() -> None:
    assert RankEnvironment.from_environ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}) == RankEnvironment(3, 4, 1)
    with pytest.raises(ConfigError, match="WORLD_SIZE is '', expected a number; launch the job with torchrun"):
        RankEnvironment.from_environ({"RANK": "3", "LOCAL_RANK": "1"})
