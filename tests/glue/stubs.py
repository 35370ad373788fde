"""Shared stubs of the glue tests: a configuration, rollouts, layouts with real groups, a student without weights.

No model is run. The student's log-prob of a token is the sampler's plus `gap`. The test sets the teacher's. The rank
processes import this module, so it imports neither pytest nor transformers.

Shapes: T rows of a micro-batch, K teacher top-k, L student top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tropd_mcore.config.schema import Config
from tropd_mcore.data.packing import PackedStep
from tropd_mcore.mcore.packs import pack_on
from tropd_mcore.mcore.parallel import Groups, Layout
from tropd_mcore.types import MicroBatch, Prompt, Rollout, TeacherScores

VOCABULARY = 50
TOPK = 3
Axis = Literal["data", "tensor", "pipeline"]
RowValue = Callable[[int, int], float]
"""(index of the rollout, index of the token in it) -> a number."""


def make_config(run_dir: Path | str = "nowhere", **sections: dict[str, Any]) -> Config:
    """A configuration with small sizes. `sections` are merged into it key by key, the objective as a whole."""
    base: dict[str, dict[str, Any]] = {
        "run": {"dir": run_dir, "steps": 4, "checkpoint_every": 100},
        "student": {"path": "student", "dtype": "float32"},
        "teacher": {"path": "teacher", "dtype": "float32"},
        "data": {"prompts": "prompts.jsonl", "shuffle": False},
        "rollout": {"prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 6},
        "objective": {"kind": "opd", "topk": TOPK},
        "batch": {"tokens_per_micro_batch": 24},
        "gates": {"sampler_logprob": False, "tokenizer": False},
        "monitor": {"token_samples": 0, "topk_overlap": False},
    }
    for name, section in sections.items():
        base[name] = section if name == "objective" else base.get(name, {}) | section
    return Config.model_validate(base)


def make_rollouts(step: int = 0, *, prompts: int = 2, samples: int = 2, version: str = "v") -> list[Rollout]:
    """Rollouts of unequal lengths without prefix, grouped by prompt. All values are determined by their position."""
    return [
        make_rollout(f"{step:06d}/p{prompt}/{index}", f"p{prompt}", 2 + (3 * prompt + 2 * index) % 5, version=version)
        for prompt in range(prompts)
        for index in range(samples)
    ]


def make_rollout(sample_id: str, prompt_id: str, count: int, *, version: str = "v") -> Rollout:
    """`count` response tokens after a prompt of three."""
    random = np.random.default_rng(list(sample_id.encode()))
    return Rollout(
        sample_id=sample_id,
        prompt_id=prompt_id,
        prompt_ids=random.integers(3, VOCABULARY, 3).astype(np.int32),
        prefix_ids=np.zeros(0, np.int32),
        response_ids=random.integers(3, VOCABULARY, count).astype(np.int32),
        rollout_logp=-(0.5 + random.random(count, dtype=np.float32)),
        trust_u=random.random(count, dtype=np.float32),
        policy_version=version,
        finish_reason="stop",
        carries_prefix_loss=False,
        answer=None,
    )


def make_prompts(count: int) -> list[Prompt]:
    """Prompts of three tokens that have a stored teacher response of six."""
    return [
        Prompt(f"p{i}", np.arange(3 + i, 6 + i, dtype=np.int32), None, np.arange(20 + i, 26 + i, dtype=np.int32))
        for i in range(count)
    ]


def rollout_key(rollouts: Sequence[Rollout]) -> list[tuple[Any, ...]]:
    """Rollouts as values that can be compared."""
    return [
        (r.sample_id, r.policy_version, *(a.tobytes() for a in (r.token_ids, r.rollout_logp, r.trust_u)))
        for r in rollouts
    ]


@contextmanager
def one_rank() -> Iterator[Layout]:
    """A job of this process alone, with real groups of one rank."""
    assert not dist.is_initialized()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=60))
    try:
        yield make_layout()
    finally:
        dist.destroy_process_group()


def make_layout(axis: Axis = "data") -> Layout:
    """All ranks of the running job along one axis. Collective."""
    rank, size = dist.get_rank(), dist.get_world_size()
    everyone, control = dist.new_group(backend="gloo"), dist.new_group(backend="gloo")
    alone = [dist.new_group([each], backend="gloo") for each in range(size)][rank]

    def along(name: str) -> Any:
        return everyone if axis == name else alone

    def place(name: str) -> tuple[int, int]:
        return (rank, size) if axis == name else (0, 1)

    (tp_rank, tp_size), (pp_rank, pp_size), (dp_rank, dp_size) = place("tensor"), place("pipeline"), place("data")
    return Layout(
        rank=rank,
        world_size=size,
        tp_rank=tp_rank,
        tp_size=tp_size,
        pp_rank=pp_rank,
        pp_size=pp_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        cp_rank=0,
        cp_size=1,
        vpp_size=1,
        sequence_parallel=False,
        groups=Groups(
            tp=along("tensor"),
            pp=along("pipeline"),
            dp=along("data"),
            cp=alone,
            dp_cp=along("data"),
            world=everyone,
            control=control,
        ),
        owns_world=False,
    )


def make_student(layout: Layout) -> Any:
    """The part of a model that the glue uses: its stage and its device."""
    return SimpleNamespace(
        layout=layout, platform=SimpleNamespace(name="cpu", device="cpu"), trainable=True, model_chunks=[], modules=[]
    )


def pack_for(rollouts: list[Rollout], layout: Layout, *, tokens_per_micro_batch: int = 24) -> PackedStep:
    """This rank's packs, several of them."""
    return pack_on(layout, rollouts, tokens_per_micro_batch=tokens_per_micro_batch, device="cpu")


def row_values(micro_batch: MicroBatch, value: RowValue) -> Tensor:
    """float32 [T]: `value` of each row."""
    rows = zip(micro_batch.sample_index_T.tolist(), micro_batch.token_index_T.tolist(), strict=True)
    return torch.tensor([value(sample, token) for sample, token in rows], dtype=torch.float32)


def by_place(micro_batches: Sequence[MicroBatch], columns: Sequence[Tensor]) -> dict[tuple[int, int], float]:
    """{(rollout, token): value} of columns that have one entry per row of each micro-batch."""
    found: dict[tuple[int, int], float] = {}
    for micro_batch, column in zip(micro_batches, columns, strict=True):
        places = zip(micro_batch.sample_index_T.tolist(), micro_batch.token_index_T.tolist(), strict=True)
        for place, number in zip(places, column.tolist(), strict=True):
            assert place not in found
            found[place] = number
    return found


def nowhere(sample: int, token: int) -> bool:
    """No row."""
    return False


def make_scores(
    micro_batch: MicroBatch, teacher_logp_T: Tensor, *, unscored: Callable[[int, int], bool] = nowhere
) -> TeacherScores:
    """A teacher with these log-probs. Its top-k is the same for every row."""
    rows = len(micro_batch.rows_T)
    return TeacherScores(
        logp_T=teacher_logp_T,
        topk_ids_TK=torch.arange(TOPK).expand(rows, TOPK).clone(),
        topk_logp_TK=torch.full((rows, TOPK), 0.25).log(),
        tail_mass_T=torch.full((rows,), 0.25),
        entropy_T=torch.ones(rows),
        scored_T=~row_values(micro_batch, lambda *place: float(unscored(*place))).bool(),
    )


class NamedPolicy(str):
    """In the place of a policy server; tests compare it by its name."""

    def close(self) -> None:
        pass
