"""Overrides that change a kind, unknown keys that other trainers know, and problems of all sections at once."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tropd_mcore.config.aliases import ALIASES, meant_by
from tropd_mcore.config.checks import CHECKS
from tropd_mcore.config.explain import schema_keys
from tropd_mcore.config.loader import load
from tropd_mcore.config.schema import Config, PlatformConfig, RolloutConfig
from tropd_mcore.errors import ConfigError

GOOD = """\
run: {dir: runs/a}
student: {path: models/student}
teacher: {path: models/teacher}
data: {prompts: prompts.jsonl, teacher_responses: responses.jsonl}
objective:
  kind: tropd
  outlier: {topk: 16}
  guidance: {min_continuation: 8}
  policy_gradient: {mismatch: "off"}
"""


def write(folder: Path, text: str = GOOD) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def problems(folder: Path, text: str = GOOD, overrides: tuple[str, ...] | list[str] = ()) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(write(folder, text), list(overrides))
    return [line.replace(str(folder), "DIR") for line in caught.value.problems]


def test_another_objective_on_the_command_line_drops_the_files_keys_of_the_old_one_and_reports_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="tropd_mcore"):
        config, sources = load(write(tmp_path), ["objective.kind=opd", "objective.topk=8"])
    assert config.objective.kind == "opd" and config.objective.topk == 8
    assert sources["objective.policy_gradient.mismatch"].endswith("recipe.yaml:9"), "what both kinds have stays"
    assert caplog.messages == [
        "command line: objective.kind=opd has no objective.outlier, objective.guidance: left out of the file's "
        "objective; objective.policy_gradient.mismatch of the file stay"
    ]


def test_the_same_kind_on_the_command_line_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="tropd_mcore"):
        config, _ = load(write(tmp_path), ["objective.kind=tropd"])
    assert config == load(write(tmp_path), [])[0] and caplog.messages == []


def test_a_file_without_a_kind_counts_as_the_default_kind_when_the_command_line_sets_another(tmp_path: Path) -> None:
    config, _ = load(write(tmp_path, GOOD.replace("  kind: tropd\n", "")), ["objective.kind=gkd"])
    assert config.objective.kind == "gkd"


def test_keys_of_another_kind_in_the_file_itself_are_still_an_error(tmp_path: Path) -> None:
    """Even if the command line chooses a third kind, because they were wrong before."""
    text = GOOD.replace("kind: tropd", "kind: opd").replace("  guidance: {min_continuation: 8}\n", "")
    (line,) = problems(tmp_path, text)
    assert line == "DIR/recipe.yaml:7: objective.outlier: unknown key: not a key of the chosen objective.kind"
    assert problems(tmp_path, text, ["objective.kind=gkd"]) == [line]


def test_keys_of_another_kind_on_the_command_line_are_still_an_error(tmp_path: Path) -> None:
    (line,) = problems(tmp_path, overrides=["objective.kind=opd", "objective.outlier.topk=3"])
    assert line == "command line: objective.outlier: unknown key: not a key of the chosen objective.kind"


def test_a_key_that_no_kind_has_is_still_an_error_when_the_kind_changes(tmp_path: Path) -> None:
    text = GOOD.replace("  outlier:", "  outlyer: 3\n  outlier:")
    (line,) = problems(tmp_path, text, ["objective.kind=opd"])
    assert line.startswith("DIR/recipe.yaml:7: objective.outlyer: unknown key; did you mean objective.outlier?")


@pytest.mark.parametrize("overrides", [["objective.outlier=null"], ["objective.kind=opd", "objective.outlier=null"]])
def test_a_section_set_to_null_counts_as_not_set(tmp_path: Path, overrides: list[str]) -> None:
    config, _ = load(write(tmp_path), overrides)
    default, _ = load(write(tmp_path, GOOD.replace("  outlier: {topk: 16}\n", "")), overrides[:-1])
    assert config == default


def test_null_is_a_value_if_the_key_may_be_null(tmp_path: Path) -> None:
    config, _ = load(write(tmp_path), ["verifier.thinking=null", "rollout.truncate=null", "data.template_date=null"])
    assert config.verifier.thinking is None and config.rollout.truncate is None


def test_null_for_an_unknown_key_is_an_error(tmp_path: Path) -> None:
    assert (
        "rollout.trunkate: unknown key; did you mean rollout.truncate?"
        in problems(tmp_path, overrides=["rollout.trunkate=null"])[0]
    )


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("optimizer.lr", "optimizer.learning_rate"),
        ("lr", "optimizer.learning_rate"),
        ("learning_rate", "optimizer.learning_rate"),
        ("tp", "parallel.tensor or rollout.server.tensor_parallel or teacher.server.tensor_parallel"),
        ("parallel.tp", "parallel.tensor"),
        ("parallel.pp", "parallel.pipeline"),
        ("parallel.dp", "parallel.data"),
        ("parallel.cp", "parallel.context"),
        ("parallel.vp", "parallel.virtual_pipeline"),
        ("rollout.server.tp", "rollout.server.tensor_parallel"),
        ("batch.batch_size", "rollout.prompts_per_step"),
        ("batch.micro_batch_size", "batch.tokens_per_micro_batch"),
        ("rollout.max_tokens", "rollout.max_new_tokens"),
        ("rollout.max-tokens", "rollout.max_new_tokens"),
        ("max_new_tokens", "rollout.max_new_tokens"),
        ("seq_len", "batch.tokens_per_micro_batch"),
        ("rollout.n_samples", "rollout.samples_per_prompt"),
        ("num_generations", "rollout.samples_per_prompt"),
        ("objective.kl", "objective.kind or objective.divergence"),
        ("run.epochs", "run.steps"),
        ("run.save_every", "run.checkpoint_every"),
        ("run.ckpt", "run.checkpoint_every or run.init_from"),
        ("optimizer.warmup", "optimizer.warmup_steps"),
        ("optimizer.wd", "optimizer.weight_decay"),
        ("gpus", "parallel.data"),
        ("student.model", "student.path"),
        ("rollout.server.gpu_memory_utilization", "rollout.server.mem_fraction"),
    ],
)
def test_a_key_name_of_other_trainers_is_answered_with_ours(tmp_path: Path, key: str, meant: str) -> None:
    (line,) = problems(tmp_path, overrides=[f"{key}=1"])
    assert line == f"command line: {key}: unknown key; did you mean {meant}?"


def test_every_alias_leads_to_an_existing_key_and_is_not_a_key_itself() -> None:
    known = {".".join(key.split(".")[:end]) for key in schema_keys() for end in range(1, key.count(".") + 2)}
    for alias, keys in ALIASES.items():
        assert keys and set(keys) <= known, alias
        assert alias == alias.lower() and not any(f"{key.rpartition('.')[0]}.{alias}" in known for key in keys), alias
    assert meant_by("optimizer.tp") == list(ALIASES["tp"]), "nothing in that section: all of them"


def test_problems_across_sections_are_reported_together_with_those_within_sections(tmp_path: Path) -> None:
    overrides = [
        "optimizer.beta1=7",
        "optimizer.warmup_steps=900",
        "run.replay=~/runs/b",
        "parallel.sequence_parallel=true",
        "rollout.server.port=5",
        "rollout.server.url=nowhere",
        "teacher.kind=vllm",
    ]
    found = problems(tmp_path, overrides=overrides)
    assert [line.split(" ")[2] if line.startswith("command") else line.split(" ")[0] for line in found] == [
        "teacher.kind:",
        "optimizer.beta1:",
        "parallel.sequence_parallel",
        "rollout.server.url:",
        "rollout.server.url",
        "optimizer.warmup_steps",
        "run.replay:",
    ]


def test_a_wrong_value_causes_no_follow_up_problems(tmp_path: Path) -> None:
    """The intended value is unknown, so its combination with other keys is not checked."""
    assert len(problems(tmp_path, overrides=["optimizer.lr=1e-5", "optimizer.min_learning_rate=1e-5"])) == 1
    assert len(problems(tmp_path, overrides=["batch.tokens_per_micro_batch=many"])) == 1
    assert len(problems(tmp_path, overrides=["objective.kind=nope", "data.teacher_responses=null"])) == 1
    text = GOOD.replace("student: {path: models/student}\n", "")
    (line,) = problems(tmp_path, text, ["objective={kind: exopd}"])
    assert "student: missing; it has no default" in line
    (line,) = problems(tmp_path, overrides=["run.steps=soon", "optimizer.warmup_steps=900"])
    assert "run.steps" in line


def test_checking_the_valid_part_of_a_configuration_does_not_change_the_schemas_defaults(tmp_path: Path) -> None:
    """Defaults are shared between configurations."""
    problems(tmp_path, overrides=["platform.kind=gpu", "rollout.prompts_per_step=0", "batch.zzz=1"])
    fresh = Config.model_validate(
        {"run": {"dir": "r"}, "student": {"path": "s"}, "teacher": {"path": "t"}, "data": {"prompts": "p"}}
    )
    assert fresh.platform == PlatformConfig(kind="auto") and fresh.rollout == RolloutConfig()
    assert fresh.rollout.prompts_per_step == 128 and PlatformConfig().kind == "auto"


def test_every_check_across_sections_is_a_function_of_the_configuration_alone(tmp_path: Path) -> None:
    config, _ = load(write(tmp_path), [])
    assert [list(check(config)) for check in CHECKS] == [[] for _ in CHECKS]


def test_time_limits_in_the_wrong_order_are_refused(tmp_path: Path) -> None:
    (line,) = problems(tmp_path, overrides=["run.rank_timeout_s=5000", "run.stall_timeout_s=5000"])
    assert line.startswith("run.rank_timeout_s = 5000 must be below run.stall_timeout_s = 5000")
    (line,) = problems(tmp_path, overrides=["run.collective_timeout_s=3600"])
    assert line.startswith("run.collective_timeout_s = 3600 must be above run.stall_timeout_s = 3600")
    (line,) = problems(tmp_path, overrides=["run.node_timeout_s=5000", "run.stall_timeout_s=5000"])
    assert line.startswith("run.node_timeout_s = 5000 must be below run.stall_timeout_s = 5000")
    (line,) = problems(tmp_path, overrides=["run.stall_timeout_s=2000", "teacher.server.request_timeout_s=2000"])
    assert line.startswith("teacher.server.request_timeout_s = 2000 must be below run.stall_timeout_s = 2000")
    (line,) = problems(tmp_path, overrides=["rollout.server.hang_timeout_s=50", "rollout.server.request_timeout_s=40"])
    assert line.startswith("rollout.server.hang_timeout_s = 50 is above rollout.server.request_timeout_s = 40")
    load(write(tmp_path), ["rollout.server.request_timeout_s=40"])
    (line,) = problems(tmp_path, overrides=["rollout.server.url=http://h:1", "rollout.server.log_max_mib=3"])
    assert "rollout.server.log_max_mib would have no effect" in line
