"""GPUs and memory of servers that a job starts: each wrong combination gives one line that names the keys to change."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.test_config_checks import make_config
from tropd_mcore.config.checks import problems_across_sections

TOKENS = {"max_total_tokens": 16384}


def problems(kind: str, rollout: dict[str, Any], teacher: dict[str, Any] | None = None) -> list[str]:
    """Those of a job on the platform `kind` with these server sections; without `teacher` no server scores."""
    served = {"kind": "sglang", "server": teacher} if teacher is not None else {"kind": "megatron"}
    config = make_config(platform={"kind": kind}, rollout={"server": rollout}, teacher={"path": "teacher", **served})
    return problems_across_sections(config)


@pytest.mark.parametrize(
    ("rollout", "teacher"),
    [
        (TOKENS, None),
        ({"mem_fraction": 0.25}, None),
        ({"url": "http://h:1"}, {"url": "http://h:2"}),
        (TOKENS, {"url": "http://h:1"}),
        (TOKENS, TOKENS),
        ({"mem_fraction": 0.25}, {"mem_fraction": 0.5, "gpus": [1]}),
        ({"mem_fraction": 0.25, "tensor_parallel": 2, "gpus": [2, 3]}, {"mem_fraction": 0.5, "tensor_parallel": 2}),
        ({**TOKENS, "gpus": [0, 1, 2, 3], "extra_args": ["--pp-size=4"]}, None),
        ({**TOKENS, "gpus": [7], "threads": 3}, None),
    ],
)
def test_a_server_on_gpus_with_a_size_and_gpus_of_its_own_is_accepted(
    rollout: dict[str, Any], teacher: dict[str, Any] | None
) -> None:
    assert problems("cuda", rollout, teacher) == []


@pytest.mark.parametrize("section", ["rollout.server", "teacher.server"])
def test_a_server_beside_the_trainer_needs_a_size(section: str) -> None:
    sizes = {"rollout.server": TOKENS, "teacher.server": {**TOKENS, "gpus": [1]}, section: {"gpus": [2]}}
    expected = (
        f"{section}: a server beside the trainer needs its size, found neither max_total_tokens nor mem_fraction; set "
        f"{section}.max_total_tokens (KV cache in tokens), or {section}.mem_fraction (share of the free memory)"
    )
    assert problems("cuda", sizes["rollout.server"], sizes["teacher.server"]) == [expected]
    assert problems("auto", {}) == problems("cpu", {}) == [], "known, or checked, when the launch sees the machine"


@pytest.mark.parametrize(
    ("rollout", "teacher", "gpu"),
    [
        ({"mem_fraction": 0.25}, {"mem_fraction": 0.25}, 0),
        (TOKENS, {"mem_fraction": 0.25}, 0),
        ({**TOKENS, "gpus": [3]}, {"mem_fraction": 0.25, "gpus": [3, 2], "tensor_parallel": 2}, 3),
    ],
)
def test_two_servers_share_a_gpu_only_if_both_have_a_number_of_tokens(
    rollout: dict[str, Any], teacher: dict[str, Any], gpu: int
) -> None:
    expected = (
        f"rollout.server and teacher.server would both start on GPU {gpu}; give them different ones "
        "(rollout.server.gpus, teacher.server.gpus), or set max_total_tokens for both"
    )
    assert problems("cuda", rollout, teacher) == [expected]


@pytest.mark.parametrize(
    ("kind", "server", "expected"),
    [
        ("cpu", {"gpus": [0]}, "rollout.server.gpus = [0] has no effect with platform.kind=cpu; remove it"),
        (
            "cuda",
            {**TOKENS, "gpus": [1, 1], "tensor_parallel": 2},
            "rollout.server.gpus = [1, 1] names a GPU twice; expected different numbers",
        ),
        (
            "cuda",
            {**TOKENS, "gpus": [1, 2]},
            "rollout.server.gpus = [1, 2] names 2 GPUs; expected 1 (rollout.server.tensor_parallel)",
        ),
        (
            "cuda",
            {**TOKENS, "gpus": []},
            "rollout.server.gpus = [] names 0 GPUs; expected 1 (rollout.server.tensor_parallel)",
        ),
        (
            "cuda",
            {**TOKENS, "gpus": [0, 1, 2], "tensor_parallel": 2, "extra_args": ["--pp-size", "2"]},
            "rollout.server.gpus = [0, 1, 2] names 3 GPUs; expected a multiple of 2 (rollout.server.tensor_parallel)",
        ),
        (
            "cuda",
            {"url": "http://h:1", "gpus": [1], "threads": 2},
            "rollout.server.url names a running server, so rollout.server.gpus and rollout.server.threads would have "
            "no effect; remove the url or the rest",
        ),
        (
            "cpu",
            {"release_memory": True},
            "rollout.server.release_memory gives GPU memory back, and platform.kind=cpu; remove it",
        ),
        (
            "cuda",
            {"url": "http://h:1", "release_memory": True},
            "rollout.server.url names a running server, so rollout.server.release_memory would have no effect; "
            "remove the url or the rest",
        ),
        (
            "cuda",
            {**TOKENS, "extra_args": ["--enable-memory-saver"]},
            "rollout.server.extra_args: --enable-memory-saver is set by server.release_memory; remove it there",
        ),
        (
            "cuda",
            {**TOKENS, "extra_args": ["--base-gpu-id=1"]},
            "rollout.server.extra_args: --base-gpu-id is set by server.gpus; remove it there",
        ),
    ],
)
def test_gpus_that_do_not_fit_the_server_are_refused(kind: str, server: dict[str, Any], expected: str) -> None:
    assert problems(kind, server) == [expected]


def test_a_teachers_server_keeps_its_memory() -> None:
    expected = "teacher.server.release_memory: only a rollout server gives its memory back; remove it"
    assert problems("cuda", {"url": "http://h:1"}, {**TOKENS, "release_memory": True}) == [expected]
    assert problems("cuda", {**TOKENS, "release_memory": True}) == []


@pytest.mark.parametrize(
    ("rollout", "teacher", "expected"),
    [
        ({"weights": "broadcast"}, None, []),
        ({"url": "http://h:1", "weights": "broadcast"}, None, []),
        ({"url": "http://127.0.0.1:1", "weights": "shared"}, None, []),
        (
            {"url": "http://h:1", "weights": "shared"},
            None,
            ["rollout.server.weights=shared, but rollout.server.url=http://h:1 may be another machine; use broadcast, "
             "or name the server by 127.0.0.1"],
        ),
        (
            {},
            {"url": "http://h:1", "weights": "value"},
            ["teacher.server.weights: a teacher gets no weights from the trainer; remove it"],
        ),
        ({"url": "http://h:1", "weights": "disk", "weights_folder": "/shared"}, None, []),
        (
            {"url": "http://h:1", "weights": "disk"},
            None,
            ["rollout.server.weights=disk needs a folder that both machines see; set rollout.server.weights_folder"],
        ),
        (
            {"weights_folder": "/shared"},
            None,
            ["rollout.server.weights_folder has no effect with rollout.server.weights=null; remove it or set disk"],
        ),
        (
            {"weights": "disk", "weights_folder": "shared"},
            None,
            ["rollout.server.weights_folder = shared; expected an absolute path, which is the same on both machines"],
        ),
        (
            {},
            {"url": "http://h:1", "weights": "disk", "weights_folder": "/shared"},
            ["teacher.server.weights: a teacher gets no weights from the trainer; remove it",
             "teacher.server.weights_folder: a teacher gets no weights from the trainer; remove it"],
        ),
    ],
)  # fmt: skip
def test_a_route_of_weights_that_cannot_work_is_refused(
    rollout: dict[str, Any], teacher: dict[str, Any] | None, expected: list[str]
) -> None:
    assert problems("cpu", rollout, teacher) == expected


def test_a_malformed_url_is_told_by_its_own_check_alone() -> None:
    assert len(problems("cpu", {"url": "nonsense://[::1", "weights": "shared"})) >= 1
