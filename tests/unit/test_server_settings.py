"""The server of `tropd prefixes` and `tropd eval`: what `--server` changes, and the whole machine on GPUs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tropd_mcore.cli import server as server_module
from tropd_mcore.cli.server_settings import all_changed, changed, names, whole_machine
from tropd_mcore.config.schema import PlatformConfig, ServerConfig
from tropd_mcore.errors import ConfigError
from tropd_mcore.serving.process import ServerSpec

GIB = 2**30
OF_A_RUN = ServerConfig(
    tensor_parallel=2, gpus=(6, 7), threads=3, max_total_tokens=5000, mem_fraction=0.25, extra_args=("--x",)
)
"""Settings that leave room for a trainer."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with 12 attention heads and 100 GiB of weights, which take no place on the disk."""
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 12}))
    with (tmp_path / "model.safetensors").open("wb") as stream:
        stream.truncate(100 * GIB)
    return tmp_path


def test_keys_of_server_replace_those_of_the_section() -> None:
    given = ["tensor_parallel=4", "gpus = [0, 1, 2, 3]", "mem_fraction=", "extra_args=[--y, z]"]
    expected = OF_A_RUN.model_copy(
        update={"tensor_parallel": 4, "gpus": (0, 1, 2, 3), "mem_fraction": None, "extra_args": ("--y", "z")}
    )
    assert changed(OF_A_RUN, given) == expected
    assert names(given) == {"tensor_parallel", "gpus", "mem_fraction", "extra_args"}
    assert changed(OF_A_RUN, []) == OF_A_RUN


def test_all_wrong_values_of_server_are_reported_together() -> None:
    given = ["tensor_paralel=4", "zebra=1", "mem_fraction", "max_total_tokens=many", "gpus=[", "threads=0"]
    with pytest.raises(ConfigError) as refused:
        changed(ServerConfig(), given)
    starts = (
        "--server tensor_paralel: unknown key; did you mean tensor_parallel?",
        "--server zebra: unknown key; a server has url, python, node, port, tensor_parallel,",
        "--server mem_fraction: expected KEY=VALUE",
        "--server gpus:1: not valid YAML:",
        "--server threads: expected greater than 0, found 0",
        "--server max_total_tokens: expected a valid integer, found 'many'",
    )
    assert len(refused.value.problems) == len(starts)
    for line, start in zip(refused.value.problems, starts, strict=True):
        assert line.startswith(start)


def test_a_running_server_cannot_be_started_differently() -> None:
    with pytest.raises(ConfigError) as refused:
        changed(ServerConfig(url="http://h:1"), ["max_retries=1", "threads=2", "tensor_parallel=2"])
    expected = "--server tensor_parallel, threads: says how a server is started, but http://h:1 runs; remove one"
    assert refused.value.problems == [expected]
    assert changed(ServerConfig(url="http://h:1"), ["max_retries=1"]).max_retries == 1


@pytest.mark.parametrize(
    ("gpus", "tensor", "servers"),
    [
        ([80] * 8, 3, 2),  # 2 x 80 GiB hold 100 GiB of weights, but not in half of the memory
        ([141] * 8, 2, 4),
        ([300], 1, 1),
        ([80] * 2, 2, 1),  # nothing has room: as many as there are
        ([20] * 8, 6, 1),  # 8 do not divide 12 heads
        ([300, 80, 300, 300], 3, 1),  # the smallest GPU counts
    ],
    ids=str,
)
def test_each_server_gets_the_fewest_gpus_that_hold_it_and_the_rest_are_more_servers(
    model: Path, gpus: list[int], tensor: int, servers: int
) -> None:
    found = whole_machine(OF_A_RUN, model, [GIB * each for each in gpus], ())
    assert len(found) == servers and {server.tensor_parallel for server in found} == {tensor}
    if servers == 1:
        assert found == [ServerConfig(tensor_parallel=tensor, extra_args=("--x",))]
    taken = [gpu for server in found for gpu in server.gpus or ()]
    assert len(taken) == len(set(taken)) and all(gpu < len(gpus) for gpu in taken)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["tensor_parallel=4"], [{"tensor_parallel": 4, "gpus": gpus} for gpus in ((0, 1, 2, 3), (4, 5, 6, 7))]),
        (["tensor_parallel=8"], [{"tensor_parallel": 8}]),
        (
            ["max_concurrency=7", "gpus=[0, 1, 6, 7]"],
            [{"tensor_parallel": 2, "gpus": gpus, "max_concurrency": 7} for gpus in ((0, 1), (6, 7))],
        ),
        (["gpus=[2, 5]"], [{"tensor_parallel": 2, "gpus": (2, 5)}]),
        (
            ["mem_fraction=0.5", "extra_args=[--dp-size, '1']"],
            [{"tensor_parallel": 2, "mem_fraction": 0.5, "extra_args": ("--dp-size", "1")}],
        ),
    ],
    ids=str,
)
def test_what_server_says_is_kept(model: Path, given: list[str], expected: list[dict[str, Any]]) -> None:
    found = whole_machine(changed(OF_A_RUN, given), model, [141 * GIB] * 8, names(given))
    assert found == [ServerConfig(**{"extra_args": ("--x",), **each}) for each in expected]


def test_one_of_the_servers_is_used_if_server_names_a_running_one() -> None:
    two = [ServerConfig(threads=1), ServerConfig(threads=2)]
    assert [server.max_retries for server in all_changed(two, ["max_retries=9"])] == [9, 9]
    (alone,) = all_changed([ServerConfig(), ServerConfig()], ["url=http://h:1"])
    assert alone.url == "http://h:1"


@pytest.mark.parametrize(
    ("kind", "url", "whole"), [("cuda", None, True), ("cuda", "http://h:1", False), ("cpu", None, False)]
)
def test_only_a_server_that_a_command_starts_on_gpus_takes_the_whole_machine(
    model: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, url: str | None, whole: bool
) -> None:
    seen: list[ServerSpec] = []
    monkeypatch.setattr(server_module, "memory_of_gpus", lambda: [141 * GIB] * 4)
    monkeypatch.setattr(server_module, "SupervisedServer", seen.append)
    monkeypatch.setattr(server_module, "server_spec", lambda name, **given: given["config"])
    monkeypatch.setattr(server_module, "ServerFleet", list)
    config = ServerConfig(url=url, max_concurrency=5)
    server_module.open_servers(
        "evaluation",
        key="rollout.server",
        model_key="--model",
        model=model,
        dtype="bfloat16",
        configs=[config],
        platform=PlatformConfig(kind=kind),
        logs=model / "logs",
    )
    own = {"tensor_parallel": 2, "max_concurrency": ServerConfig().max_concurrency}
    halves = [config.model_copy(update={**own, "gpus": gpus}) for gpus in ((0, 1), (2, 3))]
    assert seen == (halves if whole else [config])
