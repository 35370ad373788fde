"""The section `teachers`: entries and their template, the names in prompts, and the metrics and charts of each teacher.

`config.teachers`, `config.teacher_template`, `config.teacher_checks`, `data.prompts` and `monitor.teacher_metrics`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.unit.test_monitor_metrics import ROLLOUTS, make_record
from tropd_mcore.config.derived import model_key, model_paths, server_name, used_servers
from tropd_mcore.config.loader import leaves, load
from tropd_mcore.config.plan import plan, resolved_yaml
from tropd_mcore.config.record import compare
from tropd_mcore.config.schema import Config
from tropd_mcore.config.teachers import alone, names_of, teachers_of, the_teacher
from tropd_mcore.data.jsonl import raise_problems
from tropd_mcore.data.prompt_file import scan_prompt_file
from tropd_mcore.data.prompts import named_teacher, teacher_problems
from tropd_mcore.errors import ConfigError, DataError
from tropd_mcore.evaluation.chart_catalogue import charts_by_teacher
from tropd_mcore.monitor.catalogue import compute_metrics
from tropd_mcore.records.replay import load_rollouts, save_rollouts
from tropd_mcore.train.resume_rules import rule_of
from tropd_mcore.weights.architecture import Architecture
from tropd_mcore.weights.gpu_memory import rank_memory

TREE: dict[str, Any] = {
    "run": {"dir": "run"},
    "platform": {"kind": "cpu"},
    "student": {"path": "student"},
    "teacher": {"path": "general", "dtype": "float32"},
    "data": {"prompts": "prompts.jsonl"},
    "objective": {"kind": "gkd"},
}
TWO = {"math": {"path": "math"}, "code": {"path": "code"}}


def loaded(folder: Path, teachers: Any, *overrides: str, **sections: Any) -> tuple[Config, dict[str, str]]:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**TREE, "teachers": teachers, **sections}, sort_keys=False))
    return load(path, list(overrides))


def problems(folder: Path, teachers: Any, *overrides: str, **sections: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        loaded(folder, teachers, *overrides, **sections)
    return caught.value.problems


def test_an_entry_takes_the_keys_of_teacher_that_it_does_not_set(tmp_path: Path) -> None:
    template = {"kind": "sglang", "path": "general", "dtype": "float32", "server": {"threads": 3, "port": 30000}}
    entries = {
        "default": None,
        "math": {"path": "math", "server": {"port": 30001}},
        "far": {"path": "far", "server": {"url": "http://10.0.0.5:3"}},
        "here": {"kind": "megatron", "path": "here", "offload": True},
    }
    config, sources = loaded(tmp_path, entries, teacher=template)
    found = config.teachers
    assert found["default"] == config.teacher and [each.dtype for each in found.values()] == ["float32"] * 4
    assert (found["math"].server.port, found["math"].server.threads) == (30001, 3)
    assert (found["far"].server.port, found["far"].server.threads) == (None, None), "a running server has its own"
    assert found["here"].server.port is None, "the keys of a server are for sglang alone"
    assert sources["teachers.math.dtype"] == sources["teacher.dtype"] and sources["teachers.math.server.port"]
    assert sources["teachers.math.server.threads"] == sources["teacher.server.threads"]


def test_a_resolved_file_gives_the_same_teachers(tmp_path: Path) -> None:
    entries = {"math": {"path": "m", "kind": "sglang", "servers": [{}, {"port": 5}]}, "default": {}}
    config, sources = loaded(tmp_path, entries)
    (tmp_path / "resolved.yaml").write_text(resolved_yaml(config, sources))
    assert load(tmp_path / "resolved.yaml", [])[0] == config
    assert compare(leaves(config), leaves(config)) == []


def test_without_teachers_the_resolved_file_and_the_plan_are_those_of_one_teacher(tmp_path: Path) -> None:
    none, sources = loaded(tmp_path, {})
    assert "\nteachers" not in resolved_yaml(none, sources) and "\nteacher      general, " in plan(none)
    assert none == loaded(tmp_path, TWO, "teachers=null")[0]
    assert [teacher.path_key for teacher in teachers_of(none)] == ["teacher.path"] and names_of(none) == ()


def test_each_teacher_has_keys_files_and_servers_of_its_own(tmp_path: Path) -> None:
    entries = {**TWO, "code": {"path": "code", "kind": "sglang", "servers": [{}, {}]}}
    config, _ = loaded(tmp_path, entries)
    assert list(model_paths(config)) == ["student.path", "teachers.math.path", "teachers.code.path"]
    served = ["teachers.code.servers.0", "teachers.code.servers.1"]
    assert list(used_servers(config)) == ["rollout.server", *served]
    assert [server_name(key) for key in served] == ["teacher-code-0", "teacher-code-1"]
    assert server_name("teachers.math.server") == "teacher-math"
    assert {model_key(key) for key in served} == {"teachers.code.path"}
    assert the_teacher(alone(config, "code")).key == "teachers.code"
    assert "teacher math" in plan(config) and "teacher code" in plan(config)


@pytest.mark.parametrize(
    ("teachers", "overrides", "line"),
    [
        ({"a.b": {}}, [], "expected names of letters, digits, - and _ that begin with a letter, found 'a.b'"),
        ({"1": {}}, [], "begin with a letter, found '1'"),
        ({"math": {}, "Math": {}}, [], "teachers: 'math' and 'Math' differ in case only"),
        (TWO, ["teachers.math.pth=x"], "teachers.math.pth: unknown key; did you mean teachers.math.path?"),
        (TWO, ["teachers.math.server.prt=1"], "unknown key; did you mean teachers.math.server.port?"),
        (TWO, ["teachers.math.offload=true", "teachers.math.kind=sglang"],
         "teachers.math.offload has no effect: teachers.math.kind=sglang runs the teacher on a server"),
        (TWO, ["teachers.math.pipeline_layers=[1,2]"], "teachers.math.pipeline_layers = [1, 2] has 2 stages"),
        (TWO, ["teacher.kind=sglang", "teacher.server.port=3000"],
         "teachers.math.server.port and teachers.code.server.port are both 3000"),
        ({"a": {"servers": [{}, {}]}, "a-1": {}}, ["teacher.kind=sglang"],
         "teachers.a.servers.1 and teachers.a-1.server would both write logs/teacher-a-1.log"),
        (TWO, ["objective={kind: gkd, full_vocabulary: true}"], "teachers: objective.full_vocabulary multiplies"),
        (TWO, ["objective={kind: sdpo}", "verifier.kind=exact_match", "teacher.path=student"],
         "teachers: objective.kind=sdpo has the student as its only teacher"),
        (TWO, ["teachers.code.kind=sglang", "objective={kind: eopd}"],
         "set teachers.code.kind=megatron"),
        (TWO, ["teachers.code.path=~/x"], "teachers.code.path: `~` is not expanded here"),
        ({"math": 3}, [], "teachers.math: expected a section with keys, found 3"),
        ([], [], "teachers: expected a valid dictionary, found []"),
    ],
)  # fmt: skip
def test_a_wrong_section_is_refused_in_one_line_with_its_key(
    tmp_path: Path, teachers: Any, overrides: list[str], line: str
) -> None:
    assert [found for found in problems(tmp_path, teachers, *overrides) if line in found]


def test_offload_of_a_teacher_is_checked_in_every_phase(tmp_path: Path) -> None:
    phases = [{"objective": {"kind": "sft"}, "until": {"step": 2}}, {"objective": {"kind": "gkd"}}]
    sections = {"objective": {"kind": "phases", "phases": phases}, "data": {"prompts": "p", "teacher_responses": "r"}}
    assert loaded(tmp_path, TWO, "teachers.math.offload=true", **sections)[0].teachers["math"].offload
    phases[1]["objective"] = {"kind": "gkd", "full_vocabulary": True}
    found = problems(tmp_path, {}, "teacher.offload=true", **sections)
    assert [line for line in found if line.startswith("teacher.offload cannot be combined with")]


def test_a_key_of_an_entry_has_the_resume_rule_of_the_template(tmp_path: Path) -> None:
    for key in ("path", "dtype", "offload", "server.port", "servers.0.url", "server.dtype"):
        assert rule_of(f"teachers.math.{key}") == rule_of(f"teacher.{key}") is not None
    before, after = (leaves(loaded(tmp_path, teachers)[0]) for teachers in ({"math": TWO["math"]}, TWO))
    assert [change.key for change in compare(before, after)] == ["teachers.code.path"], "it stands for all of its keys"


def refusal(folder: Path, lines: list[dict[str, Any]], teachers: tuple[str, ...]) -> str:
    path = folder / "prompts.jsonl"
    path.write_text(
        "".join(json.dumps({"id": f"p{index}", "prompt": "x", **line}) + "\n" for index, line in enumerate(lines))
    )
    records, found = scan_prompt_file(path)
    try:
        raise_problems([*found, *teacher_problems(records, path, teachers)])
    except DataError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("lines", "teachers", "words"),
    [
        ([{"teacher": "math"}, {"teacher": "cod"}, {"teacher": "code"}], ("math", "code"),
         ":2: prompt 'p1': teacher 'cod' is not in `teachers`; expected one of math, code"),
        ([{"teacher": "Math"}, {"teacher": "math"}], ("math",), "did you mean 'math'? Expected one of math"),
        ([{}, {"teacher": "math"}], ("math",), ":1: prompt 'p0': expected a field `teacher` with one of math, found"),
        ([{"teacher": "math"}], (), "prompt 'p0': names the teacher 'math', but the configuration has no `teachers`"),
        ([{"teacher": ""}], ("math",), ":1: prompt 'p0': expected a name as `teacher`, found ''"),
        ([{"teacher": None}], ("math",), "expected a name as `teacher`, found None"),
        ([{"teacher": ["math"]}], ("math",), "expected a name as `teacher`, found ['math']"),
        ([{"domain": "math"}], ("math",), "unknown key 'domain'; did you mean 'teacher'?"),
        ([{"teacher": "math"}], ("math", "default"), "teachers.default: no prompt of"),
        ([{"teacher": "math"}, {}], ("math", "default"), ""),
        ([{}], (), ""),
    ],
)  # fmt: skip
def test_a_prompt_names_a_teacher_that_there_is_or_none_with_a_default(
    tmp_path: Path, lines: list[dict[str, Any]], teachers: tuple[str, ...], words: str
) -> None:
    found = refusal(tmp_path, lines, teachers)
    assert words in found and bool(words) == bool(found)
    assert named_teacher(None, ("math", "default")) == "default" and named_teacher("math", ("math",)) == "math"


def test_stored_rollouts_keep_their_teachers_and_older_files_have_none(tmp_path: Path) -> None:
    named = [replace(rollout, teacher=teacher) for rollout, teacher in zip(ROLLOUTS, ("a", "b", "a"), strict=True)]
    save_rollouts(tmp_path / "new.npz", named)
    save_rollouts(tmp_path / "old.npz", ROLLOUTS)
    assert [rollout.teacher for rollout in load_rollouts(tmp_path / "new.npz")] == ["a", "b", "a"]
    assert [rollout.teacher for rollout in load_rollouts(tmp_path / "old.npz")] == [None] * 3
    with np.load(tmp_path / "old.npz") as archive:
        assert "teacher" not in archive.files, "a run with one teacher writes the same file as before"


@pytest.mark.parametrize("epochs", [1, 2])
def test_share_loss_and_kl_of_each_teacher_equal_a_loop_over_its_tokens(epochs: int) -> None:
    """The third sample was not scored, so its teacher has no tokens beside those of the first sample."""
    names = ("a", "b", "a")
    rollouts = [replace(rollout, teacher=name) for rollout, name in zip(ROLLOUTS, names, strict=True)]
    record = make_record(epochs=epochs, rollouts=rollouts, teachers=("a", "b", "nobody"))
    metrics, columns = compute_metrics(record), record.table.columns
    losses: dict[str, list[float]] = {"a": [], "b": []}
    ratios: dict[str, list[float]] = {"a": [], "b": []}
    for row in range(len(columns["on"])):
        if columns["epoch"][row] or not (columns["on"][row] or columns["off"][row]):
            continue
        name = names[columns["sample_index"][row]]
        losses[name].append(float(columns["loss"][row]))
        if columns["on"][row]:
            ratios[name].append(-float(columns["log_ratio"][row]))
    tokens = sum(map(len, losses.values()))
    for name, found in losses.items():
        assert metrics[f"teacher/{name}/share"] == pytest.approx(len(found) / tokens)
        assert metrics[f"teacher/{name}/loss"] == pytest.approx(np.mean(found))
        assert metrics[f"teacher/{name}/kl"] == pytest.approx(np.mean(ratios[name]))
    total = sum(metrics[f"teacher/{name}/share"] * metrics[f"teacher/{name}/loss"] for name in losses)
    assert total == pytest.approx(metrics["loss/objective"])
    assert metrics["teacher/nobody/share"] == 0 and np.isnan(metrics["teacher/nobody/loss"])
    assert not [name for name in compute_metrics(make_record()) if name.count("/") == 2]


def test_the_report_has_a_chart_per_quantity_with_a_line_per_teacher() -> None:
    metrics = [f"teacher/{name}/{what}" for name in ("a", "b", "c", "d", "e") for what in ("share", "loss", "kl")]
    charts = charts_by_teacher(["loss/total", "teacher/masked_samples", *metrics])
    assert [chart.title for chart in charts] == ["Tokens by teacher", "Loss by teacher", "Distance by teacher"]
    for chart, what in zip(charts, ("share", "loss", "kl"), strict=True):
        assert [line.metric for line in chart.lines] == [f"teacher/{name}/{what}" for name in "abcde"]
        assert len({(line.hue, line.dash) for line in chart.lines}) == 5
    assert charts_by_teacher(["loss/total", "teacher/masked_samples"]) == []


def test_every_teacher_in_the_job_counts_in_the_memory_and_offloaded_ones_as_the_largest(tmp_path: Path) -> None:
    def arch(layers: int) -> Architecture:
        return Architecture(
            family="qwen2", vocab_size=1000, hidden_size=64, num_layers=layers, num_heads=4, num_kv_heads=2,
            head_dim=16, ffn_hidden_size=128, rms_norm_eps=1e-6, rope_theta=1e4, rope_scaling=None, dtype="float32",
            tied_embeddings=False, qkv_bias=True, qk_norm=False, max_position_embeddings=512,
        )  # fmt: skip

    entries = {name: {"path": name} for name in ("a", "b", "c", "d")}
    entries["b"]["offload"] = entries["c"]["offload"] = True  # type: ignore[assignment]
    entries["d"]["kind"] = "sglang"
    config, _ = loaded(tmp_path, entries)
    models = {
        "student.path": arch(1),
        **{f"teachers.{name}.path": arch(2 * place) for place, name in enumerate("abcd", 1)},
    }
    found = rank_memory(config, models, 1)
    size = {}
    for name in "abc":
        config, _ = loaded(tmp_path, entries, f"teachers.{name}.offload=false")
        size[name] = rank_memory(alone(config, name), models, 1)[f"teacher {name}"]
    assert size["a"] < size["b"] < size["c"]
    assert found["teacher a"] == size["a"] and found["teacher that scores"] == size["c"]
    assert not {"teacher", "teacher b", "teacher c", "teacher d"} & found.keys()
