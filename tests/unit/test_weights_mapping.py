"""Splitting and joining weights: byte-equal round trips, and Megatron's order of rows against an independent loop."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from tropd_mcore.errors import ModelError
from tropd_mcore.weights.architecture import Architecture, architecture_from_config
from tropd_mcore.weights.families import check_hf_names, check_mcore_names, hf_weight_plan, rules
from tropd_mcore.weights.mapping import Rule, pieces, to_hf, to_mcore_shard

FAMILIES = ("qwen3", "qwen2", "llama")


def architecture(family: str, *, tied: bool = False, **changes: Any) -> Architecture:
    config: dict[str, Any] = {
        "model_type": family,
        "num_hidden_layers": 2,
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 3,
        "vocab_size": 37,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
    }
    return architecture_from_config(config | changes, source="test")


def random_weights(arch: Architecture, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in hf_weight_plan(arch)}


def shards(rule: Rule, weights: dict[str, Tensor], arch: Architecture, tp: int, padded: int) -> list[Tensor]:
    return [
        to_mcore_shard(rule, weights, arch, tp_rank=rank, tp_size=tp, padded_vocab=padded).clone() for rank in range(tp)
    ]


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def cases() -> Iterator[Any]:
    for family, tied, tp, heads in product(FAMILIES, (False, True), (1, 2, 4), ((8, 4), (4, 4), (8, 8), (4, 1))):
        if heads[1] % tp == 0 or heads == (4, 1):
            yield pytest.param(family, tied, tp, heads, id=f"{family}-{'tied' if tied else 'untied'}-tp{tp}-{heads}")


@pytest.mark.parametrize(("family", "tied", "tp", "heads"), list(cases()))
def test_converting_to_megatron_and_back_is_byte_equal(
    family: str, tied: bool, tp: int, heads: tuple[int, int]
) -> None:
    arch = architecture(family, tied=tied, num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=4)
    weights = random_weights(arch)
    back: dict[str, Tensor] = {}
    for rule in rules(arch):
        full = to_hf(rule, shards(rule, weights, arch, tp, padded=48), arch)
        if rule.exported:
            back |= full
    assert list(back) == [name for name, _ in hf_weight_plan(arch)] == list(weights)
    for name, tensor in weights.items():
        assert bytes_of(back[name]) == bytes_of(tensor), name


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_qkv_rows_are_queries_key_value_of_each_group_in_turn(tp: int, kind: str) -> None:
    arch = architecture("qwen2", head_dim=3)
    weights = random_weights(arch, torch.float32)
    query, key, value = (weights[f"model.layers.1.self_attn.{part}_proj.{kind}"] for part in "qkv")
    expected = []
    for group in range(4):
        for head in (2 * group, 2 * group + 1):
            expected += [query[head * 3 + row] for row in range(3)]
        for source in (key, value):
            expected += [source[group * 3 + row] for row in range(3)]
    rule = next(r for r in rules(arch) if f"decoder.layers.1.self_attention.linear_qkv.{kind}" in r.mcore_names)
    found = torch.cat(shards(rule, weights, arch, tp, padded=48))
    assert torch.equal(found, torch.stack(expected))


def test_more_tensor_ranks_than_kv_heads_get_consecutive_rows_of_one_group() -> None:
    arch = architecture("llama", num_attention_heads=4, num_key_value_heads=2, head_dim=2)
    weights = random_weights(arch, torch.float32)
    rule = next(r for r in rules(arch) if r.mcore_names[0].endswith("0.self_attention.linear_qkv.weight"))
    whole = shards(rule, weights, arch, 1, padded=48)[0]
    assert torch.equal(torch.cat(shards(rule, weights, arch, 4, padded=48)), whole)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_each_rank_has_its_gate_rows_then_its_up_rows(tp: int) -> None:
    arch = architecture("llama")
    weights = random_weights(arch, torch.float32)
    gate, up = (weights[f"model.layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up"))
    rule = next(r for r in rules(arch) if r.mcore_names == ("decoder.layers.0.mlp.linear_fc1.weight",))
    for rank, shard in enumerate(shards(rule, weights, arch, tp, padded=48)):
        width = 20 // tp
        rows = range(rank * width, (rank + 1) * width)
        assert torch.equal(shard, torch.stack([gate[row] for row in rows] + [up[row] for row in rows]))


def test_output_projections_are_split_by_columns() -> None:
    arch = architecture("llama")
    weights = random_weights(arch, torch.float32)
    rule = next(r for r in rules(arch) if r.mcore_names == ("decoder.layers.0.mlp.linear_fc2.weight",))
    first, second = shards(rule, weights, arch, 2, padded=48)
    down = weights["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(first, down[:, :10])
    assert torch.equal(second, down[:, 10:])


def test_vocabulary_padding_is_zero_even_if_a_shard_has_nothing_else() -> None:
    arch = architecture("llama", vocab_size=37)
    weights = random_weights(arch, torch.float32)
    rule = rules(arch)[0]
    found = shards(rule, weights, arch, 4, padded=64)
    assert [tuple(shard.shape) for shard in found] == [(16, 12)] * 4
    assert torch.equal(torch.cat(found)[:37], weights["model.embed_tokens.weight"])
    assert not torch.cat(found)[37:].any()
    assert not found[3].any()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_element_of_every_tensor_is_on_exactly_one_rank(family: str, tp: int) -> None:
    arch = architecture(family)
    for rule in rules(arch):
        if rule.split.name == "REPLICATED":
            continue
        dim = 1 if rule.split.name == "ROW" else 0
        covered = [[0] * shape[dim] for shape in rule.hf_shapes]
        for rank in range(tp):
            for piece in pieces(rule, arch, tp_rank=rank, tp_size=tp, padded_vocab=48):
                for index in range(piece.start, piece.stop):
                    covered[piece.source][index] += 1
        assert all(count == 1 for counts in covered for count in counts), rule.mcore_names


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_plan_has_the_names_and_shapes_that_transformers_writes(family: str, tied: bool) -> None:
    import transformers

    config_class, model_class = {
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    }[family]
    sizes = {"num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 20, "num_attention_heads": 8,
             "num_key_value_heads": 4, "vocab_size": 37, "tie_word_embeddings": tied}  # fmt: skip
    if family != "qwen2":
        sizes["head_dim"] = 6
    config = config_class(**sizes)
    arch = architecture_from_config(config.to_dict() | {"dtype": "float32"}, source="test")
    expected = {name: tuple(parameter.shape) for name, parameter in model_class(config).named_parameters()}
    assert dict(hf_weight_plan(arch)) == expected


def test_missing_and_unknown_hf_tensors_are_named_and_derived_ones_ignored() -> None:
    arch = architecture("llama")
    names = [name for name, _ in hf_weight_plan(arch)]
    check_hf_names([*names, "model.layers.0.self_attn.rotary_emb.inv_freq"], arch, source="x")
    with pytest.raises(ModelError, match="1 missing \\(lm_head.weight\\), 1 unknown \\(extra.weight\\)"):
        check_hf_names([*names[:-1], "extra.weight"], arch, source="x")
    with pytest.raises(ModelError, match="21 missing .* and 15 more"):
        check_hf_names([], arch, source="x")


def test_a_tied_model_may_store_its_output_layer() -> None:
    arch = architecture("llama", tied=True)
    names = [name for name, _ in hf_weight_plan(arch)]
    assert "lm_head.weight" not in names
    check_hf_names(names, arch, source="x")
    check_hf_names([*names, "lm_head.weight"], arch, source="x")


def test_parameter_names_of_both_layer_specs_are_accepted() -> None:
    arch = architecture("qwen3")
    for spec in (0, -1):
        names = [rule.mcore_names[spec] for rule in rules(arch)]
        check_mcore_names(names, arch, source="x")
        with pytest.raises(ModelError, match="1 without a parameter \\(decoder.final_layernorm.weight\\)"):
            check_mcore_names([name for name in names if "final" not in name], arch, source="x")
    with pytest.raises(ModelError, match="1 without a rule \\(decoder.layers.0.mlp.router.weight\\)"):
        check_mcore_names([*names, "decoder.layers.0.mlp.router.weight"], arch, source="x")


def test_transformer_engine_names_a_norm_by_the_linear_layer_after_it() -> None:
    arch = architecture("llama")
    names = {name for rule in rules(arch) for name in rule.mcore_names}
    assert "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight" in names
    assert "decoder.layers.1.mlp.linear_fc1.layer_norm_weight" in names


def test_sizes_that_do_not_divide_are_refused_by_name() -> None:
    arch = architecture("llama")
    rule = next(r for r in rules(arch) if r.mcore_names == ("decoder.layers.0.mlp.linear_fc1.weight",))
    with pytest.raises(ModelError, match="gate_proj.weight: 20 does not divide into 3"):
        pieces(rule, arch, tp_rank=0, tp_size=3, padded_vocab=48)


def test_a_shard_of_another_shape_is_refused() -> None:
    arch = architecture("llama")
    rule = next(r for r in rules(arch) if r.mcore_names == ("decoder.layers.0.mlp.linear_fc2.weight",))
    with pytest.raises(ModelError, match="expected shape \\(12, 10\\), found \\(12, 9\\)"):
        to_hf(rule, [torch.zeros(12, 10), torch.zeros(12, 9)], arch)
