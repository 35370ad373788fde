"""Checks that a real server holds the published weights, and that it is the right teacher, despite a lying proxy."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.glue.stubs import make_config, one_rank
from tests.liars import Liar, liar, nothing_done
from tests.sglang.conftest import cpu_server
from tests.sglang.streams import plan, stream, weights
from tropd_mcore.config.schema import Config, ServerConfig
from tropd_mcore.errors import GateError
from tropd_mcore.mcore.parallel import Layout
from tropd_mcore.rollout.publication import PublicationLedger, served_name
from tropd_mcore.rollout.publisher import WeightPublisher
from tropd_mcore.serving.client import SglangClient
from tropd_mcore.serving.process import ServerSpec
from tropd_mcore.serving.supervisor import SupervisedServer
from tropd_mcore.teacher.identity import read_model
from tropd_mcore.teacher.identity_check import TeacherCheck


@pytest.fixture
def proxy(server: SupervisedServer) -> Iterator[Liar]:
    with liar(server.client.url) as running:
        yield running


@pytest.fixture
def one_layout() -> Iterator[Layout]:
    with one_rank() as layout:
        yield layout


def publisher_of(proxy: Liar, folder: Path, **given: Any) -> WeightPublisher:
    """A publisher whose first update is proven."""
    client = SglangClient(proxy.url, ServerConfig(url=proxy.url, max_retries=0), key="rollout.server")
    publisher = WeightPublisher(client, plan(folder), ledger=PublicationLedger("rollout.server"), **given)
    publisher.verify_sync(lambda: stream(folder), "first")
    return publisher


def label(server: SupervisedServer) -> str:
    return server.client.info().weight_version


def test_the_servers_checksums_follow_the_weights_tensor_by_tensor(
    proxy: Liar, server: SupervisedServer, qwen3_folder: Path, other_folder: Path
) -> None:
    publisher = publisher_of(proxy, qwen3_folder)
    before = server.client.weights_checksum()
    assert before is not None and before.tensors.keys() == {served_name(name) for name in weights(qwen3_folder)}
    mixed = weights(qwen3_folder) | {"model.norm.weight": weights(other_folder)["model.norm.weight"]}
    for version, tensors in (("one", mixed), ("again", mixed), ("all", weights(other_folder))):
        publisher.publish(iter(tensors.items()), version)
        publisher.check_unchanged()
        assert label(server) == version
    publisher.publish(iter(mixed.items()), "back")
    after = server.client.weights_checksum()
    assert after is not None
    assert [name for name in before.tensors if before.tensors[name] != after.tensors[name]] == ["model.norm.weight"]


def test_an_update_that_is_acknowledged_but_not_applied_stops_at_the_publication(
    proxy: Liar, server: SupervisedServer, qwen3_folder: Path, other_folder: Path
) -> None:
    publisher = publisher_of(proxy, qwen3_folder)
    proxy.tell("/update_weights_from_tensor", nothing_done)
    with pytest.raises(
        GateError, match=r"rollout\.server: the server took an update in which 47 of 47 tensors are new"
    ):
        publisher.publish(stream(other_folder), "second")
    assert proxy.told and label(server) != "second" and server.client.healthy()


def test_an_update_with_one_lost_request_stops_at_the_publication(
    proxy: Liar, server: SupervisedServer, qwen3_folder: Path, other_folder: Path
) -> None:
    publisher = publisher_of(proxy, qwen3_folder, bucket_bytes=20_000)
    proxy.tell("/update_weights_from_tensor", nothing_done, times=1)
    with pytest.raises(GateError, match="of the server's 35 tensors kept its old value"):
        publisher.publish(stream(other_folder), "second")
    assert proxy.told == 1 and label(server) != "second"


def test_a_first_update_that_is_not_applied_fails_its_proof(proxy: Liar, qwen3_folder: Path) -> None:
    proxy.tell("/update_weights_from_tensor", nothing_done)
    with pytest.raises(GateError, match="or an update did not arrive"):
        publisher_of(proxy, qwen3_folder)


def test_a_foreign_update_that_keeps_the_label_is_detected(
    proxy: Liar, server: SupervisedServer, qwen3_folder: Path
) -> None:
    publisher = publisher_of(proxy, qwen3_folder)
    server.client.randomize_weights()
    assert label(server) == "first"
    with pytest.raises(GateError, match="the server's weights changed after their publication"):
        publisher.check_unchanged()


@pytest.fixture(scope="module")
def teacher(other_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SupervisedServer]:
    """A server that runs elsewhere and serves other_folder."""
    with SupervisedServer(
        cpu_server(other_folder, tmp_path_factory.mktemp("teacher"), name="teacher", keyed=False)
    ) as running:
        yield running


def elsewhere(url: str, tmp_path: Path) -> SupervisedServer:
    spec = ServerSpec(
        key="teacher.server",
        model_key="teacher.path",
        model_path=Path("nowhere"),
        config=ServerConfig(url=url),
        device="cpu",
        run_dir=tmp_path,
        name="teacher",
    )
    server = SupervisedServer(spec)
    server.start()
    return server


def config_of(student: Path, teacher: Path, run_dir: Path) -> Config:
    sections = {"student": {"path": student}, "teacher": {"kind": "sglang", "path": teacher, "check_every": 2}}
    return make_config(run_dir, **sections)


def check_of(server: SupervisedServer, config: Config, layout: Layout) -> TeacherCheck:
    return TeacherCheck(server, config, layout.groups.control)


def act(server: SupervisedServer, path: str, body: dict[str, str]) -> None:
    """Send a request to the server, as anyone who reaches the port can."""
    headers = {"Content-Type": "application/json"}
    ask = urllib.request.Request(f"{server.client.url}{path}", json.dumps(body).encode(), headers)
    urllib.request.urlopen(ask).read()


def test_a_real_server_reports_the_model_that_it_serves(teacher: SupervisedServer, other_folder: Path) -> None:
    found = read_model(teacher.client, with_checksum=True)
    assert (found.model_path, found.weight_version, found.model_type) == (str(other_folder), "default", "qwen3")
    assert (found.dtype, found.quantization, found.tensor_parallel, found.vocab_size) == ("float32", None, 1, 307)
    assert found.checksum == read_model(teacher.client, with_checksum=True).checksum
    assert read_model(teacher.client, with_checksum=False).checksum is None


def test_a_teacher_url_that_serves_the_student_is_refused_and_one_that_serves_the_teacher_passes(
    teacher: SupervisedServer,
    qwen3_folder: Path,
    other_folder: Path,
    llama_folder: Path,
    one_layout: Layout,
    tmp_path: Path,
) -> None:
    server = elsewhere(teacher.client.url, tmp_path)
    check_of(server, config_of(qwen3_folder, other_folder, tmp_path / "right"), one_layout)
    with pytest.raises(
        GateError, match=rf"teacher\.server \({server.client.url}\) serves the student: .*{other_folder}"
    ):
        check_of(server, config_of(other_folder, qwen3_folder, tmp_path / "swapped"), one_layout)
    with pytest.raises(GateError, match=rf"serves other weights than teacher\.path={llama_folder}: "):
        check_of(server, config_of(qwen3_folder, llama_folder, tmp_path / "other"), one_layout)


def test_overwritten_teacher_weights_are_detected_at_the_next_check_and_a_changed_label_at_once(
    teacher: SupervisedServer, qwen3_folder: Path, other_folder: Path, one_layout: Layout, tmp_path: Path
) -> None:
    server = elsewhere(teacher.client.url, tmp_path)
    check = check_of(server, config_of(qwen3_folder, other_folder, tmp_path / "run"), one_layout)
    for step in range(3):
        check.at_step(step)
    act(teacher, "/update_weight_version", {"new_version": "v7"})
    with pytest.raises(GateError, match="weight_version default -> v7"):
        check.at_step(3)
    act(teacher, "/update_weight_version", {"new_version": "default"})
    check.at_step(3)
    act(teacher, "/weights_checker", {"action": "reset_tensors"})
    check.at_step(3)
    with pytest.raises(
        GateError, match=r"checksum \w{12} -> \w{12}; scores of a text by .* the scores of steps 2 to 4"
    ):
        check.at_step(4)


def test_changed_teacher_weights_under_a_forged_checksum_are_detected_by_their_scores(
    server: SupervisedServer,
    qwen3_folder: Path,
    other_folder: Path,
    llama_folder: Path,
    one_layout: Layout,
    tmp_path: Path,
) -> None:
    """The proxy always answers with the checksum of the start."""
    WeightPublisher(server.client, plan(other_folder)).publish(stream(other_folder), "teacher")
    with liar(server.client.url) as proxy:
        forged: list[Any] = []

        async def always_the_same(body: Any, forward: Any) -> Any:
            forged.append(await forward(body))
            return forged[0]

        proxy.tell("/weights_checker", always_the_same)
        found = elsewhere(proxy.url, tmp_path)
        check = check_of(found, config_of(qwen3_folder, other_folder, tmp_path / "run"), one_layout)
        check.at_step(0)
        server.client.randomize_weights()
        check.at_step(1)
        with pytest.raises(GateError, match="at the start of this launch: scores of a text by"):
            check.at_step(2)
        assert len(forged) > 1
