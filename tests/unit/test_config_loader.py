"""Loading a configuration: sources, all problems at once, and messages that say what to write instead."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml

import tropd_mcore.config
from tropd_mcore.config import loader
from tropd_mcore.config.explain import schema_keys
from tropd_mcore.config.loader import leaves, load
from tropd_mcore.config.objectives import ObjectiveConfig
from tropd_mcore.config.objectives.trust_region import OpdObjective
from tropd_mcore.config.plan import plan, resolved_yaml
from tropd_mcore.errors import ConfigError

GOOD = """\
run:
  dir: runs/a
student:
  path: models/student
teacher:
  kind: megatron
  path: models/teacher
data:
  prompts: prompts.jsonl
  teacher_responses: responses.jsonl
optimizer:
  learning_rate: 1e-5
"""

KINDS = [get_args(kind.model_fields["kind"].annotation)[0] for kind in get_args(get_args(ObjectiveConfig)[0])]
"""Every `objective.kind`."""


def write(folder: Path, text: str = GOOD) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def problems(folder: Path, text: str = GOOD, overrides: list[str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(write(folder, text), overrides or [])
    return [problem.replace(str(folder), "DIR") for problem in caught.value.problems]


def test_a_file_gives_its_values_and_the_lines_they_came_from(tmp_path):
    path = write(tmp_path)
    config, sources = load(path, [])
    assert config.run.dir == Path("runs/a") and config.optimizer.learning_rate == 1e-5
    assert sources["run.dir"] == f"{path}:2" and sources["optimizer.learning_rate"] == f"{path}:12"
    assert sources["run.steps"] == "default" and sources["objective.guidance.beta"] == "default"
    assert set(sources) == set(leaves(config))


def test_overrides_are_yaml_and_win_over_the_file(tmp_path):
    overrides = [
        "optimizer.learning_rate=3e-6",
        "parallel.sequence_parallel=false",
        "objective.policy_gradient.mismatch=off",
        "rollout.server.extra_args=[--enable-metrics, --log-level, warning]",
        "run.steps=7",
        "run.steps=8",
        "run.dir=a=b",
        "data.teacher_responses=other.jsonl",
    ]
    config, sources = load(write(tmp_path), overrides)
    assert config.optimizer.learning_rate == 3e-6 and config.run.steps == 8
    assert config.objective.policy_gradient.mismatch == "off"
    assert config.rollout.server.extra_args == ("--enable-metrics", "--log-level", "warning")
    assert config.run.dir == Path("a=b")
    assert sources["run.steps"] == sources["rollout.server.extra_args"] == "command line"


def test_a_section_set_on_the_command_line_replaces_that_of_the_file(tmp_path):
    text = GOOD + "objective:\n  kind: tropd\n  guidance:\n    beta: 0.5\n"
    config, sources = load(write(tmp_path, text), ["objective={kind: opd, topk: 8}"])
    assert isinstance(config.objective, OpdObjective) and config.objective.topk == 8
    assert sources["objective.topk"] == "command line"


def test_keys_of_the_default_variant_need_no_kind(tmp_path):
    config, _ = load(write(tmp_path), ["objective.guidance.beta=0.25"])
    assert config.objective.kind == "tropd" and config.objective.guidance.beta == 0.25


@pytest.mark.parametrize(
    ("text", "value"), [("off", "off"), ("yes", "yes"), ("1e-3", 1e-3), ("5E6", 5e6), ("0o7", "0o7"), ("1:30", "1:30")]
)
def test_scalars_follow_yaml_1_2(text, value):
    parsed = loader.parse_yaml(text, "x").value
    assert parsed == value and type(parsed) is type(value)


def test_all_problems_are_reported_at_once_with_their_places(tmp_path):
    text = (
        GOOD.replace("learning_rate: 1e-5", "lerning_rate: 1e-5\n  beta1: 7\n  eps: tiny") + "objctive: {}\nrun: {}\n"
    )
    found = problems(tmp_path, text, ["run.steps=0", "nonsense", "teacher.kind=vllm", "rollout.min_continuation=1"])
    assert found == [
        "DIR/recipe.yaml:16: run: given twice, first in line 1; keep one",
        "command line: expected section.key=value, found 'nonsense'",
        "command line: run.steps: expected greater than 0, found 0",
        "command line: teacher.kind: expected 'megatron' or 'sglang', found 'vllm'",
        "command line: rollout.min_continuation: unknown key; did you mean objective.guidance.min_continuation?",
        "DIR/recipe.yaml:13: optimizer.beta1: expected less than or equal to 1, found 7",
        "DIR/recipe.yaml:14: optimizer.eps: expected a valid number, found 'tiny'",
        "DIR/recipe.yaml:12: optimizer.lerning_rate: unknown key; did you mean optimizer.learning_rate?",
        "DIR/recipe.yaml:15: objctive: unknown key; did you mean objective?",
    ]


def test_an_unknown_key_inside_a_variant_is_found_without_the_variant_in_its_name(tmp_path):
    (problem,) = problems(tmp_path, overrides=["objective.guidance.bta=1"])
    assert problem == "command line: objective.guidance.bta: unknown key; did you mean objective.guidance.beta?"


def test_an_unknown_key_that_resembles_no_other_lists_the_keys_of_the_section(tmp_path):
    (problem,) = problems(tmp_path, overrides=["platform.zzz=1"])
    assert problem == "command line: platform.zzz: unknown key; platform has deterministic, kind"


def test_a_renamed_key_is_an_error_that_names_the_new_key(tmp_path, monkeypatch):
    monkeypatch.setitem(loader.RENAMED_KEYS, "optimizer.lr", "optimizer.learning_rate")
    (problem,) = problems(tmp_path, GOOD.replace("learning_rate", "lr"))
    assert problem == "DIR/recipe.yaml:12: optimizer.lr: unknown key: it was renamed; use optimizer.learning_rate"


def test_renamed_keys_lead_to_keys_that_exist_and_do_not_exist_themselves():
    known = schema_keys()
    for old, new in loader.RENAMED_KEYS.items():
        assert new in known and old not in known


def test_an_objective_that_does_not_exist_lists_those_that_do(tmp_path):
    (problem,) = problems(tmp_path, overrides=["objective.kind=opt"])
    assert problem.startswith("command line: objective.kind: expected one of 'tropd', 'opd', 'aopd', 'tropd_aopd', ")
    assert problem.endswith(", 'custom', 'phases', found 'opt'")


def test_a_key_of_another_objective_is_reported_as_such(tmp_path):
    (problem,) = problems(tmp_path, overrides=["objective.kind=opd", "objective.outlier.topk=3"])
    assert problem == "command line: objective.outlier: unknown key: not a key of the chosen objective.kind"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run:\x00 {}", "DIR/recipe.yaml: not valid YAML: character 5 is 0x0"),
        ("run: [", "DIR/recipe.yaml:1: not valid YAML"),
        ("- 1\n", "DIR/recipe.yaml: expected sections such as `run:`, found \\[1\\]"),
        ("a: !!python/object:os.system {}\n", "DIR/recipe.yaml:1: not valid YAML"),
        ("run: 3\n", "DIR/recipe.yaml:1: run: expected a section with keys, found 3"),
    ],
)
def test_the_error_for_a_file_that_is_not_a_configuration_gives_the_place(tmp_path, text, expected):
    assert re.match(expected, problems(tmp_path, text)[0])


def test_an_override_below_a_plain_value_is_refused_because_it_has_no_keys(tmp_path):
    assert problems(tmp_path, overrides=["run.dir.x=1"])[0] == (
        "command line: run.dir.x: dir holds 'runs/a', which has no keys"
    )


def test_a_missing_file_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot read the configuration: No such file"):
        load(tmp_path / "absent.yaml", [])


def test_the_resolved_file_loads_to_the_same_config_and_names_every_source(tmp_path):
    overrides = [
        "rollout.server.extra_args=['--a', 'b: c # d']",
        "objective.policy_gradient.mismatch=off",
        "run.dir=päth with spaces",
        "teacher={kind: sglang, path: t, server: {url: 'http://h:1'}}",
    ]
    config, sources = load(write(tmp_path), overrides)
    text = resolved_yaml(config, sources)
    again, _ = load(write(tmp_path, text), [])
    assert again == config
    assert "  steps: 200  # default\n" in text and "  dir: päth with spaces  # command line\n" in text
    assert yaml.safe_load(text)["teacher"]["server"]["url"] == "http://h:1"
    leaf_lines = [line for line in text.splitlines() if "  # " in line]
    assert len(leaf_lines) == len(leaves(config))


@pytest.mark.parametrize(
    "overrides",
    [
        *(
            [f"objective={{kind: {kind}}}", "verifier.kind=exact_match", "data.teacher_responses=r.jsonl"]
            for kind in sorted(set(KINDS) - {"custom", "rlad", "sdpo", "opsd"})
        ),
        ["objective={kind: sdpo}", "verifier.kind=exact_match", "teacher.path=models/student"],
        ["objective={kind: opsd}", "verifier.kind=exact_match", "teacher.path=models/student"],
        ["objective={kind: rlad, policy_gradient: {ratio: ppo_clip}}", "verifier.kind=exact_match"],
        ["objective={kind: custom, function: 'a.b:c', arguments: {x: 1, y: {z: text}}}"],
        ["rollout.truncate={start: 5}", "rollout.truncate.every=7", "loss.ignore_first_of=['<', \"it's\"]"],
    ],
    ids=lambda overrides: overrides[0].split(",")[0],
)
def test_the_resolved_file_of_every_objective_loads_to_the_same_config(tmp_path, overrides):
    config, sources = load(write(tmp_path), overrides)
    text = resolved_yaml(config, sources)
    again, _ = load(write(tmp_path, text), [])
    assert again == config
    assert len([line for line in text.splitlines() if "  # " in line]) == len(leaves(config))
    assert "objective" in plan(config)


def test_the_plan_shows_layout_samples_schedule_and_files(tmp_path):
    config, _ = load(write(tmp_path), ["parallel.tensor=2", "parallel.pipeline=2", "monitor.tensorboard=true"])
    text = plan(config, world_size=12)
    assert "tp 2 x pp 2 x cp 1 x dp 3 = 12 ranks" in text
    assert "128 prompts x 4 = 512 samples, at most 5,193,728 tokens + teacher prefixes in packs of 16,384" in text
    assert "alpha 1.000 at 0, 0.854 at 50, 0.500 at 100, 0.146 at 150, 0.000 at 200" in text
    for expected in ("runs/a/metrics.jsonl", "runs/a/export", "runs/a/tensorboard", "models/teacher"):
        assert expected in text
    replayed, _ = load(write(tmp_path), ["run.replay=runs/b"])
    assert "replayed from runs/b" in plan(replayed)
    assert "dp ? = WORLD_SIZE ranks, a multiple of 4" in plan(config)


def test_the_plan_of_plain_opd_names_a_running_teacher_server(tmp_path):
    overrides = ["objective={kind: opd}", "teacher={kind: sglang, path: t, server: {url: 'http://h:1'}}"]
    config, _ = load(write(tmp_path), overrides)
    text = plan(config)
    assert (
        "opd: every token trusted" in text
        and "scored by SGLang at http://h:1" in text
        and "off: every token is sampled" in text
    )


@pytest.mark.parametrize(
    ("objective", "line"),
    [
        ("{kind: power_opd}", "power_opd: topk 64, power 5"),
        (
            "{kind: exopd, policy_gradient: {ratio: ppo_clip, mini_batches: 4, epochs: 2}}",
            "exopd: topk 64, scale 1.25; ratio ppo_clip; 8 updates per step (4 mini-batches x 2 epochs); "
            "reference models/student",
        ),
        (
            "{kind: rethinking, support: union}",
            "rethinking: support union, topk 16, student_topk 16; ratio ppo_clip; the student's own top-16",
        ),
        ("{kind: entropy_opd}", "entropy_opd: topk 64, fraction 0.2, denominator selected; a statistic over the batch"),
        (
            "{kind: gkd, full_vocabulary: true}",
            "gkd: divergence fkl, beta 0.5, full_vocabulary on, topk 64, norm tail, gradient direct",
        ),
        (
            "{kind: tropd_aopd, aopd_weight: 0.5}",
            "tropd_aopd: trust bernoulli, outliers fkl_direct x 1 (truncated top-64), "
            "plus forward KL x 0.5 where q - p <= 0",
        ),
    ],
)
def test_the_plan_has_one_line_for_an_objective_of_any_kind(tmp_path, objective, line):
    config, _ = load(write(tmp_path), [f"objective={objective}"])
    (found,) = [text for text in plan(config).splitlines() if text.startswith("objective ")]
    assert found.removeprefix("objective").strip() == line


def test_the_plan_shows_the_form_of_the_loss_and_the_truncation(tmp_path):
    overrides = [
        "loss.form=logits",
        "loss.logit_softcap=30",
        "loss.ignore_tokens=[a, b]",
        "rollout.truncate={every: 5}",
    ]
    config, _ = load(write(tmp_path), overrides)
    text = plan(config)
    assert "logits given, auto backend, 2,048 rows per chunk, token_mean, logits capped at 30, 2 tokens" in text
    assert "responses cut at 256 tokens, 256 more every 5 steps" in text


def test_the_config_package_imports_no_torch():
    code = (
        "import sys, tropd_mcore.config.loader, tropd_mcore.config.plan;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'megatron', 'aiohttp', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0


def test_the_config_package_reads_no_environment_and_no_argv():
    for path in Path(tropd_mcore.config.__file__).parent.glob("*.py"):
        names = {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert not names & {"os.environ", "os.getenv", "sys.argv"}, path


def test_every_leaf_of_the_schema_has_a_description():
    kinds = {key for key in schema_keys() if key.endswith(".kind")}
    undocumented = [key for key, field in schema_keys().items() if not field.description and key not in kinds]
    assert undocumented == []


def test_an_unknown_key_of_the_command_line_is_not_placed_in_the_file(tmp_path):
    text = GOOD + "objective: {kind: tropd}\n" if "objective" not in GOOD else GOOD
    (line,) = problems(tmp_path, text, ["objective.gidance.enabled=true"])
    assert line.startswith("command line: objective.gidance: unknown key")
