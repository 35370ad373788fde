"""Checks across sections: each wrong combination gives one line that names the keys to change."""

import pytest

from tropd_mcore.config.checks import backend_problems, data_problems, layout_problems, problems_across_sections
from tropd_mcore.config.schema import Config, ParallelConfig

BASE = {
    "run": {"dir": "run", "steps": 100},
    "student": {"path": "student"},
    "teacher": {"kind": "sglang", "path": "teacher"},
    "data": {"prompts": "prompts.jsonl", "teacher_responses": "responses.jsonl"},
}


def make_config(**sections) -> Config:
    merged = {name: dict(values) for name, values in BASE.items()}
    for name, values in sections.items():
        merged[name] = merged.get(name, {}) | values
    return Config.model_validate(merged)


def test_the_default_configuration_has_no_problem():
    assert problems_across_sections(make_config()) == []


@pytest.mark.parametrize(
    ("layout", "world_size", "expected"),
    [
        ((2, 2, 1, None), 12, []),
        ((2, 2, 1, 3), 12, []),
        (
            (2, 2, 1, 3),
            16,
            [
                "parallel: tp*pp*cp*dp = 2*2*1*3 = 12, but this launch has 16 ranks; set parallel.data=4 or "
                "launch 12 ranks"
            ],
        ),
        ((2, 2, 1, 3), 18, ["parallel: tp*pp*cp*dp = 2*2*1*3 = 12, but this launch has 18 ranks; launch 12 ranks"]),
        (
            (2, 2, 2, None),
            12,
            [
                "parallel: tp*pp*cp = 2*2*2 = 8 does not divide the 12 ranks of this launch; launch a multiple of 8 "
                "ranks or change parallel.tensor, parallel.pipeline or parallel.context"
            ],
        ),
    ],
)
def test_the_world_size_error_spells_out_the_arithmetic(layout, world_size, expected):
    tensor, pipeline, context, data = layout
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, context=context, data=data)
    assert layout_problems(parallel, world_size) == expected


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"parallel": {"virtual_pipeline": 2}}, "parallel.virtual_pipeline = 2 needs parallel.pipeline >= 2"),
        ({"parallel": {"virtual_pipeline": 1, "pipeline": 2}}, "parallel.virtual_pipeline = 1 is one chunk"),
        ({"parallel": {"sequence_parallel": True}}, "parallel.sequence_parallel needs parallel.tensor >= 2"),
        ({"data": {"teacher_responses": None}}, "objective.guidance.enabled needs data.teacher_responses"),
        (
            {
                "rollout": {"max_new_tokens": 64},
                "objective": {"kind": "tropd", "guidance": {"continuation_budget": "shared"}},
            },
            "objective.guidance.min_continuation = 64 leaves no room",
        ),
        (
            {
                "objective": {
                    "kind": "opd",
                    "policy_gradient": {"mismatch": "icepop", "icepop_low": 5, "icepop_high": 2},
                }
            },
            "objective.policy_gradient: icepop_low = 5.0 must be below icepop_high = 2.0",
        ),
        (
            {"objective": {"kind": "opd", "policy_gradient": {"ratio": "ppo_clip", "mini_batches": 129}}},
            "objective.policy_gradient.mini_batches = 129 is more than the rollout.prompts_per_step = 128 prompts",
        ),
        ({"rollout": {"top_k": 0}}, "rollout.top_k = 0: expected -1"),
        (
            {"rollout": {"truncate": {"start": 8096}}},
            "rollout.truncate.start = 8096 cuts nothing off rollout.max_new_tokens = 8096",
        ),
        (
            {
                "rollout": {"truncate": {"start": 64}},
                "objective": {"kind": "tropd", "guidance": {"continuation_budget": "shared"}},
            },
            "objective.guidance.min_continuation = 64 leaves no room for a prefix within the shared "
            "rollout.truncate.start = 64",
        ),
        (
            {"loss": {"form": "logits", "overlap_chunks": True}},
            "loss.overlap_chunks has no effect with loss.form=logits",
        ),
        (
            {"loss": {"weight_gradient": "recompute", "overlap_chunks": True}, "parallel": {"tensor": 2}},
            "loss.overlap_chunks has no effect with loss.weight_gradient=recompute",
        ),
        ({"loss": {"overlap_chunks": True}}, "loss.overlap_chunks hides an all-reduce between tensor ranks, found"),
        (
            {"loss": {"form": "logits", "weight_gradient": "deferred"}},
            "loss.weight_gradient=deferred has no effect with loss.form=logits",
        ),
        (
            {
                "loss": {"weight_gradient": "recompute"},
                "objective": {"kind": "gkd", "full_vocabulary": True},
                "teacher": {"kind": "megatron"},
            },
            "loss.weight_gradient=recompute cannot be combined with objective.full_vocabulary",
        ),
        ({"loss": {"backend": "triton"}, "platform": {"kind": "cpu"}}, "loss.backend=triton needs CUDA"),
        (
            {"student": {"path": "student", "recompute": "full", "recompute_modules": ["core_attn"]}},
            "student.recompute_modules has no effect with student.recompute=full; remove it, or set "
            "student.recompute=selective",
        ),
        (
            {"student": {"path": "student", "recompute": "selective", "recompute_layers": 3}},
            "student.recompute_layers has no effect with student.recompute=selective",
        ),
        (
            {"student": {"path": "student", "recompute": "selective", "recompute_modules": []}},
            "student.recompute_modules is empty, so nothing is recomputed; set student.recompute=none",
        ),
        (
            {"rollout": {"max_new_tokens": 100, "server": {"max_total_tokens": 2000}}},
            "rollout.server.max_total_tokens = 2000 holds less than one request",
        ),
        ({"batch": {"tokens_per_micro_batch": 2048}}, "batch.tokens_per_micro_batch = 2048 is below"),
        ({"rollout": {"server": {"url": "localhost:3"}}}, "rollout.server.url: expected http://host:port"),
        (
            {"teacher": {"server": {"url": "http://h:1", "port": 5, "extra_args": ["--x"]}}},
            "teacher.server.url names a running server, so teacher.server.port and teacher.server.extra_args would",
        ),
        (
            {"rollout": {"server": {"extra_args": ["--tp-size=2"]}}},
            "rollout.server.extra_args: --tp-size is set by server.tensor_parallel",
        ),
        (
            {"rollout": {"server": {"port": 5}}, "teacher": {"server": {"port": 5}}},
            "rollout.server.port and teacher.server.port are both 5",
        ),
        (
            {"rollout": {"server": {"url": "http://h:1"}}, "teacher": {"server": {"url": "http://h:1"}}},
            "rollout.server.url and teacher.server.url are both http://h:1",
        ),
        ({"optimizer": {"warmup_steps": 101}}, "optimizer.warmup_steps = 101 is more than run.steps = 100"),
        (
            {
                "optimizer": {"warmup_steps": 601},
                "objective": {"kind": "opd", "policy_gradient": {"ratio": "ppo_clip", "mini_batches": 3, "epochs": 2}},
            },
            "optimizer.warmup_steps = 601 is more than run.steps = 100 of 6 optimizer steps each",
        ),
        ({"optimizer": {"min_learning_rate": 1.0}}, "optimizer.min_learning_rate = 1.0 is above"),
        ({"optimizer": {"beta2": 1.0}}, "optimizer.beta2 = 1 never forgets"),
        ({"optimizer": {"overlap_param_gather": True}}, "optimizer.overlap_param_gather needs"),
        ({"verifier": {"kind": "exact_match", "pattern": "(("}}, "verifier.pattern: not a regular expression"),
        ({"verifier": {"kind": "exact_match", "pattern": "x"}}, "verifier.pattern: expected a group"),
        ({"run": {"replay": "run"}}, "run.replay and run.dir are both run"),
        (
            {"teacher": {"kind": "megatron", "pipeline_layers": [3, 4]}},
            "teacher.pipeline_layers = [3, 4] has 2 stages, but parallel.pipeline = 1; give one number per stage",
        ),
        (
            {"teacher": {"kind": "sglang", "pipeline_layers": [7]}},
            "teacher.pipeline_layers has no effect: teacher.kind=sglang runs the teacher on a server; remove it",
        ),
        (
            {"teacher": {"kind": "sglang", "offload": True}},
            "teacher.offload has no effect: teacher.kind=sglang runs the teacher on a server; remove it",
        ),
        (
            {"teacher": {"kind": "megatron", "offload": True}, "objective": {"kind": "gkd", "full_vocabulary": True}},
            "teacher.offload cannot be combined with objective.full_vocabulary",
        ),
        (
            {"teacher": {"kind": "megatron", "offload": True}, "objective": {"kind": "sft"}},
            "teacher.offload has no effect: objective.kind=sft asks no teacher; remove it",
        ),
        ({"student": {"path": "~/model"}}, "student.path: `~` is not expanded"),
        ({"objective": {"kind": "exopd", "reference": "~/model"}}, "objective.reference: `~` is not expanded"),
    ],
)
def test_each_wrong_combination_gives_one_line(sections, expected):
    (problem,) = problems_across_sections(make_config(**sections))
    assert problem.startswith(expected) and "\n" not in problem


@pytest.mark.parametrize(
    ("backend", "platform", "count"),
    [("triton", "cpu", 1), ("triton", "cuda", 0), ("triton", "auto", 0), ("eager", "cpu", 0), ("auto", "cpu", 0)],
)
def test_triton_is_refused_if_the_platform_is_known_to_be_a_cpu(backend, platform, count):
    assert len(backend_problems(backend, platform)) == count


def test_the_logits_form_allows_a_softcap():
    assert problems_across_sections(make_config(loss={"form": "logits", "logit_softcap": 30.0})) == []


@pytest.mark.parametrize("weight_gradient", ["deferred", "folded"])
def test_overlapped_chunks_are_allowed_with_several_tensor_ranks(weight_gradient):
    loss = {"overlap_chunks": True, "weight_gradient": weight_gradient}
    assert problems_across_sections(make_config(loss=loss, parallel={"tensor": 2})) == []


def test_the_warm_up_counts_optimizer_steps():
    policy = {"ratio": "ppo_clip", "mini_batches": 3, "epochs": 2}
    config = make_config(optimizer={"warmup_steps": 600}, objective={"kind": "opd", "policy_gradient": policy})
    assert problems_across_sections(config) == []


def test_all_problems_of_all_sections_are_returned_together():
    config = make_config(parallel={"sequence_parallel": True}, optimizer={"warmup_steps": 101}, rollout={"top_k": 0})
    assert len(problems_across_sections(config)) == 3


def test_the_longest_sample_includes_prompt_prefix_and_new_tokens():
    config = make_config(batch={"tokens_per_micro_batch": 18000})
    (problem,) = data_problems(config, longest_prompt=1800, longest_response=8192)
    assert problem.startswith(
        "batch.tokens_per_micro_batch = 18000 but the longest sample can have 1800 prompt + 8128 prefix + 8096 new = "
        "18024 tokens; set batch.tokens_per_micro_batch=18024"
    )
    shared = make_config(objective={"kind": "tropd", "guidance": {"continuation_budget": "shared"}})
    assert data_problems(shared, longest_prompt=1800, longest_response=8192) == []
    assert data_problems(make_config(objective={"kind": "opd"}), longest_prompt=2048, longest_response=0) == []


@pytest.mark.parametrize(("longest", "problems"), [(64, 1), (65, 0), (1, 1), (0, 0)])
def test_guidance_that_gives_no_sample_a_prefix_is_refused(longest: int, problems: int) -> None:
    """0 means that the responses are not there yet."""
    config = make_config(objective={"kind": "tropd"}, batch={"tokens_per_micro_batch": 20_000})
    found = data_problems(config, longest_prompt=5, longest_response=longest)
    assert len(found) == problems
    assert all("min_continuation = 64" in line and f"has {longest}, so no sample" in line for line in found)
