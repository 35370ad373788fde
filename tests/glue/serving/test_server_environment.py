"""The environment of a started server: inherited variables, and limits to this host and this user."""

from __future__ import annotations

import logging
import os
import pwd
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tropd_mcore.config.schema import ServerConfig
from tropd_mcore.errors import ServerError
from tropd_mcore.serving.environment import Place, named_gpus, server_environment, threads_per_rank
from tropd_mcore.serving.sglang_launch import KEY_VARIABLE, require_key
from tropd_mcore.serving.transport import Endpoint

OF_TORCHRUN = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_RANK",
    "ROLE_NAME",
    "ROLE_WORLD_SIZE",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
)


def environment_of(
    device: str,
    *,
    ranks: int = 1,
    threads: int = 1,
    arguments: tuple[str, ...] = (),
    gpus: str | None = None,
    sized: bool = False,
    **extra: str,
) -> dict[str, str]:
    """The environment of a server, without pytest's additions to ours."""
    place = Place(
        device, 5, Path("/own"), "secret", ranks, threads, arguments, visible_gpus=gpus, sized_in_tokens=sized
    )
    return {name: value for name, value in server_environment(place, extra).items() if not name.startswith("PYTEST_")}


def own() -> dict[str, str]:
    """Variables that every started server gets."""
    user = pwd.getpwuid(os.getuid()).pw_name
    return {
        "TROPD_SERVER_KEY": "secret",
        "TMPDIR": "/own",
        "TORCHINDUCTOR_CACHE_DIR": f"{tempfile.gettempdir()}/torchinductor_{user}",
        "no_proxy": "127.0.0.1,localhost,::1",
        "NO_PROXY": "127.0.0.1,localhost,::1",
        "OMP_NUM_THREADS": "1",
    }


LOOPBACK = {
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE": "file:///own/ranks",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "5",
}


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The whole environment."""
    environment = {"PATH": "/bin", "HOME": "/nowhere", "CUDA_VISIBLE_DEVICES": "0", "MY_RANK": "7", "RANKING": "x"}
    for name in tuple(os.environ):
        if name not in environment:
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return environment


def test_a_gpu_server_inherits_all_of_our_environment_and_has_its_own_key_folder_and_interface(
    ours: dict[str, str],
) -> None:
    assert environment_of("cuda", ranks=2, threads=3) == ours | own() | LOOPBACK | {"OMP_NUM_THREADS": "3"}


def test_a_server_does_not_inherit_the_threads_of_a_rank_or_the_allocator_of_the_trainer(
    ours: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    assert environment_of("cuda", threads=4) == ours | own() | LOOPBACK | {"OMP_NUM_THREADS": "4"}


@pytest.mark.parametrize(("device", "ranks", "threads"), [("cpu", 1, 1), ("cpu", 2, 1), ("cuda", 1, 8), ("cuda", 4, 3)])
def test_a_rank_of_a_gpu_server_gets_its_part_of_the_cpus_by_default(
    monkeypatch: pytest.MonkeyPatch, device: str, ranks: int, threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    assert threads_per_rank(device, ranks) == threads
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert threads_per_rank(device, ranks) == 1


def test_gpus_of_unequal_free_memory_are_allowed_only_if_the_size_of_the_cache_is_given(ours: dict[str, str]) -> None:
    assert environment_of("cuda", ranks=2) == ours | own() | LOOPBACK
    allowed = {"SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0"}
    assert environment_of("cuda", ranks=2, sized=True) == ours | own() | LOOPBACK | allowed
    assert "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK" not in environment_of("cpu", ranks=2, sized=True)


@pytest.mark.parametrize(
    ("seen", "gpus", "named"),
    [(None, (2, 3), "2,3"), ("4,5, 6", (0, 2), "4,6"), ("GPU-a,GPU-b", (1,), "GPU-b"), ("0", None, None)],
)
def test_the_gpus_of_a_server_are_counted_among_those_of_the_launch(
    ours: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    seen: str | None,
    gpus: tuple[int, ...] | None,
    named: str | None,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen) if seen else monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert named_gpus(gpus, key="rollout.server.gpus") == named
    assert environment_of("cuda", gpus=named).get("CUDA_VISIBLE_DEVICES") == (named or seen)


@pytest.mark.parametrize(("seen", "count"), [("", 0), ("3", 1), ("3,4,", 2)])
def test_a_gpu_that_the_launch_does_not_see_is_refused_by_its_key(
    monkeypatch: pytest.MonkeyPatch, seen: str, count: int
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    with pytest.raises(ServerError) as refused:
        named_gpus((0, 2), key="teacher.server.gpus")
    expected = f"teacher.server.gpus=[0, 2]: expected numbers below {count}, because CUDA_VISIBLE_DEVICES={seen}"
    assert str(refused.value) == expected


@pytest.mark.parametrize("name", [*OF_TORCHRUN, "SGLANG_RETURN_ORIGINAL_LOGPROB"])
def test_variables_of_torchrun_and_variables_that_change_log_probs_are_not_inherited(
    ours: dict[str, str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "1")
    assert environment_of("cuda") == ours | own() | LOOPBACK
    changed: dict[str, Any] = {name: "2"}
    assert environment_of("cuda", **changed) == ours | own() | LOOPBACK | {name: "2"}


def test_a_cpu_server_gets_its_threads_and_each_of_several_ranks_its_cpus(
    ours: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {9, 4, 5})
    engine = {"SGLANG_USE_CPU_ENGINE": "1"}
    one = environment_of("cpu", threads=2)
    assert one == ours | own() | LOOPBACK | engine | {"OMP_NUM_THREADS": "2"}
    two = environment_of("cpu", ranks=2, threads=2, OMP_NUM_THREADS="5")
    assert two == {
        **ours,
        **own(),
        **LOOPBACK,
        **engine,
        "OMP_NUM_THREADS": "5",
        "SGLANG_CPU_OMP_THREADS_BIND": "4,5|9,4",
    }


def test_a_server_reaches_itself_without_a_proxy_and_keeps_the_users_no_proxy_entries(
    ours: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy:1")
    monkeypatch.setenv("no_proxy", "intern.example, ::1")
    found = environment_of("cuda")
    assert found["http_proxy"] == "http://proxy:1", "models may still come through it"
    assert found["no_proxy"] == "intern.example,::1,127.0.0.1,localhost"
    assert found["NO_PROXY"] == found["no_proxy"]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"NO_PROXY": "a.example"}, "a.example,127.0.0.1,localhost,::1"),
        ({"no_proxy": "a.example", "NO_PROXY": ""}, "a.example,127.0.0.1,localhost,::1"),
        ({"no_proxy": "a.example,b", "NO_PROXY": "b, c"}, "a.example,b,c,127.0.0.1,localhost,::1"),
    ],
)
def test_no_proxy_entries_under_either_name_are_set_under_both(
    ours: dict[str, str], monkeypatch: pytest.MonkeyPatch, given: dict[str, str], wanted: str
) -> None:
    """Most programs read the first of the two names that exists."""
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    found = environment_of("cuda")
    assert (found["no_proxy"], found["NO_PROXY"]) == (wanted, wanted)


@pytest.mark.parametrize("argument", ["--dp-size", "--dp=2", "--nnodes", "--dist-init-addr", "--data-parallel-size"])
def test_a_server_of_several_groups_or_hosts_uses_sglangs_own_rendezvous(ours: dict[str, str], argument: str) -> None:
    """A rendezvous file shared by all groups would mix their ranks."""
    assert environment_of("cuda", arguments=("--log-level", "info", argument, "2")) == ours | own()


def test_the_key_is_in_no_log_line_and_a_broken_log_call_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The liars: a line without its argument, an argument that cannot be written, and one that raises."""

    class Broken:
        def __str__(self) -> str:
            raise RuntimeError("no text")

    monkeypatch.setenv(KEY_VARIABLE, "secret")
    monkeypatch.setattr(sys, "argv", ["server"])
    before = logging.getLogRecordFactory()
    try:
        require_key()
        make = logging.getLogRecordFactory()
        record = make("x", logging.INFO, "x.py", 1, "arguments %s", ("api_key='secret'",), None)
        assert record.getMessage() == "arguments api_key='<key>'"
        for bad in (("%s %s", (1,)), ("%d", ("a",)), ("%s", (Broken(),))):
            assert make("x", logging.INFO, "x.py", 1, *bad, None).msg == bad[0]
    finally:
        logging.setLogRecordFactory(before)
    assert sys.argv == ["server", "--api-key=secret"] and KEY_VARIABLE not in os.environ


def test_the_repr_of_objects_that_hold_the_key_does_not_show_it() -> None:
    assert "secret" not in repr(Place("cuda", 5, Path("/own"), "secret"))
    endpoint = Endpoint("http://x", ServerConfig(), "rollout.server", "rollout.server", api_key="secret")
    assert "secret" not in repr(endpoint)
