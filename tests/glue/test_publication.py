"""Digests of the sent weights, and the names under which a server holds them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tropd_mcore.errors import GateError
from tropd_mcore.rollout.publication import CHUNK_WORDS, PublicationLedger, served_name, tensor_digest
from tropd_mcore.serving.wire import Place, WeightChecksums, read_checksums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 3, 5, 1001, 2 * CHUNK_WORDS + 7])
def test_the_digest_changes_with_every_bit_and_with_the_order(dtype: torch.dtype, count: int) -> None:
    tensor = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)
    before = tensor_digest(tensor)
    assert tensor_digest(tensor.clone()) == before
    seen = {before}
    for place in {0, count // 2, count - 1}:
        changed = tensor.clone()
        bits = changed.view(torch.uint8)
        bits[place * tensor.itemsize] ^= 1
        seen.add(tensor_digest(changed))
    assert len(seen) == 1 + len({0, count // 2, count - 1})
    if count > 3:
        assert tensor_digest(tensor.flip(0)) not in seen


def test_changes_that_leave_the_sum_of_the_bits_unchanged_are_detected() -> None:
    tensor = torch.zeros(64, dtype=torch.int16).view(torch.bfloat16)
    changed = torch.zeros(64, dtype=torch.int16)
    changed[3], changed[20] = 1, -1
    assert tensor_digest(changed.view(torch.bfloat16)) != tensor_digest(tensor)
    assert tensor_digest(changed.flip(0).view(torch.bfloat16)) != tensor_digest(changed.view(torch.bfloat16))


def test_the_digest_depends_on_shape_and_dtype_but_not_on_the_memory_layout() -> None:
    tensor = torch.arange(12.0).view(3, 4)
    assert tensor_digest(tensor) != tensor_digest(tensor.view(4, 3))
    assert tensor_digest(tensor) == tensor_digest(tensor.t().contiguous().t())
    assert tensor_digest(torch.arange(12.0)[3:]) == tensor_digest(torch.arange(3.0, 12.0))
    assert tensor_digest(torch.zeros(2)) != tensor_digest(torch.zeros(2, dtype=torch.int32))
    assert tensor_digest(torch.zeros(0)) == tensor_digest(torch.zeros(0))
    assert tensor_digest(torch.tensor(2.0)) != tensor_digest(torch.tensor(3.0))


@pytest.mark.parametrize(
    ("name", "served"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "model.layers.3.self_attn.qkv_proj.weight"),
        ("model.layers.3.self_attn.v_proj.bias", "model.layers.3.self_attn.qkv_proj.bias"),
        ("model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.gate_up_proj.weight"),
        ("model.layers.3.mlp.down_proj.weight", "model.layers.3.mlp.down_proj.weight"),
        ("model.layers.3.self_attn.q_norm.weight", "model.layers.3.self_attn.q_norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_projections_that_the_server_fuses_have_the_servers_name(name: str, served: str) -> None:
    assert served_name(name) == served


def test_the_digest_does_not_change_what_it_reads() -> None:
    tensor: Tensor = torch.randn(33)
    copy = tensor.clone()
    tensor_digest(tensor)
    assert torch.equal(tensor, copy)


Q, NORM, EMBEDDING = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight", "model.embed_tokens.weight"
SENT = {name: name.encode() for name in (Q, NORM, EMBEDDING)}
QKV = served_name(Q)


def answer(*ranks: tuple[int, int, dict[str, str]]) -> WeightChecksums:
    """The answer of a server whose ranks are at (pipeline, tensor) with these checksums, and a draft model's."""
    entries = []
    for pipeline, tensor, checksums in ranks:
        places = [{"role": role, "pp_rank": pipeline, "tp_rank": tensor} for role in ("target", "draft")]
        entries.append({"checksums": checksums, "per_gpu_checksum": "x", "parallelism_info": places})
    found = read_checksums({"per_engine_checksum": "total", "ranks": entries})
    assert found is not None
    return found


def check_ranks(held: WeightChecksums) -> None:
    PublicationLedger("rollout.server").check(SENT, held, by_tensor=False)


def test_a_server_replica_that_keeps_an_old_tensor_is_detected() -> None:
    new = {QKV: "q0", NORM: "n", EMBEDDING: "e0"}
    check_ranks(answer((0, 0, new), (0, 0, new)))
    for name in new:
        with pytest.raises(GateError, match=f"1 of the server's 3 tensors differ between ranks .*first {name}: "):
            check_ranks(answer((0, 0, new), (0, 0, new | {name: "old"})))


def test_a_tensor_parallel_rank_that_keeps_an_old_norm_is_detected_and_shards_may_differ() -> None:
    one, two = {QKV: "q0", NORM: "n", EMBEDDING: "e0"}, {QKV: "q1", NORM: "n", EMBEDDING: "e1"}
    check_ranks(answer((0, 0, one), (0, 1, two), (0, 0, one), (0, 1, two)))
    with pytest.raises(GateError, match=rf"first {NORM}: the update did not reach every rank"):
        check_ranks(answer((0, 0, one), (0, 1, two | {NORM: "old"})))


def test_tensors_that_are_not_replicated_may_differ_between_ranks() -> None:
    """Another stage, a tensor that no update sets (a draft model's), a server that does not report its ranks."""
    check_ranks(answer((0, 0, {NORM: "a"}), (1, 0, {NORM: "b"})))
    check_ranks(answer((0, 0, {f"draft.{NORM}": "a"}), (0, 0, {f"draft.{NORM}": "b"})))
    bare = read_checksums({"per_engine_checksum": "t", "ranks": [{"checksums": {NORM: c}} for c in "ab"]})
    assert bare is not None and bare.places == {NORM: (None, None)}
    check_ranks(bare)


def test_the_place_of_a_rank_is_its_pipeline_and_tensor_rank_in_the_served_model() -> None:
    assert answer((1, 3, {NORM: "a"})).places == {NORM: (Place(pipeline=1, tensor=3),)}
