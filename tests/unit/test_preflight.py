"""Problems of a launch are found without ranks, servers or heavy imports, all at once, each with its key."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from tropd_mcore.config.loader import load
from tropd_mcore.config.schema import Config
from tropd_mcore.train import preflight_machine
from tropd_mcore.train.preflight import CHEAP_CHECKS, Launch, cheap

RECIPE = """\
run: {dir: DIR/run}
platform: {kind: cpu}
student: {path: DIR/student}
teacher: {path: DIR/teacher}
data: {prompts: DIR/prompts.jsonl, teacher_responses: DIR/responses.jsonl}
"""

MODEL = {
    "model_type": "qwen3",
    "num_hidden_layers": 8,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 8,
    "intermediate_size": 64,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
"""A config.json that up to 8 tensor or pipeline ranks divide."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """All files that the recipe names, without content."""
    for name in ("student", "teacher"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(MODEL))
    (tmp_path / "prompts.jsonl").write_text('{"id": "a", "prompt": "2 + 3 ="}\n')
    (tmp_path / "responses.jsonl").write_text("{}\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("DIR", str(tmp_path)))
    return tmp_path


SIZED = "rollout.server.max_total_tokens=16384"
"""What a server needs on a GPU."""


def config_in(root: Path, *overrides: str) -> Config:
    return load(root / "recipe.yaml", list(overrides))[0]


def found_in(root: Path, *overrides: str, world_size: int = 1, **environ: str) -> list[str]:
    return cheap(config_in(root, *overrides), world_size=world_size, nodes=1, environ=environ)


def with_gpus(monkeypatch: pytest.MonkeyPatch, folder: Path, count: int) -> None:
    """Device files of NVIDIA's driver, and others of it, in a folder that stands for /dev. torch has CUDA."""
    folder.mkdir()
    for name in ("null", "nvidiactl", "nvidia-uvm", *(f"nvidia{index}" for index in range(count))):
        (folder / name).touch()
    monkeypatch.setattr(preflight_machine, "DEVICES", folder)
    monkeypatch.setattr(preflight_machine, "_torch_version", lambda: "2.13.0+cu130")
    importable = preflight_machine.importable
    monkeypatch.setattr(preflight_machine, "importable", lambda name: name == "transformer_engine" or importable(name))


def test_a_launch_whose_files_all_exist_reports_nothing(root: Path) -> None:
    assert found_in(root) == []
    assert not (root / "run").exists(), "nothing is made"


def test_all_problems_of_a_launch_are_reported_at_once_each_with_its_key(root: Path) -> None:
    (root / "prompts.jsonl").unlink()
    (root / "student" / "config.json").unlink()
    (root / "file").touch()
    overrides = [
        f"teacher.path={root}/nope",
        f"run.dir={root}/file/run",
        f"run.replay={root}/nope",
        "verifier.kind=exact_match",
        "teacher.kind=sglang",
        "teacher.server.url=http://elsewhere:1",
        "teacher.server.api_key_env=NO_SUCH_KEY",
        "parallel.tensor=3",
    ]
    found = found_in(root, *overrides, world_size=2)
    assert [line.split(":")[0].split("=")[0] for line in found] == [
        "parallel",
        "student.path",
        "teacher.path",
        "data.prompts",
        "run.dir",
        "run.replay",
        "teacher.server.api_key_env",
    ]


def test_a_replay_needs_no_api_key_of_the_rollout_server(root: Path) -> None:
    key = ["rollout.server.url=http://elsewhere:1", "rollout.server.api_key_env=NO_SUCH_KEY"]
    (line,) = found_in(root, *key)
    assert line.startswith("rollout.server.api_key_env=NO_SUCH_KEY: this environment variable is unset")
    (root / "before" / "rollouts").mkdir(parents=True)
    assert not any("NO_SUCH_KEY" in line for line in found_in(root, *key, f"run.replay={root}/before"))


@pytest.mark.parametrize(
    ("change", "override", "line"),
    [
        ("rm prompts.jsonl", "", "data.prompts={root}/prompts.jsonl: not found; expected a JSONL file"),
        ("dir prompts.jsonl", "", "data.prompts={root}/prompts.jsonl: is a folder; expected a JSONL file"),
        (
            "dir responses.jsonl",
            "",
            "data.teacher_responses={root}/responses.jsonl: is a folder; expected a JSONL file",
        ),
        (
            "rm responses.jsonl",
            "",
            "data.teacher_responses={root}/responses.jsonl: not yet made; run `tropd prefixes` with the same "
            "arguments first, or set objective.guidance.enabled=false",
        ),
        (
            "",
            "held_out={prompts: {root}/prompts.jsonl, responses: {root}/nope.jsonl}",
            "held_out.responses={root}/nope.jsonl: not found; expected a JSONL file; `tropd prefixes` writes it",
        ),
        (
            "",
            "held_out={prompts: {root}/student, responses: {root}/responses.jsonl}",
            "held_out.prompts={root}/student: is a folder; expected a JSONL file",
        ),
        (
            "rm student",
            "",
            "student.path={root}/student: not found; expected a Hugging Face model folder",
        ),
        ("file student", "", "student.path={root}/student: is a file; expected a Hugging Face model folder"),
        (
            "deeper student",
            "",
            "student.path={root}/student: config.json not found there; expected a Hugging Face model folder; did you "
            "mean {root}/student/deeper?",
        ),
        (
            "checkpoint student",
            "",
            "student.path={root}/student: config.json not found there; expected a Hugging Face model folder; it is a "
            "checkpoint: `tropd convert mcore-to-hf` makes a model folder of it",
        ),
        ("file run", "", "run.dir={root}/run: is a file; choose another run.dir"),
        (
            "",
            "run.init_from={root}/nope",
            "run.init_from={root}/nope: no such folder; expected a checkpoint folder <run.dir>/checkpoints/step_<n>",
        ),
        (
            "broken student/config.json",
            "",
            "student.path: {root}/student/config.json: not valid JSON (Expecting ',' delimiter: line 1 column 24 "
            "(char 23)); correct it or download the file again",
        ),
        (
            "",
            "run.dir=/proc/tropd",
            "run.dir=/proc/tropd: /proc belongs to the kernel, which keeps no files there; choose another run.dir",
        ),
        (
            "",
            "run.replay={root}/student",
            "run.replay={root}/student: no rollouts/ in it; expected the run directory of another run",
        ),
        (
            "",
            "parallel.data=2",
            "parallel: tp*pp*cp*dp = 1*1*1*2 = 2, but this launch has 1 ranks; set parallel.data=1 or launch 2 ranks",
        ),
    ],
)
def test_each_wrong_path_gives_one_line_that_says_what_to_do(root: Path, change: str, override: str, line: str) -> None:
    make(root, change)
    overrides = [override.replace("{root}", str(root))] if override else []
    assert found_in(root, *overrides) == [line.replace("{root}", str(root))]


def make(root: Path, change: str) -> None:
    what, _, name = change.partition(" ")
    path = root / name
    if what in ("rm", "dir", "file") and path.is_dir() and name:
        (path / "config.json").unlink()
        path.rmdir()
    elif what in ("rm", "dir") and name:
        path.unlink()
    if what == "dir":
        path.mkdir()
    if what == "file":
        path.touch()
    if what in ("deeper", "checkpoint"):
        (path / "config.json").unlink()
    if what == "deeper":
        (path / "deeper").mkdir()
        (path / "deeper" / "config.json").touch()
    if what == "broken":
        path.write_text('{"model_type": "qwen3" "num_hidden_layers": 8}')
    if what == "checkpoint":
        (path / "tropd.json").touch()


def test_wrong_prompt_lines_are_reported_together_with_a_missing_model(root: Path) -> None:
    """Without a tokenizer the start cannot read them; the next launch would be the first to say it."""
    (root / "prompts.jsonl").write_text('{"id": "a", "prompt": "2 + 3 ="}\n{"id": "b", "question": "4 + 5 ="}\n')
    assert found_in(root) == [], "with models, the checks of the start read the prompts"
    missing, line = found_in(root, "student.path=/nope")
    assert missing.startswith("student.path=/nope: not found")
    assert line.startswith(f"{root}/prompts.jsonl:2: unknown key 'question'"), line


def test_a_folder_without_permissions_is_refused_by_its_key(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test replaces the system call, because the superuser may write everywhere."""
    closed, access = root / "closed", os.access
    closed.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != closed and access(path, mode))
    (line,) = found_in(root, f"run.dir={closed}/run")
    assert line == f"run.dir={closed}/run: {closed} cannot be written; choose another run.dir"


def test_the_init_from_checkpoint_of_a_started_run_may_be_missing(root: Path) -> None:
    own = root / "run" / "checkpoints" / "step_000002"
    own.mkdir(parents=True)
    (own / "tropd.json").touch()
    assert found_in(root, f"run.init_from={root}/nope") == []


def test_missing_packages_are_named_with_the_key_that_needs_them(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight_machine, "importable", lambda name: False)
    lines = found_in(root, "verifier.kind=math_verify", "monitor.wandb_project=p", "monitor.tensorboard=true")
    found = {line.split()[-1].strip("`'"): line.split(":")[0] for line in lines}
    assert found == {
        "torch": "platform.kind",
        "megatron-core": "platform.kind",
        "transformers": "student.path",
        "tropd-mcore[eval]": "verifier.kind",
        "tropd-mcore[wandb]": "monitor.wandb_project",
        "tensorboard": "monitor.tensorboard",
        "says": "rollout.server",  # where to get sglang is another test
    }
    assert lines[3] == (
        "verifier.kind: verifier.kind=math_verify needs the package math_verify, which is not installed; "
        "run `pip install 'tropd-mcore[eval]'`"
    )
    lines = found_in(root, "rollout.server.url=http://127.0.0.1:1")
    assert not any("sglang" in line for line in lines), "a server that runs elsewhere needs no package here"


def test_the_api_key_variable_must_be_set_if_a_url_needs_it(root: Path) -> None:
    overrides = ["rollout.server.url=http://elsewhere:1", "rollout.server.api_key_env=KEY"]
    (line,) = found_in(root, *overrides)
    assert line.startswith("rollout.server.api_key_env=KEY: this environment variable is unset or empty")
    assert found_in(root, *overrides, KEY="") == [line] and found_in(root, *overrides, KEY="secret") == []


def test_a_taken_port_is_refused_unless_a_server_of_this_run_holds_it(root: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        (line,) = found_in(root, f"rollout.server.port={port}")
        assert line.startswith(f"rollout.server.port={port} is taken (Address already in use)")
        record = root / "run" / "logs" / "rollout.server.json"
        record.parent.mkdir(parents=True)
        record.write_text(json.dumps({"pid": os.getpid(), "start_time": 0.0, "port": port}))
        assert found_in(root, f"rollout.server.port={port}") == []
    record.unlink()
    assert found_in(root, f"rollout.server.port={port}") == []


@pytest.mark.parametrize(
    ("environ", "gpus"),
    [
        ({}, 4),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, 0),
        ({"CUDA_VISIBLE_DEVICES": "2"}, 1),
        ({"CUDA_VISIBLE_DEVICES": "0,3,-1,2"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "MIG-a, MIG-b"}, 2),
    ],
)
def test_gpus_are_counted_as_torch_would_without_torch(
    root: Path, monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], gpus: int
) -> None:
    with_gpus(monkeypatch, root / "dev", 4)
    assert preflight_machine.visible_gpus(environ) == gpus


def test_gpus_listed_in_the_environment_count_only_if_they_exist(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, root / "dev", 0)
    assert preflight_machine.visible_gpus({"CUDA_VISIBLE_DEVICES": "0,1"}) == 0
    (root / "dev" / "dxg").touch()
    assert preflight_machine.visible_gpus({}) is None, "Windows' subsystem for Linux has no file per GPU"


@pytest.mark.parametrize(
    ("gpus", "kind", "overrides", "ranks", "lines"),
    [
        (0, "cuda", [], 8, ["platform.kind=cuda: no GPU is visible on this machine"]),
        (0, "auto", [], 8, []),
        (4, "cuda", [], 8, ["parallel: 8 ranks on this machine but 4 GPUs are visible"]),
        (4, "auto", [], 8, ["parallel: 8 ranks on this machine but 4 GPUs are visible"]),
        (8, "cuda", [], 8, []),
        (
            1,
            "cuda",
            ["rollout.server.tensor_parallel=2"],
            1,
            ["rollout.server.tensor_parallel=2 but 1 GPUs are visible"],
        ),
        (
            4,
            "cuda",
            ["rollout.server.tensor_parallel=2", "rollout.server.gpus=[3,4]"],
            4,
            ["rollout.server.gpus=[3, 4]: the launch sees GPUs 0 to 3"],
        ),
        (
            4,
            "auto",
            ["rollout.server.max_total_tokens=null"],
            4,
            ["rollout.server: a server beside the trainer needs its size, found neither max_total_tokens nor"],
        ),
        (0, "auto", ["rollout.server.max_total_tokens=null"], 1, []),
        (1, "cpu", [], 1, ["platform.kind=cpu: 1 GPUs are visible, which the CPU platform refuses"]),
    ],
)
def test_a_machine_with_too_few_gpus_is_refused(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpus: int,
    kind: str,
    overrides: list[str],
    ranks: int,
    lines: list[str],
) -> None:
    with_gpus(monkeypatch, root / "dev", gpus)
    found = found_in(root, f"platform.kind={kind}", SIZED, *overrides, world_size=ranks)
    assert len(found) == len(lines) and all(text.startswith(line) for text, line in zip(found, lines, strict=True)), (
        found
    )


def test_ranks_are_counted_per_machine_if_the_number_of_machines_is_known(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpus(monkeypatch, root / "dev", 8)
    config = config_in(root, "platform.kind=cuda", SIZED)
    assert cheap(config, world_size=32, nodes=4, environ={}) == cheap(config, world_size=32, environ={}) == []
    (line,) = cheap(config, world_size=32, nodes=2, environ={})
    assert line.startswith("parallel: 16 ranks on this machine but 8 GPUs are visible")


def test_a_torch_without_cuda_is_refused_if_the_platform_is_cuda(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, root / "dev", 1)
    monkeypatch.setattr(preflight_machine, "_torch_version", lambda: "2.13.0+cpu")
    (line,) = found_in(root, "platform.kind=cuda", SIZED)
    assert line.startswith("platform.kind=cuda: 1 GPUs are visible but torch 2.13.0+cpu is the CPU build")
    assert found_in(root, "platform.kind=cpu") == [], "nothing of that torch sees them"


def test_a_warning_does_not_refuse_a_launch(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, root / "dev", 0)
    launch = Launch(config_in(root, "platform.kind=auto"), 8, 1, {})
    (fault,) = [fault for check in CHEAP_CHECKS for fault in check.find(launch)]
    assert fault.level == "warning" and "so 8 ranks train on the CPU" in fault.text


def write_model(folder: Path, *, layers: int, heads: int) -> None:
    """The config.json of a Qwen3 of these sizes."""
    values = {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_act": "silu", "vocab_size": 320,
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": heads, "head_dim": 16, "max_position_embeddings": 512, "rope_theta": 1e4,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values))


def test_a_model_in_the_job_that_the_layout_does_not_divide_is_refused_by_its_key(root: Path) -> None:
    write_model(root / "student", layers=4, heads=4)
    write_model(root / "teacher", layers=6, heads=8)
    found = found_in(root, "parallel.tensor=8", "parallel.pipeline=2", world_size=16)
    assert found == [
        f"student.path={root}/student: {what} = 4 of qwen3 is not divisible by parallel.tensor = 8; "
        "change parallel.tensor or parallel.pipeline"
        for what in ("num_attention_heads", "num_key_value_heads")
    ]


def test_only_the_student_is_split_into_virtual_stages_and_a_served_teacher_is_not_split(root: Path) -> None:
    write_model(root / "student", layers=8, heads=4)
    write_model(root / "teacher", layers=3, heads=4)
    assert found_in(root, "parallel.pipeline=2", "parallel.virtual_pipeline=2", world_size=2) == []
    (line,) = found_in(root, "parallel.pipeline=4", world_size=4)
    assert line.startswith("teacher.path=") and "num_hidden_layers = 3 of qwen3 is less than" in line
    assert found_in(root, "parallel.pipeline=4", "teacher.kind=sglang", world_size=4) == []
    (root / "teacher" / "config.json").unlink()
    (line,) = found_in(root, "parallel.pipeline=4", "teacher.kind=sglang", world_size=4)
    assert line == f"teacher.path={root}/teacher: config.json not found there; expected a Hugging Face model folder"


def test_the_teachers_layers_need_not_divide_over_the_stages(root: Path) -> None:
    write_model(root / "student", layers=8, heads=4)
    write_model(root / "teacher", layers=7, heads=4)
    assert found_in(root, "parallel.pipeline=4", world_size=4) == []
    assert found_in(root, "parallel.pipeline=4", "teacher.pipeline_layers=[1,2,2,2]", world_size=4) == []
    (line,) = found_in(root, "parallel.pipeline=4", "teacher.pipeline_layers=[2,2,2,2]", world_size=4)
    assert line == (
        f"teacher.path={root}/teacher: teacher.pipeline_layers = [2, 2, 2, 2] has 8 layers, num_hidden_layers of qwen3 "
        "is 7; change teacher.pipeline_layers"
    )
