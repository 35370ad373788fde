"""One weight update by the publisher, and the state after a failure. The client only records its calls."""

from __future__ import annotations

import hashlib
import logging
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from tropd_mcore.errors import GateError, ServerDied, ServerError, ServerHung
from tropd_mcore.rollout import route_choice
from tropd_mcore.rollout.publication import PublicationLedger
from tropd_mcore.rollout.publisher import WeightPublisher
from tropd_mcore.serving import weight_routes
from tropd_mcore.serving.wire import ScoringRequest, ServerInfo, WeightChecksums

MIB = 2**20
SHAPES = {"a": (3, 2), "b": (5,), "c": (2, 2, 3), "d": ()}
TOTAL_BYTES = 4 * (6 + 5 + 12 + 1)
PLAN = [(name, shape, torch.float32) for name, shape in SHAPES.items()]
WHOLE_UPDATE = ["pause", "begin", "update", "end", "flush", "label", "resume"]

Stream = Iterator[tuple[str, Tensor]]


@dataclass
class NotedServer:
    """A server and its client in one. Like SGLang it ignores names that its model does not have."""

    same_host: bool = False
    tensor_parallel: int = 1
    dtype: str = "float32"
    quantization: str | None = None
    loads: tuple[str, ...] = tuple(SHAPES)
    """Names of tensors that an update sets. For other names it only reports success."""
    has_checksum: bool = True
    label: str = "default"
    keeps_label: bool = False
    keeps_weights: bool = False
    """Whether it ignores requests to overwrite its weights."""
    refused: dict[str, ServerError] = field(default_factory=dict)
    """Call -> the error that it raises."""
    scores: list[Any] = field(default_factory=list)
    weights: dict[str, bytes] = field(default_factory=lambda: dict.fromkeys(SHAPES, b"from the folder"))
    calls: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    """Labels of the updates."""
    payloads: list[list[bytes]] = field(default_factory=list)
    names: list[list[str]] = field(default_factory=list)
    """Tensors of each update."""
    asked: list[ScoringRequest] = field(default_factory=list)
    checked: int = 0
    """Number of requests for checksums."""
    key: str = "rollout.server"

    def info(self) -> ServerInfo:
        return ServerInfo(
            version="0.5.23",
            weight_version=self.label,
            tensor_parallel=self.tensor_parallel,
            longest_input=511,
            longest_sequence=516,
            dtype=self.dtype,
            quantization=self.quantization,
            device="cpu",
        )

    def pause(self) -> None:
        self._note("pause")

    def resume(self, limit_s: float | None = None) -> None:
        self._note("resume")

    def begin_weight_update(self) -> None:
        self._note("begin")

    def end_weight_update(self, limit_s: float | None = None) -> None:
        self._note("end")

    def flush_cache(self) -> None:
        self._note("flush")

    def update_weights(self, payloads: list[bytes], *, version: str) -> None:
        self._note("update")
        self.labels.append(version)
        self.label = version
        self.payloads.append(payloads)
        self.names.append([])
        for name, tensor in pickle.loads(payloads[0]):
            self.names[-1].append(name)
            if name in self.weights and name in self.loads:
                self.weights[name] = bits(tensor)

    def label_weights(self, version: str) -> None:
        self._note("label")
        self.label = self.label if self.keeps_label else version

    def weights_checksum(self) -> WeightChecksums | None:
        self.checked += 1
        tensors = {name: (hashlib.sha256(held).hexdigest(),) for name, held in self.weights.items()}
        return WeightChecksums(repr(sorted(tensors.items())), tensors) if self.has_checksum else None

    def randomize_weights(self) -> None:
        self._note("randomize")
        if not self.keeps_weights:
            self.weights = dict.fromkeys(self.weights, b"random")

    def score(self, requests: list[ScoringRequest]) -> list[Any]:
        self.asked += requests
        return self.scores

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if call in self.refused:
            raise self.refused[call]


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def weights(first: float = 0.0) -> dict[str, Tensor]:
    """Tensors without two equal values."""
    sizes = [torch.Size(shape).numel() for shape in SHAPES.values()]
    pieces = torch.arange(first, first + sum(sizes)).split(sizes)
    return {name: piece.view(SHAPES[name]) for name, piece in zip(SHAPES, pieces, strict=True)}


def held(first: float) -> dict[str, bytes]:
    return {name: bits(tensor) for name, tensor in weights(first).items()}


def publisher_of(server: NotedServer, plan: Any = PLAN, **given: Any) -> WeightPublisher:
    return WeightPublisher(server, plan, **given)  # type: ignore[arg-type]


def stream(first: float = 0.0) -> Stream:
    return iter(weights(first).items())


@pytest.mark.parametrize("transport", ["shared", "value"])
def test_an_update_sends_every_tensor_bit_for_bit_and_then_the_label(transport: Literal["shared", "value"]) -> None:
    server = NotedServer()
    report = publisher_of(server, transport=transport).publish(stream(7.0), "v1")
    assert server.weights == held(7.0) and server.label == "v1"
    assert server.calls == WHOLE_UPDATE and server.labels == ["v1:incomplete"]
    assert report.version == "v1" and report.seconds >= 0


def test_the_report_counts_tensors_requests_and_gibibytes_of_one_update() -> None:
    publisher = publisher_of(NotedServer(), bucket_bytes=52)
    for version in ("v1", "v2"):
        report = publisher.publish(stream(), version)
        assert (report.tensors, report.buckets, report.gib) == (len(SHAPES), 2, TOTAL_BYTES / 2**30)


@pytest.mark.parametrize(
    ("bucket_bytes", "expected"),
    [
        (96, ["abcd"]),
        (95, ["abc", "d"]),
        (44, ["ab", "c", "d"]),
        (43, ["a", "b", "c", "d"]),
        (24, ["a", "b", "c", "d"]),
        (1, ["a", "b", "c", "d"]),
    ],
)
def test_requests_are_filled_with_whole_tensors_in_order_up_to_the_limit(
    bucket_bytes: int, expected: list[str]
) -> None:
    server = NotedServer()
    publisher_of(server, bucket_bytes=bucket_bytes).publish(stream(), "v1")
    assert ["".join(names) for names in server.names] == expected
    assert server.labels == ["v1:incomplete"] * len(expected)
    assert server.calls == ["pause", "begin", *["update"] * len(expected), "end", "flush", "label", "resume"]


def test_a_request_holds_at_most_half_a_gibibyte_of_tensors_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"a": 256 * MIB, "b": 256 * MIB, "c": 1}
    monkeypatch.setattr(
        weight_routes,
        "by_value",
        lambda bucket, copies: [pickle.dumps([(name, torch.zeros(1)) for name, _ in bucket])],
    )
    server = NotedServer()
    publisher = publisher_of(server, [(name, (size,), torch.uint8) for name, size in sizes.items()], transport="value")
    without_memory = torch.zeros(1, dtype=torch.uint8)
    publisher.publish(((name, without_memory.expand(size)) for name, size in sizes.items()), "v1")
    assert server.names == [["a", "b"], ["c"]]


def test_every_rank_gets_a_payload_and_payloads_by_value_share_the_limit_of_a_request() -> None:
    server = NotedServer(tensor_parallel=2)
    publisher_of(server, transport="value", bucket_bytes=2 * 46).publish(stream(), "v1")
    assert server.names == [["a", "b"], ["c"], ["d"]]
    assert all(len(payloads) == 2 and payloads[0] == payloads[1] for payloads in server.payloads)
    server = NotedServer(tensor_parallel=2)
    publisher_of(server, transport="shared", bucket_bytes=2 * 46).publish(stream(), "v1")
    assert server.names == [["a", "b", "c"], ["d"]]
    assert all(len(payloads) == 2 for payloads in server.payloads)


def test_weights_go_through_shared_memory_to_a_server_that_we_started_and_by_value_to_any_other() -> None:
    def through_shared_memory(**given: Any) -> bool:
        server = NotedServer(**given)
        publisher_of(server).publish(stream(), "v1")
        return b"rebuild_storage_filename" in server.payloads[0][0]

    assert through_shared_memory(same_host=True)
    assert not through_shared_memory(same_host=False)


def test_a_large_model_by_value_is_told_once_with_its_bytes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(route_choice, "SMALL_BYTES", TOTAL_BYTES - 1)
    publisher = publisher_of(NotedServer(tensor_parallel=3), transport="value")
    for version in ("v1", "v2"):
        publisher.publish(stream(), version)
    assert caplog.text.count("3 copies of the weights in base64") == 1
    assert "rollout.server.weights=broadcast sends the weights once" in caplog.text


def unknown() -> Stream:
    yield from stream()
    yield "e", torch.zeros(1)


def wrong_shape() -> Stream:
    for name, tensor in stream():
        yield name, tensor.T if name == "a" else tensor


def wrong_dtype() -> Stream:
    for name, tensor in stream():
        yield name, tensor.bfloat16() if name == "b" else tensor


def same_size_other_dtype() -> Stream:
    for name, tensor in stream():
        yield name, tensor.int() if name == "b" else tensor


def missing() -> Stream:
    for name, tensor in stream():
        if name not in ("c", "d"):
            yield name, tensor


def twice() -> Stream:
    yield from stream()
    yield "a", weights()["a"]


BROKEN = [
    (unknown, r"rollout.server: e is not a tensor of the plan \(4 tensors\)"),
    (wrong_shape, r"rollout.server: a is torch.float32 \[2, 3\]; the plan says torch.float32 \[3, 2\]"),
    (wrong_dtype, r"rollout.server: b is torch.bfloat16 \[5\]; the plan says torch.float32 \[5\]"),
    (same_size_other_dtype, r"rollout.server: b is torch.int32 \[5\]; the plan says torch.float32 \[5\]"),
    (missing, "rollout.server: 2 of 4 tensors are missing from the weights to publish, the first is c"),
    (twice, "rollout.server: a comes twice in one update"),
]


@pytest.mark.parametrize(("broken", "message"), BROKEN)
def test_a_wrong_weight_stream_of_one_request_sends_nothing_to_the_server(
    broken: Callable[[], Stream], message: str
) -> None:
    server = NotedServer()
    publisher = publisher_of(server)
    publisher.publish(stream(), "v1")
    server.calls.clear()
    with pytest.raises(ServerError, match=message):
        publisher.publish(broken(), "v2")
    assert server.calls == [] and server.label == "v1" and server.weights == held(0.0)


@pytest.mark.parametrize("broken", [unknown, missing, twice])
def test_a_weight_stream_that_fails_after_some_requests_leaves_an_unexpected_label_and_can_be_repeated(
    broken: Callable[[], Stream],
) -> None:
    server = NotedServer()
    publisher = publisher_of(server, bucket_bytes=1)
    publisher.publish(stream(), "v1")
    server.calls.clear()
    with pytest.raises(ServerError, match=r"rollout.server: "):
        publisher.publish(broken(), "v2")
    assert server.label == "v2:incomplete" and set(server.calls[2:-2]) == {"update"}
    assert server.calls[:2] == ["pause", "begin"] and server.calls[-2:] == ["end", "resume"]
    publisher.publish(stream(5.0), "v2")
    assert server.label == "v2" and server.weights == held(5.0)


def test_a_server_that_does_not_adopt_the_label_is_an_error() -> None:
    server = NotedServer(keeps_label=True)
    with pytest.raises(
        ServerError, match=r"rollout.server: the server reports weights 'v1:incomplete' after one to 'v1'"
    ):
        publisher_of(server).publish(stream(), "v1")


@pytest.mark.parametrize(
    ("refused", "calls"),
    [
        ("pause", ["pause"]),
        ("begin", ["pause", "begin", "resume"]),
        ("update", ["pause", "begin", "update", "end", "resume"]),
        ("end", ["pause", "begin", "update", "end", "end", "resume"]),
        ("flush", ["pause", "begin", "update", "end", "flush", "resume"]),
        ("label", ["pause", "begin", "update", "end", "flush", "label", "resume"]),
    ],
)
def test_after_a_refused_update_the_session_is_closed_and_sampling_continues_without_the_label(
    refused: str, calls: list[str]
) -> None:
    server = NotedServer(refused={refused: ServerError(f"no {refused}")})
    with pytest.raises(ServerError, match=f"no {refused}"):
        publisher_of(server).publish(stream(), "v1")
    assert server.calls == calls and server.label != "v1"
    server.refused.clear()
    publisher_of(server).publish(stream(3.0), "v1")
    assert server.label == "v1" and server.weights == held(3.0)


def test_a_failure_to_close_the_session_does_not_hide_the_first_error(caplog: pytest.LogCaptureFixture) -> None:
    refused = {"update": ServerDied("gone"), "end": ServerError("cannot end"), "resume": ServerError("cannot resume")}
    server = NotedServer(refused=refused)
    with pytest.raises(ServerDied, match="gone"):
        publisher_of(server).publish(stream(), "v1")
    assert server.calls == ["pause", "begin", "update", "end", "resume"]
    assert "cannot end (while an update was abandoned)" in caplog.text and "cannot resume (while" in caplog.text


def test_a_server_that_hangs_in_an_update_is_not_asked_again() -> None:
    server = NotedServer(refused={"update": ServerHung("hung")})
    with pytest.raises(ServerHung, match="hung"):
        publisher_of(server).publish(stream(), "v1")
    assert server.calls == ["pause", "begin", "update"]


def test_a_server_that_is_gone_while_an_update_is_abandoned_gets_no_further_request() -> None:
    refused = {"update": ServerError("refused"), "end": ServerDied("gone")}
    server = NotedServer(refused=refused)
    with pytest.raises(ServerError, match="refused"):
        publisher_of(server).publish(stream(), "v1")
    assert server.calls == ["pause", "begin", "update", "end"]


def test_an_error_of_the_trainer_while_gathering_weights_also_closes_the_session() -> None:
    def breaks() -> Stream:
        yield "a", weights()["a"]
        yield "b", weights()["b"]
        raise RuntimeError("a collective failed")

    server = NotedServer()
    with pytest.raises(RuntimeError, match="a collective failed"):
        publisher_of(server, bucket_bytes=1).publish(breaks(), "v1")
    assert server.calls == ["pause", "begin", "update", "end", "resume"] and server.label == "v1:incomplete"


def mebibytes(*sizes: int) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """A plan of bfloat16 tensors of these sizes."""
    return [(f"weight {index}", (size, MIB // 2), torch.bfloat16) for index, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("sizes", "bucket_mib", "needed_mib"),
    [
        ((100, 200, 50), 1000, 350),  # all tensors fit in one bucket
        ((100, 200, 50), 300, 300),  # one bucket
        ((100, 200, 50), 60, 200),  # a tensor that is larger than a bucket
    ],
)
def test_weights_go_by_value_with_a_warning_if_the_largest_bucket_does_not_fit_into_shared_memory(
    sizes: tuple[int, ...],
    bucket_mib: int,
    needed_mib: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for room, route in ((needed_mib * MIB, "shared"), (needed_mib * MIB - 1, "value")):
        assert caplog.text == ""
        monkeypatch.setattr(route_choice, "shared_memory_room", lambda room=room: room)
        made = publisher_of(NotedServer(same_host=True), mebibytes(*sizes), bucket_bytes=bucket_mib * MIB)
        assert made.route == route
    expected = f"need {needed_mib} MiB of /dev/shm but {needed_mib - 1} are usable; weights go through HTTP by value"
    assert expected in caplog.text


def test_without_room_in_shared_memory_an_update_is_still_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route_choice, "shared_memory_room", lambda: TOTAL_BYTES - 1)
    server = NotedServer(same_host=True)
    publisher_of(server).publish(stream(2.0), "v1")
    assert b"rebuild_storage_filename" not in server.payloads[0][0]
    assert server.weights == held(2.0) and server.label == "v1"


def test_the_probe_requests_the_scores_of_every_token_but_the_first() -> None:
    logp_N = np.array([-1.0, -2.0], np.float32)
    server = NotedServer(scores=[SimpleNamespace(logp_N=logp_N)])
    assert publisher_of(server).probe(np.array([5, 6, 7], np.int32)) is logp_N
    (asked,) = server.asked
    assert asked.token_ids.tolist() == [5, 6, 7] and asked.first == 1 and not asked.topk
    server.scores = [ServerError("refused")]
    with pytest.raises(ServerError, match="refused"):
        publisher_of(server).probe(np.array([5, 6, 7], np.int32))


def test_a_proof_overwrites_the_weights_between_two_updates_and_ends_with_the_version() -> None:
    server = NotedServer()
    publisher_of(server).verify_sync(lambda: stream(4.0), "v1")
    assert server.calls == [*WHOLE_UPDATE, "randomize", *WHOLE_UPDATE]
    assert server.labels == ["v1:first:incomplete", "v1:incomplete"]
    assert server.label == "v1" and server.weights == held(4.0)


def test_a_proof_fails_if_the_server_has_a_weight_that_the_plan_does_not_name() -> None:
    server = NotedServer()
    server.weights["not in the plan"] = b"from the folder"
    with pytest.raises(GateError, match="two updates with the same 4 tensors left different weights"):
        publisher_of(server).verify_sync(stream, "v1")


def test_a_proof_fails_if_the_server_does_not_overwrite_its_weights() -> None:
    server = NotedServer(keeps_weights=True)
    with pytest.raises(GateError, match="rollout.server: the server kept its weights when asked to destroy them"):
        publisher_of(server).verify_sync(stream, "v1")
    assert server.label == "v1:first"


def test_a_proof_fails_at_once_if_updates_load_nothing() -> None:
    server = NotedServer(loads=())
    with pytest.raises(GateError, match="two updates .* or an update did not arrive"):
        publisher_of(server).verify_sync(stream, "v1")
    assert server.label == "v1:incomplete" and server.calls[-1] == "resume"


def proven(server: NotedServer, first: float = 4.0) -> WeightPublisher:
    """A publisher whose first update is proven."""
    publisher = publisher_of(server, ledger=PublicationLedger("rollout.server"))
    publisher.verify_sync(lambda: stream(first), "v1")
    return publisher


def test_an_update_that_loads_nothing_never_gets_its_label() -> None:
    server = NotedServer()
    publisher = proven(server)
    server.loads = ()
    with pytest.raises(GateError, match=r"an update in which 4 of 4 tensors are new and holds the weights of before"):
        publisher.publish(stream(5.0), "v2")
    assert server.label == "v2:incomplete" and server.calls[-1] == "resume"
    assert server.weights == held(4.0)


def test_an_update_that_is_loaded_only_in_part_never_gets_its_label() -> None:
    server = NotedServer()
    publisher = proven(server)
    server.loads = ("a", "c", "d")
    with pytest.raises(
        GateError, match=r"1 of the server's 4 tensors kept its old value, first b: the update arrived in"
    ):
        publisher.publish(stream(5.0), "v2")
    assert server.label == "v2:incomplete"


def test_a_tensor_that_changes_although_the_same_values_were_sent_is_an_error() -> None:
    server = NotedServer()
    publisher = proven(server)
    server.loads = ("a", "b", "d")
    server.weights["c"] = b"somebody else's"
    changed = weights(4.0) | {"a": weights(5.0)["a"]}
    with pytest.raises(GateError, match=r"1 of the server's 4 tensors changed although the same was sent, first c"):
        publisher.publish(iter(changed.items()), "v2")


def test_a_complete_update_passes_whichever_of_its_tensors_changed() -> None:
    server = NotedServer()
    publisher = proven(server)
    one_is_new = weights(4.0) | {"b": weights(9.0)["b"]}
    for number, tensors in enumerate((weights(4.0), one_is_new, one_is_new, weights(7.0), weights(4.0))):
        publisher.publish(iter(tensors.items()), f"v{number}")
        assert server.label == f"v{number}"
        publisher.check_unchanged()


def test_weights_sent_again_after_a_restart_must_give_the_same_checksums() -> None:
    ledger, server = PublicationLedger("rollout.server"), NotedServer()
    publisher_of(server, ledger=ledger).verify_sync(lambda: stream(4.0), "v1")
    restarted = NotedServer()
    publisher_of(restarted, ledger=ledger).publish(stream(4.0), "v1")
    assert restarted.label == "v1"
    restarted = NotedServer(loads=("a",))
    with pytest.raises(GateError, match="the same 4 tensors were sent as last time but the server holds other"):
        publisher_of(restarted, ledger=ledger).publish(stream(4.0), "v1")


def test_weights_that_change_after_their_publication_are_detected() -> None:
    server = NotedServer()
    publisher = proven(server)
    publisher.check_unchanged()
    server.weights["a"] = b"of another job, under the old label"
    with pytest.raises(GateError, match=r"the server's weights changed after their publication \(checksum"):
        publisher.check_unchanged()


def test_a_change_below_the_precision_of_the_server_is_not_expected_to_show() -> None:
    """Student float32, server bfloat16: a step below the server's precision does not change its weights."""
    server = NotedServer(dtype="bfloat16")

    def rounded(name: str, held: Tensor) -> Tensor:
        return held.bfloat16().float()

    publisher = publisher_of(server, ledger=PublicationLedger("rollout.server"))
    exact = {name: rounded(name, tensor) for name, tensor in weights(4.0).items()}
    publisher.verify_sync(lambda: iter(exact.items()), "v1")
    server.loads = ()  # the values to load equal those that it has
    publisher.publish(((name, tensor * (1 + 1e-6)) for name, tensor in exact.items()), "v2")
    assert server.label == "v2"
    with pytest.raises(GateError, match="loaded nothing"):
        publisher.publish(((name, tensor * 1.5) for name, tensor in exact.items()), "v3")


def test_on_a_quantizing_server_only_the_whole_update_must_change_the_checksum() -> None:
    server = NotedServer(quantization="fp8")
    publisher = proven(server)
    server.loads = ("a", "c", "d")
    publisher.publish(stream(5.0), "v2")
    server.loads = ()
    with pytest.raises(GateError, match="loaded nothing"):
        publisher.publish(stream(6.0), "v3")


def test_a_server_of_unknown_dtype_may_round_away_a_float32_update_but_not_a_bfloat16_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = NotedServer(dtype="auto")
    publisher = proven(server)
    server.loads = ("a", "c", "d")
    publisher.publish(stream(5.0), "v2")
    server.loads = ()
    publisher.publish(stream(6.0), "v3")
    assert server.label == "v3" and "4 of 4 tensors are new but the server's weights did not change" in caplog.text
    server = NotedServer(dtype="auto")
    plan = [(name, shape, torch.bfloat16) for name, shape in SHAPES.items()]
    publisher = publisher_of(server, plan, ledger=PublicationLedger("rollout.server"))

    def narrow(first: float) -> Stream:
        return ((name, tensor.bfloat16()) for name, tensor in stream(first))

    publisher.verify_sync(lambda: narrow(4.0), "v1")
    server.loads = ()
    with pytest.raises(GateError, match="loaded nothing"):
        publisher.publish(narrow(6.0), "v2")


def test_a_server_without_checksums_is_not_proven_which_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    server = NotedServer(has_checksum=False)
    with caplog.at_level(logging.WARNING):
        publisher = proven(server)
        publisher.publish(stream(5.0), "v2")
        publisher.check_unchanged()
    assert server.label == "v2" and "randomize" not in server.calls and server.labels[0] == "v1:first:incomplete"
    assert caplog.text.count("has no /weights_checker, so only the sampler gate shows that the weights arrive") == 1


def test_without_a_ledger_no_checksum_is_requested() -> None:
    server = NotedServer(loads=())
    publisher = publisher_of(server)
    publisher.publish(stream(5.0), "v1")
    publisher.check_unchanged()
    assert server.checked == 0 and server.label == "v1"
