"""`tropd doctor`: its findings about this machine and a configuration, by level, key and exit code."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_models import write_tiny_model
from tropd_mcore.cli import checks_of_config, checks_of_machine
from tropd_mcore.cli import main as cli
from tropd_mcore.cli.checks_of_start import start_checks
from tropd_mcore.config.loader import load
from tropd_mcore.records.run_dir import RunDir
from tropd_mcore.train.preflight import CHEAP_CHECKS
from tropd_mcore.train.start_checks import START_CHECKS, State

RECIPE = """\
run: {dir: DIR/run, steps: 8}
platform: {kind: cpu}
parallel: {tensor: 2, pipeline: 2}
student: {path: DIR/student}
teacher: {kind: megatron, path: DIR/teacher}
data: {prompts: DIR/prompts.jsonl, teacher_responses: DIR/responses.jsonl, max_prompt_tokens: 64}
rollout: {max_new_tokens: 32}
objective: {kind: tropd, guidance: {min_continuation: 1}}
batch: {tokens_per_micro_batch: 256}
"""
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name in ("student", "teacher"):
        write_tiny_model(root / name, num_hidden_layers=2)
    return root


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("DIR", str(tmp_path)))
    return str(path)


@pytest.fixture
def files(tmp_path: Path, models: Path) -> Path:
    """All files that the recipe names."""
    for name in ("student", "teacher"):
        (tmp_path / name).mkdir()
        for file in (models / name).iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    (tmp_path / "prompts.jsonl").write_text('{"id": "a", "prompt": "two pears"}\n')
    (tmp_path / "responses.jsonl").write_text('{"id": "a", "response_ids": [5, 6]}\n')
    return tmp_path


def doctor(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    """The exit code and the lines. Asserts that stderr is empty."""
    code = cli.main(["doctor", *arguments])
    captured = capsys.readouterr()
    assert captured.err == ""
    return code, captured.out.splitlines()


def at(level: str, lines: list[str]) -> dict[str, str]:
    """{name: text} of the lines of a level."""
    pattern = re.compile(rf"{level:<4}  (.{{26}})  (.*)")
    return {match[1].strip(): match[2] for line in lines if (match := pattern.fullmatch(line))}


def test_doctor_passes_on_this_machine_with_files_that_exist(
    capsys: pytest.CaptureFixture[str], recipe: str, files: Path
) -> None:
    code, lines = doctor(capsys, recipe)
    assert code == 0 and lines[0].startswith("doctor: this machine and ") and not at("FAIL", lines)
    assert lines[-1].startswith("doctor: no FAIL")
    fine = at("ok", lines)
    assert "will be created" in fine["run.dir"] and fine["data.prompts"].startswith("1 of up to ")
    assert {"python", "platform", "compiler", "loopback", "proxies", "memory", "disk", "devices"} <= fine.keys()
    assert not (files / "run").exists(), "it changes nothing"


def test_doctor_without_a_configuration_checks_only_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = doctor(capsys)
    assert code == 0 and lines[0] == "doctor: this machine" and "student.path" not in at("ok", lines)


def test_doctor_prints_a_line_before_it_imports_anything_heavy() -> None:
    """The first line comes before torch, whose import may take long on a busy machine."""
    code = (
        "import sys; from tropd_mcore.cli import doctor_command, main as cli\n"
        "class Told(Exception): pass\n"
        "def machine(nodes): raise Told\n"
        "doctor_command._machine = machine\n"
        "try: cli.main(['doctor'])\n"
        "except Told: pass\n"
        "print(sorted({'torch', 'megatron', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert result.stdout.splitlines() == ["doctor: this machine", "[]"]


def test_doctor_reads_every_tokenizer_and_reports_what_is_wrong(
    capsys: pytest.CaptureFixture[str], recipe: str, files: Path
) -> None:
    (files / "teacher" / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    code, lines = doctor(capsys, recipe)
    failed = at("FAIL", lines)
    assert code == 2 and re.search(r"/teacher/tokenizer\.json.*Git LFS pointer", failed["tokenizer"])


def test_doctor_does_not_read_tokenizers_if_the_gate_is_off(
    capsys: pytest.CaptureFixture[str], recipe: str, files: Path
) -> None:
    _, lines = doctor(capsys, recipe, "gates.tokenizer=false")
    assert at("ok", lines)["tokenizer"] == "not checked (gates.tokenizer=false)"


def test_doctor_names_the_lines_that_training_would_refuse(
    capsys: pytest.CaptureFixture[str], recipe: str, files: Path
) -> None:
    """All of them up to ten, and how many more there are."""
    bad = "".join(f'{{"id": "p{index}"}}\n' for index in range(12))
    (files / "prompts.jsonl").write_text('{"id": "a", "prompt": "two pears", "label": "2"}\n' + bad)
    code, lines = doctor(capsys, recipe)
    failed = [line for line in lines if line.startswith("FAIL")]
    assert code == 2 and len(failed) == 11 and all(line[6:].startswith("data.prompts ") for line in failed)
    assert f"{files / 'prompts.jsonl'}:1: unknown key 'label'; did you mean 'answer'?" in failed[0]
    assert "prompts.jsonl:2: prompt 'p0': expected either `messages` or `prompt`, found neither" in failed[1]
    assert failed[-1].endswith("... and 3 more")


def test_a_wrong_end_token_is_reported_by_its_key_and_the_prompts_are_skipped(
    capsys: pytest.CaptureFixture[str], recipe: str, files: Path
) -> None:
    code, lines = doctor(capsys, recipe, "rollout.end_tokens=[nope]")
    failed = at("FAIL", lines)
    assert code == 2 and set(failed) == {"rollout.end_tokens"}
    assert any("rollout.end_tokens: 'nope' is no token of the student" in line for line in lines)
    assert next(line for line in lines if line.startswith("skip")).endswith(
        ": data.prompts, lengths, objective.template, held_out"
    )


def test_doctor_names_each_file_that_is_missing(capsys: pytest.CaptureFixture[str], recipe: str) -> None:
    code, lines = doctor(capsys, recipe)
    assert code == 2 and lines[-1] == "doctor: 3 FAIL, 1 warn: a run would not start"
    assert list(at("FAIL", lines)) == ["student.path", "teacher.path", "data.prompts"]


def test_missing_responses_that_prefixes_will_write_are_only_a_warning(
    capsys: pytest.CaptureFixture[str], recipe: str, files: Path
) -> None:
    (files / "responses.jsonl").unlink()
    code, lines = doctor(capsys, recipe)
    assert code == 0
    assert (
        "not yet made; run `tropd prefixes` with the same arguments first"
        in at("warn", lines)["data.teacher_responses"]
    )
    assert "without the teacher responses" in at("ok", lines)["data.prompts"]


def test_missing_responses_that_no_objective_continues_are_not_reported(
    capsys: pytest.CaptureFixture[str], recipe: str, files: Path
) -> None:
    (files / "responses.jsonl").unlink()
    code, lines = doctor(capsys, recipe, "objective.guidance.enabled=false")
    assert code == 0 and "data.teacher_responses" not in at("warn", lines) | at("FAIL", lines)


def test_doctor_finds_a_taken_port_and_a_server_that_does_not_answer(recipe: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    config, _ = load(recipe, [f"rollout.server.url=http://127.0.0.1:{port}"])
    (finding,) = checks_of_config.servers(config)
    assert finding.level == "FAIL" and "does not answer /health" in finding.detail


def test_doctor_tells_what_the_interpreter_of_a_server_has(recipe: str, tmp_path: Path) -> None:
    config, _ = load(recipe, [f"rollout.server.python={sys.executable}"])
    (finding,) = checks_of_config.servers(config)
    assert finding.level == "ok" and finding.name == "rollout.server"
    assert re.fullmatch(rf"{re.escape(sys.executable)}: Python 3\S+, sglang 0\.5\.23, torch 2\S+", finding.detail)
    config, _ = load(recipe, [f"rollout.server.python={tmp_path}/nope"])
    assert list(checks_of_config.servers(config)) == [], "the checks of a start report it, once"


def test_doctor_finds_a_missing_and_a_broken_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    (finding,) = checks_of_machine.compiler()
    assert finding.level == "FAIL" and "install g++ or set CXX" in finding.detail
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho no headers >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin{os.pathsep}/usr/bin")
    (finding,) = checks_of_machine.compiler()
    assert finding.level == "FAIL" and "no headers" in finding.detail


def test_doctor_finds_packages_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["numpy==0.0.1", "no-such-package-of-ours==1", "pytest>=1; extra == 'dev'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: wanted)
    (finding,) = [finding for finding in checks_of_machine.versions() if finding.name == "packages"]
    assert finding.level == "FAIL"
    assert re.search(r"numpy \S+ \(==0\.0\.1\); no-such-package-of-ours is missing", finding.detail)


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_doctor_reports_for_each_shipped_recipe_what_is_missing_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    """In a folder without models or data, on a machine without GPUs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tropd_mcore.train.preflight_machine.DEVICES", tmp_path)
    monkeypatch.delenv("TEACHER_API_KEY", raising=False)
    code, lines = doctor(capsys, str(CONFIGS / name))
    failed = at("FAIL", lines)
    teachers = {"teachers.carries.path", "teachers.plain.path"} if "teachers" in name else {"teacher.path"}
    assert code == 2 and {"student.path", "data.prompts", *teachers} <= failed.keys()
    assert ("no GPU is visible on this machine" in failed.get("platform.kind", "")) == ("cpu" not in name)
    assert ("teacher.server.api_key_env" in failed) == ("4n8g" in name)
    assert ("rollout.servers.0.python" in failed) == ("cpu" not in name), "the server's environment of a GPU machine"
    unmade = at("warn", lines).get("data.teacher_responses", "")
    assert ("not yet made" in unmade) != ("fkl-rkl" in name or "teachers" in name), "gkd reads no responses"


def state_of(recipe: str, *overrides: str) -> State:
    config, _ = load(recipe, list(overrides))
    state = State(config, RunDir(config.run.dir), platform="cpu")
    state.models = {"student.path": read_tiny(config.student.path), "teacher.path": read_tiny(config.teacher.path)}
    return state


def read_tiny(folder: Path) -> Any:
    from tropd_mcore.weights.architecture import read_architecture

    return read_architecture(folder)


def test_the_disk_must_hold_one_checkpoint_more_than_is_kept_and_two_exports(
    recipe: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = state_of(recipe, "run.keep_checkpoints=3", "student.dtype=bfloat16")
    count = checks_of_config.parameters(state.student)
    from safetensors import safe_open

    with safe_open(files / "student" / "model.safetensors", framework="np") as stored:
        assert count == sum(int(stored.get_tensor(name).size) for name in list(stored.keys()))
    needed = count * (4 * (2 + 4 + 8) + 2 * 2)
    usage = type("Usage", (), {})
    for free, level in ((needed, "ok"), (needed - 1, "warn")):
        usage.free = free
        monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
        found = next(checks_of_config.resources(state))
        assert (found.name, found.level) == ("disk", level), found


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        ([], 1),
        (["run.keep_scores=3"], 4),
        (["run.keep_scores=null"], 9),
        (["teacher.kind=sglang", "run.checkpoint_every=5"], 6),
        (["run.keep_scores=50"], 9),
    ],
)
def test_the_disk_must_hold_the_scores_that_are_kept(
    recipe: str, files: Path, overrides: list[str], steps: int
) -> None:
    """8 bytes for each candidate of the teacher and 13 for the row (`tests/unit/test_stored_scores.py` sees a file)."""
    given = ["run.steps=9", "rollout.prompts_per_step=2", "rollout.samples_per_prompt=3", "rollout.max_new_tokens=5"]
    state = state_of(recipe, *given, *overrides)
    rows = 2 * 3 * 5
    found = checks_of_config.score_bytes(state.config)
    assert found == steps * rows * (8 * state.config.objective.teacher_topk + 13)
    lines = {finding.name: finding for finding in checks_of_config.resources(state)}
    assert lines["disk for scores"].level == "ok"


def test_weights_that_do_not_fit_the_gpu_are_a_failure(
    recipe: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Estimated per rank: 2 + 4 + (8 + 4)/2 bytes of the student, 2 of the teacher, over two by two ranks."""
    state = state_of(recipe, "student.dtype=bfloat16", "parallel.data=2", "rollout.server.mem_fraction=0.5")
    state.platform = "cuda"
    each = checks_of_config.parameters(state.student) * (2 + 4 + 6 + 2) // 4
    assert checks_of_config.rank_bytes(state, 8) == each
    for gpu, level in ((2 * each - 2, "FAIL"), (2 * each, "warn"), (4 * each, "ok")):
        monkeypatch.setattr(checks_of_config, "gpu_bytes", lambda gpu=gpu: gpu)
        *_, found = checks_of_config.resources(state)
        assert (found.name, found.level) == ("GPU memory", level), found.detail


def test_a_server_with_a_number_of_tokens_leaves_the_rest_of_the_gpu(
    recipe: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["student.dtype=bfloat16", "parallel.data=2", "rollout.server.max_total_tokens=20000000"]
    state = state_of(recipe, *given)
    state.platform = "cuda"
    arch = state.student
    server = (
        2 * checks_of_config.parameters(arch) + 2 * arch.num_layers * arch.num_kv_heads * arch.head_dim * 2 * 20_000_000
    )
    assert server > 2**30
    monkeypatch.setattr(checks_of_config, "gpu_bytes", lambda: 100 * 2**30)
    *_, found = checks_of_config.resources(state)
    assert f"; {100 - server / 2**30:.1f} GiB available" in found.detail
    state = state_of(recipe, *given, "rollout.server.release_memory=true", "platform.kind=auto")
    state.platform = "cuda"
    *_, found = checks_of_config.resources(state)
    assert "; 100.0 GiB available" in found.detail


def test_ranks_that_do_not_divide_over_the_machines_are_a_failure(
    capsys: pytest.CaptureFixture[str], recipe: str, files: Path
) -> None:
    """With the same line as `tropd train`. The other checks still run."""
    code, lines = doctor(capsys, recipe, "parallel.data=2", "--nodes", "3")
    assert code == 2 and at("FAIL", lines) == {
        "parallel": "parallel: tp*pp*cp*dp = 8 ranks do not divide over 3 machines"
    }
    assert {"disk", "data.prompts"} <= at("ok", lines).keys() and " ranks here" not in at("ok", lines)["memory"]
    code, lines = doctor(capsys, recipe, "parallel.data=2", "--nodes", "4")
    assert code == 0 and at("ok", lines)["devices"].startswith("2 ranks here")


def test_the_minimum_number_of_ranks_is_compared_with_the_gpus_if_the_number_is_left_open(
    recipe: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidia0").touch()
    monkeypatch.setattr("tropd_mcore.train.preflight_machine.DEVICES", tmp_path / "dev")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    config, _ = load(recipe, ["platform.kind=cuda", "rollout.server.max_total_tokens=16384"])
    found = [finding for finding in start_checks(config) if finding.name == "parallel"]
    assert any("4 ranks on this machine but 1 GPUs are visible" in finding.detail for finding in found)
    found = [finding for finding in start_checks(config, nodes=4) if finding.name == "parallel"]
    assert not any("GPUs are visible" in finding.detail for finding in found)


def test_a_teacher_with_uneven_stages_counts_with_its_largest_one(recipe: str, files: Path) -> None:
    even = checks_of_config.teacher_bytes(state_of(recipe))
    assert even == checks_of_config.parameters(state_of(recipe).student) * 2 // 4
    state = state_of(recipe, "parallel.pipeline=1", "teacher.pipeline_layers=[2]")
    assert checks_of_config.teacher_bytes(state) == 2 * even
    uneven = state_of(recipe, "parallel.pipeline=2", "teacher.pipeline_layers=[2,1]")
    uneven.models = {**uneven.models, "teacher.path": replace(uneven.student, num_layers=3)}
    whole = checks_of_config.parameters(replace(uneven.student, num_layers=3)) * 2
    assert checks_of_config.teacher_bytes(uneven) == whole * 2 // (3 * 2)


def test_an_offloaded_teacher_needs_host_memory_on_gpus(
    recipe: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = state_of(recipe, "teacher.offload=true")
    each, memory = checks_of_config.teacher_bytes(state), type("Memory", (), {})
    monkeypatch.setattr(checks_of_config, "gpu_bytes", lambda: 2**40)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    for available, level in ((4 * each - 4, "FAIL"), (4 * each, "warn"), (8 * each, "ok")):
        memory.available = available
        state.platform = "cuda"
        found = {finding.name: finding for finding in checks_of_config.resources(state)}["host memory"]
        assert found.level == level, found
        assert "teacher" in found.detail and (level != "FAIL" or "teacher.offload=false" in found.detail)


def test_the_memory_of_this_machine_is_shared_only_by_its_own_ranks(
    recipe: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = state_of(recipe, "parallel.data=2")
    each = checks_of_config.rank_bytes(state, 8)
    memory = type("Memory", (), {"available": 2 * 4 * each})
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    *_, found = checks_of_config.resources(state, 2)
    assert (found.name, found.level) == ("memory", "ok") and ", 4 ranks here;" in found.detail
    *_, found = checks_of_config.resources(state)
    assert found.level == "warn" and ", 8 ranks here;" in found.detail


def test_proxies_are_named_and_reported_as_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in tuple(os.environ):
        if name.lower() in checks_of_machine.PROXIES:
            monkeypatch.delenv(name)
    monkeypatch.setenv("https_proxy", "http://proxy:1")
    (finding,) = checks_of_machine.proxies()
    assert finding.detail == "https_proxy: not used; every server, also one at a url, is asked directly"


def test_every_check_has_a_text_for_its_ok_line() -> None:
    from tropd_mcore.cli.checks_of_start import FIELDS, TOLD

    names = [check.name for check in START_CHECKS]
    assert len(names) == len(set(names)) and set(names) - {"launch"} == set(TOLD)
    assert {need for check in START_CHECKS for need in check.needs} <= set(FIELDS)
    assert len({check.name for check in CHEAP_CHECKS}) == len(CHEAP_CHECKS)


def test_a_resumed_run_is_compared_with_its_record(
    capsys: pytest.CaptureFixture[str], recipe: str, files: Path
) -> None:
    from tropd_mcore.config.plan import resolved_yaml

    run = RunDir(files / "run")
    (run.root / "rollouts").mkdir(parents=True)
    run.rollouts(0).touch()
    config, sources = load(recipe, [])
    run.config.write_text(resolved_yaml(config, sources))
    code, lines = doctor(capsys, recipe, "rollout.temperature=0.5")
    assert code == 2 and any("rollout.temperature: 1.0 -> 0.5 is refused" in line for line in lines)
    code, lines = doctor(capsys, recipe, "run.checkpoint_every=7")
    assert code == 0 and any("run.checkpoint_every: 50 -> 7" in line for line in lines if line.startswith("warn"))
    assert not (run.root / "inputs.json").exists() and not (run.root / "digests.json").exists()


def test_quick_checks_take_less_than_a_second_of_processor_time(recipe: str, files: Path) -> None:
    """Including imports: the checks of `tropd train` before any rank starts, without any heavy module."""
    code = (
        "import sys, time\n"
        "from tropd_mcore.config.loader import load\nfrom tropd_mcore.train.preflight import cheap\n"
        f"assert cheap(load({recipe!r}, [])[0], world_size=4, nodes=1) == []\n"
        "assert not {'torch', 'transformers', 'megatron.core', 'sglang', 'aiohttp'} & set(sys.modules)\n"
        "print(time.process_time())"
    )
    fastest = min(float(_output(code)) for _ in range(3))
    assert fastest < 1.0, fastest


def _output(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True).stdout
