"""`tropd train` before ranks start: the rank of this node, and the launcher's report on ranks that ended."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from tests.glue.stubs import make_config
from tropd_mcore import logs
from tropd_mcore.cli import train_command
from tropd_mcore.config.schema import Config
from tropd_mcore.errors import ConfigError
from tropd_mcore.mcore.platform import deterministic as deterministic_module
from tropd_mcore.train import __main__ as rank_program
from tropd_mcore.train import job, launch, rendezvous
from tropd_mcore.train.exits import BUG, BYSTANDER, EXPLAINED, INTERRUPTED, LOST, STOPPED
from tropd_mcore.train.other_nodes import Cause, OtherNodes
from tropd_mcore.train.rendezvous import NodesMeet, Place


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Eight ranks in all: tensor 2, data 4."""
    return make_config(tmp_path, parallel={"tensor": 2, "data": 4})


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    train_command.add_arguments(parser)
    return parser.parse_args(["recipe.yaml", *arguments])


def nodes(config: Config, environ: dict[str, str], *arguments: str) -> train_command.Nodes:
    return train_command.read_nodes(options(*arguments), config, environ)


def test_a_single_node_needs_no_settings_and_uses_any_free_port(config: Config) -> None:
    assert nodes(config, {}) == train_command.Nodes(1, 0, "127.0.0.1", 0, 8)


@pytest.mark.parametrize("port", [{}, {"MASTER_PORT": ""}, {"MASTER_PORT": "0"}])
def test_several_nodes_use_a_fixed_default_port(config: Config, port: dict[str, str]) -> None:
    environ = {"NNODES": "4", "NODE_RANK": "3", "MASTER_ADDR": "first", **port}
    assert nodes(config, environ) == train_command.Nodes(4, 3, "first", 29500, 2)


def test_arguments_win_over_the_environment(config: Config) -> None:
    environ = {"NNODES": "4", "NODE_RANK": "3", "MASTER_ADDR": "first", "MASTER_PORT": "1", "NPROC_PER_NODE": "9"}
    given = [
        "--nnodes",
        "2",
        "--node-rank",
        "1",
        "--master-addr",
        "other",
        "--master-port",
        "5",
        "--nproc-per-node",
        "4",
    ]
    assert nodes(config, environ, *given) == train_command.Nodes(2, 1, "other", 5, 4)


def test_inside_a_slurm_step_the_nodes_are_read_from_slurm(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_command, "_first_host", lambda hosts: f"first of {hosts}")
    slurm = {"SLURM_STEP_NUM_NODES": "4", "SLURM_NODEID": "2", "SLURM_STEP_NODELIST": "node[1-4]"}
    assert nodes(config, slurm) == train_command.Nodes(4, 2, "first of node[1-4]", 29500, 2)
    with pytest.raises(ConfigError, match="one task per node"):
        nodes(config, {**slurm, "SLURM_LOCALID": "1"})


@pytest.mark.parametrize(
    ("environ", "line"),
    [
        ({"NNODES": "two"}, "NNODES is 'two', expected a whole number"),
        ({"NNODES": "0"}, "NNODES is 0, expected at least 1"),
        ({"NNODES": "4", "NODE_RANK": "4", "MASTER_ADDR": "first"}, "NODE_RANK is 4, expected 0 to 3"),
        ({"NNODES": "4"}, r"MASTER_ADDR is not set: 4 nodes \(NNODES\) need the name"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is 70000, expected at most 65535"),
        ({"NPROC_PER_NODE": "3"}, r"3 ranks|world size of 3|WORLD_SIZE"),
    ],
)
def test_a_wrong_environment_gives_a_one_line_error_before_any_rank_starts(
    config: Config, environ: dict[str, str], line: str
) -> None:
    with pytest.raises(ConfigError, match=line) as met:
        nodes(config, environ)
    assert len(met.value.problems) == 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ("--nnodes", "4", "--node-rank", "5", "--master-addr", "a"),
            "--node-rank is 5, expected 0 to 3 (--nnodes is 4)",
        ),
        (("--node-rank", "1"), "--node-rank is 1, expected 0 to 0 (NNODES is 1)"),
        (("--master-port", "70000"), "--master-port is 70000, expected at most 65535"),
        (("--nnodes", "2"), "MASTER_ADDR is not set: 2 nodes (--nnodes) need the name or address of the first one"),
    ],
)
def test_a_wrong_argument_is_named_as_it_was_given(config: Config, arguments: tuple[str, ...], line: str) -> None:
    with pytest.raises(ConfigError) as met:
        nodes(config, {}, *arguments)
    assert met.value.problems == [line]


def test_the_plan_ends_with_the_line_that_starts_each_node(config: Config) -> None:
    found = train_command.launch_line(
        options("a.b=c d", "--nnodes", "4"), nodes(config, {"MASTER_ADDR": "first"}, "--nnodes", "4")
    )
    assert found == (
        "launch       on node R = 0 to 3: tropd train recipe.yaml 'a.b=c d' --nnodes 4 --node-rank R "
        "--master-addr first --master-port 29500 --nproc-per-node 2"
    )


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (None, "before the first step was done"),
        ("", "before the first step was done"),
        ('{"step": 0}\n{"step": 4}\n', "at step 5 of 8"),
        ('{"step": 4}\n{"step": 5, "loss', "before the first step was done"),
        ('{"step": 40}\n', "at step 8 of 8"),
    ],
    ids=["no file", "empty", "whole", "torn", "longer"],
)
def test_the_progress_of_a_run_is_read_from_its_metrics(tmp_path: Path, lines: str | None, said: str) -> None:
    if lines is not None:
        (tmp_path / "metrics.jsonl").write_text(lines)
    job = launch.Job(Place(1, 0, "127.0.0.1", 0, 2, "digest"), ("recipe.yaml",), tmp_path, 8, 120.0, 900.0, 60.0)
    assert launch.where(job) == said


def test_a_launcher_waits_for_the_other_nodes_as_long_as_the_job_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_host_store", lambda place: dist.HashStore())
    others = OtherNodes(0, 3, 60.0, lambda reason: None)
    with pytest.raises(rendezvous.LaunchError) as refused:
        NodesMeet(Place(3, 0, "first", 7, 2, "digest"), others, limit_s=0.01).next_rendezvous()
    assert str(refused.value) == (
        "node 1, 2 of 3 did not join in 0.01 s (run.join_timeout_s); start the same command there with NODE_RANK=1 "
        "MASTER_ADDR=first MASTER_PORT=7"
    )


def test_blame_goes_first_to_a_rank_with_an_error_then_to_a_killed_one_then_to_one_that_followed() -> None:
    codes = [BYSTANDER, STOPPED, -9, BUG, INTERRUPTED, EXPLAINED, LOST]
    ordered = sorted(codes, key=launch._blame)
    assert set(ordered[:3]) == {EXPLAINED, INTERRUPTED, LOST} and set(ordered[3:5]) == {-9, BUG}


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": ""}, {"PYTORCH_ALLOC_CONF": ""}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "a:b"}, {"PYTORCH_CUDA_ALLOC_CONF": "a:b"}),
    ],
    ids=str,
)
def test_a_rank_allocates_in_expandable_segments_unless_the_user_has_set_the_allocator(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], found: dict[str, str]
) -> None:
    environment = {**given}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(rank_program, "_run", lambda *_: 0)
    assert rank_program.main(["recipe.yaml"]) == 0
    assert {name: value for name, value in environment.items() if "ALLOC_CONF" in name} == found


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_rank_switches_to_deterministic_algorithms_before_its_job_if_the_key_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, deterministic: bool
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("run: {dir: run}\nstudent: {path: s}\nteacher: {path: t}\ndata: {prompts: p.jsonl}\n")
    did: list[str] = []
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(logs, "configure", lambda rank: None)
    monkeypatch.setattr(deterministic_module, "make_deterministic", lambda environ: did.append("switch"))
    monkeypatch.setattr(job, "run_job", lambda *_: did.append("job"))
    overrides = ["objective.kind=opd", f"platform.deterministic={str(deterministic).lower()}"]
    assert rank_program.main([str(recipe), *overrides]) == 0
    assert did == ["switch"] * deterministic + ["job"]


LOST_NODE = Cause("no sign of life for 60 s from node 1 (b, rank 1)", LOST)


def told(code: int, cause: Cause | None, *, node_rank: int = 0) -> tuple[int, list[str], list[str]]:
    """A rank of one of two nodes has ended with `code`, and the other nodes know `cause`.

    Returns the exit code of the launcher, the printed lines and those for the other nodes.
    """
    said: list[str] = []
    published: list[str] = []
    job = launch.Job(Place(2, node_rank, "first", 1, 1, "digest"), (), Path(), 8, 120.0, 900.0, 60.0)
    agent = object.__new__(launch._Agent)
    agent.code = 0
    agent._launcher = SimpleNamespace(  # type: ignore[assignment]
        job=job,
        interrupted=False,
        stop=None,
        others=SimpleNamespace(await_cause=lambda: cause),
        say_once=said.append,
        publish=lambda line, code: published.append(line),
    )
    ended = SimpleNamespace(returncode=code, pid=5)
    agent._tell({node_rank: ended}, alone=False)  # type: ignore[dict-item]
    return agent.code, said, published


@pytest.mark.parametrize("code", [BYSTANDER, -signal.SIGABRT])
def test_the_end_of_a_rank_that_followed_a_lost_node_is_reported_as_the_loss_of_that_node(code: int) -> None:
    assert told(code, LOST_NODE) == (LOST, [f"error: {LOST_NODE.line}"], [LOST_NODE.line])
    assert told(code, LOST_NODE, node_rank=1) == (LOST, [f"error: {LOST_NODE.line}"], [])


def test_an_aborted_rank_is_reported_as_such_if_no_node_is_lost() -> None:
    code, (line,), (published,) = told(-signal.SIGABRT, None)
    assert code == BUG and "rank 0 (pid 5 on " in line and "was killed by signal 6" in line and published in line


def test_an_error_that_a_rank_explained_is_not_attributed_to_another_node() -> None:
    code, said, _ = told(EXPLAINED, LOST_NODE)
    assert (code, said) == (EXPLAINED, [])


@pytest.mark.parametrize(
    ("environ", "limit_s"),
    [
        ({}, rank_program.ECHO_DELAY_S),
        ({"GROUP_WORLD_SIZE": "1"}, rank_program.ECHO_DELAY_S),
        ({"GROUP_WORLD_SIZE": "2", "TROPD_LAUNCHER_PID": "1"}, rank_program.ECHO_DELAY_S + 60.0),
        ({"GROUP_WORLD_SIZE": "2"}, rank_program.ECHO_DELAY_S + 120.0),
    ],
)
def test_a_rank_that_lost_its_connection_waits_until_the_lost_node_can_be_named(
    config: Config, monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], limit_s: float
) -> None:
    for name in ("GROUP_WORLD_SIZE", "TROPD_LAUNCHER_PID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert rank_program._patience_s(config.run) == limit_s


def test_the_exit_code_of_a_stopped_run_is_0_to_255(capsys: pytest.CaptureFixture[str]) -> None:
    assert options().stopped_code == 0 and options("--stopped-code", "75").stopped_code == 75
    for wrong in ("256", "-1", "many"):
        with pytest.raises(SystemExit):
            options(f"--stopped-code={wrong}")
        assert wrong in capsys.readouterr().err
