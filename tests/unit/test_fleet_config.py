"""A fleet in the configuration: entries take what they do not set from the template, and each problem names its entry.

`server_checks` and `config.server_section` are tested; nothing is started.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tropd_mcore.config.derived import rollout_servers, server_name, teacher_servers, used_servers
from tropd_mcore.config.loader import load
from tropd_mcore.config.plan import plan, resolved_yaml
from tropd_mcore.config.schema import Config
from tropd_mcore.errors import ConfigError

TREE: dict[str, Any] = {
    "run": {"dir": "run"},
    "platform": {"kind": "cpu"},
    "student": {"path": "student"},
    "teacher": {"path": "teacher"},
    "data": {"prompts": "prompts.jsonl"},
    "objective": {"kind": "gkd"},
}


def loaded(folder: Path, rollout: dict[str, Any], *overrides: str, **sections: Any) -> tuple[Config, dict[str, str]]:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**TREE, "rollout": rollout, **sections}))
    return load(path, list(overrides))


def problems(folder: Path, rollout: dict[str, Any], *overrides: str, **sections: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        loaded(folder, rollout, *overrides, **sections)
    return caught.value.problems


def test_entries_take_the_templates_values_and_may_take_them_back(tmp_path: Path) -> None:
    template = {"tensor_parallel": 2, "max_concurrency": 8}
    entries = [{}, {"tensor_parallel": 1, "max_concurrency": 3}, {"url": "http://127.0.0.1:3"}]
    config, sources = loaded(tmp_path, {"server": template, "servers": entries}, "rollout.servers.0.threads=4")
    servers = list(rollout_servers(config).values())
    assert [server.tensor_parallel for server in servers] == [2, 1, 1], "a running server has its own size"
    assert [server.max_concurrency for server in servers] == [8, 3, 8]
    assert servers[0].threads == 4
    assert sources["rollout.servers.0.max_concurrency"] == sources["rollout.server.max_concurrency"]
    assert sources["rollout.servers.0.threads"] == "command line"


def test_a_resolved_file_gives_the_same_fleet(tmp_path: Path) -> None:
    config, sources = loaded(tmp_path, {"server": {"threads": 2}, "servers": [{}, {"port": 4000}]})
    (tmp_path / "resolved.yaml").write_text(resolved_yaml(config, sources))
    assert load(tmp_path / "resolved.yaml", [])[0] == config


def test_servers_are_named_by_their_place(tmp_path: Path) -> None:
    alone, _ = loaded(tmp_path, {})
    assert list(used_servers(alone)) == ["rollout.server"]
    several, _ = loaded(tmp_path, {"servers": [{}, {}]}, teacher={"path": "t", "kind": "sglang", "servers": [{}, {}]})
    keys = ["rollout.servers.0", "rollout.servers.1", "teacher.servers.0", "teacher.servers.1"]
    assert list(used_servers(several)) == keys
    assert [server_name(key) for key in keys] == ["rollout-0", "rollout-1", "teacher-0", "teacher-1"]
    assert server_name("rollout.server") == "rollout"
    assert list(teacher_servers(several)) == keys[2:]


def test_equal_servers_are_counted_in_the_plan(tmp_path: Path) -> None:
    config, _ = loaded(tmp_path, {"servers": [{}, {}, {"node": 1}]})
    text = plan(config)
    assert "3 servers: 2 x SGLang on a free port, started by rank 0" in text
    assert "started by the first rank of node 1" in text


@pytest.mark.parametrize(
    ("servers", "expected"),
    [
        ([{}, {"tp": 2}], "rollout.servers.1.tp: unknown key; did you mean rollout.servers.*.tensor_parallel?"),
        ([{"port": 4000}, {"port": 4000}], "rollout.servers.0.port and rollout.servers.1.port are both 4000; give"),
        (
            [{"url": "http://h:1"}, {"url": "http://h:1/"}],
            "rollout.servers.0.url and rollout.servers.1.url are both http://h:1; expected one server each",
        ),
        ([{}, {"dtype": "float32"}], "rollout.servers.1.dtype = float32 differs from rollout.server.dtype = None"),
        ([{"max_total_tokens": 5}], "rollout.servers.0.max_total_tokens = 5 holds less than one request"),
        ([{"extra_args": ["--dp-size", "2"]}], "rollout.servers.0.extra_args: --dp-size makes replicas inside of one"),
        ([{"extra_args": ["--enable-dp-attention"]}], "SGLang takes new weights for one replica only"),
        ([{"extra_args": ["--nnodes=2"]}], "rollout.servers.0.extra_args: --nnodes is set by servers of one machine"),
        ([{"weights": "shared", "node": 1}], "rollout.servers.0.node=1 is another machine; use broadcast"),
        ([{"request_timeout_s": 9e9}], "rollout.servers.0.request_timeout_s = 9e+09 must be below"),
        ("many", "rollout.servers: expected a list, found 'many'"),
        (["one"], "rollout.servers.0: expected a section with keys, found 'one'"),
    ],
)
def test_a_problem_names_the_entry(tmp_path: Path, servers: Any, expected: str) -> None:
    found = problems(tmp_path, {"servers": servers})
    assert any(expected in problem for problem in found), found


def test_two_ports_on_two_nodes_may_be_equal(tmp_path: Path) -> None:
    config, _ = loaded(tmp_path, {"servers": [{"port": 4000}, {"port": 4000, "node": 1}]})
    assert len(rollout_servers(config)) == 2


def test_two_servers_of_one_gpu_are_refused_unless_they_have_sizes(tmp_path: Path) -> None:
    cuda = {"kind": "cuda"}
    server = {"mem_fraction": 0.3}
    found = problems(tmp_path, {"server": server, "servers": [{"gpus": [0]}, {"gpus": [0]}]}, platform=cuda)
    assert any("rollout.servers.0 and rollout.servers.1 would both start on GPU 0" in problem for problem in found)
    loaded(tmp_path, {"server": server, "servers": [{"gpus": [0]}, {"gpus": [1]}]}, platform=cuda)
    loaded(tmp_path, {"server": server, "servers": [{"gpus": [0]}, {"gpus": [0], "node": 1}]}, platform=cuda)


def test_servers_of_a_teacher_in_the_job_are_refused(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, {}, teacher={"path": "t", "servers": [{}]})
    assert "teacher.servers: teacher.kind=megatron uses no server" in found
