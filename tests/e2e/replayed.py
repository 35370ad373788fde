"""Rollouts on disk without a server, and jobs that replay them inside `run_on_ranks`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from tests.ranks import run_on_ranks
from tropd_mcore.config.loader import load
from tropd_mcore.mcore.parallel import RankEnvironment
from tropd_mcore.records.replay import load_rollouts, save_rollouts
from tropd_mcore.train.job import run_job
from tropd_mcore.train.trainer import Trainer
from tropd_mcore.types import OptimizerReport, Rollout

STEPS, PROMPTS, SAMPLES, LONGEST = 2, 4, 2, 11
JOB_LIMIT_S = 300.0
"""Longest time of one job. It only ends a hang: on an idle machine a job takes a few seconds."""
REAL_TOKENS = 280
"""Ids below this one have a text in the tiny tokenizer."""


@dataclass(frozen=True)
class Stage:
    """The folders of the models and the rollouts of the replays."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    def model(self, name: str) -> Path:
        return self.root / name

    def run(self, name: str) -> Path:
        return self.root / "runs" / name

    def rollouts(self) -> list[list[Rollout]]:
        """The rollouts of each step."""
        return [load_rollouts(self.run("sampled") / "rollouts" / f"step_{step:06d}.npz") for step in range(STEPS)]


def overrides(stage: Stage, name: str, wanted: list[str], places: Mapping[str, Path]) -> list[str]:
    """The overrides of a job: its run directory, and `wanted` with each name in `places` replaced by its path."""
    filled = []
    for text in wanted:
        for word, place in places.items():
            text = text.replace(word, str(place))
        filled.append(text)
    return [f"run.dir={stage.run(name)}", *filled]


def run_jobs(config: Path, jobs: list[list[str]]) -> None:
    """One job after the other with these overrides, on every rank."""
    for overrides in jobs:
        resolved, sources = load(config, overrides)
        run_job(resolved, sources, RankEnvironment(dist.get_rank(), dist.get_world_size(), local_rank=0))


def replay(config: Path, jobs: list[list[str]]) -> None:
    """One job after the other with these overrides, on the same two processes, each with its own time limit."""
    for overrides in jobs:
        run_on_ranks(run_jobs, 2, config, [overrides], timeout_s=JOB_LIMIT_S)


def run_until_killed(config: Path, overrides: list[str], updates: int) -> None:
    """A job that ends on every rank where its optimizer step number `updates` (from 0) would be."""
    made = 0
    update = Trainer.update

    def update_or_die(self: Trainer, *arguments: Any) -> OptimizerReport:
        nonlocal made
        if made == updates:
            raise KeyboardInterrupt
        made += 1
        return update(self, *arguments)

    with mock.patch.object(Trainer, "update", update_or_die), contextlib.suppress(KeyboardInterrupt):
        run_jobs(config, [overrides])


def log_probs(folder: Path, rollout: Rollout) -> torch.Tensor:
    """log p of every vocabulary entry before each response token by transformers, float64 [tokens, V]."""
    from transformers import AutoModelForCausalLM

    return _log_probs_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), rollout)


def _log_probs_of(model: Any, rollout: Rollout) -> torch.Tensor:
    ids = torch.from_numpy(rollout.token_ids.astype(np.int64))
    with torch.no_grad():
        logits = model(ids[None]).logits[0, :-1].double()
    return logits[-len(rollout.response_ids) :].log_softmax(-1)


def set_stage(root: Path, *, steps: int = STEPS, dtype: torch.dtype = torch.float32) -> Stage:
    """Write a student, a teacher, a reference (stored in `dtype`), prompts with answers, and rollouts of `steps` steps.

    The answer of a prompt is the text of its first sample, so that the verifier accepts one of two samples.
    """
    from transformers import AutoModelForCausalLM

    from tests.tiny_models import tiny_tokenizer, write_tiny_model

    stage = Stage(root)
    for seed, name in enumerate(("student", "teacher", "reference")):
        write_tiny_model(stage.model(name), seed=seed, dtype=dtype, num_hidden_layers=2)
    student = AutoModelForCausalLM.from_pretrained(stage.model("student"), dtype=torch.float32)
    tokenizer = tiny_tokenizer()
    generator = torch.Generator().manual_seed(3)
    lines = []
    for step in range(steps):
        rollouts = []
        for prompt in range(PROMPTS):
            name, text = f"s{step}p{prompt}", "how many apples " * (1 + prompt % 3)
            ids = np.array(tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)
            group = [_sample(student, name, ids, index, generator) for index in range(SAMPLES)]
            answer = tokenizer.decode(group[0].response_ids.tolist(), skip_special_tokens=True)
            rollouts += [dataclasses.replace(rollout, answer=answer) for rollout in group]
            lines.append(json.dumps({"id": name, "prompt": text, "answer": answer}))
        save_rollouts(stage.run("sampled") / "rollouts" / f"step_{step:06d}.npz", rollouts)
    (root / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    stage.config.write_text(_config(stage, steps))
    return stage


def _sample(student: Any, prompt_id: str, prompt_ids: np.ndarray, index: int, generator: torch.Generator) -> Rollout:
    """Tokens drawn uniformly, with the log-probs of the model `student`."""
    count = LONGEST - int(torch.randint(0, 5, (), generator=generator))
    response = torch.randint(3, REAL_TOKENS, (count,), generator=generator)
    rollout = Rollout(
        sample_id=f"{prompt_id}/{index}",
        prompt_id=prompt_id,
        prompt_ids=prompt_ids,
        prefix_ids=np.zeros(0, dtype=np.int32),
        response_ids=response.numpy().astype(np.int32),
        rollout_logp=np.zeros(count, dtype=np.float32),
        trust_u=torch.rand(count, generator=generator).numpy(),
        policy_version="replayed",
        finish_reason="length",
        carries_prefix_loss=False,
        answer=None,
    )
    logp = _log_probs_of(student, rollout).gather(1, response[:, None])[:, 0]
    return dataclasses.replace(rollout, rollout_logp=logp.numpy().astype(np.float32))


def _config(stage: Stage, steps: int) -> str:
    return f"""
run: {{dir: none, steps: {steps}, replay: {stage.run("sampled")}, checkpoint_every: 1, export_at_end: false}}
platform: {{kind: cpu}}
parallel: {{tensor: 2}}
student: {{path: {stage.model("student")}, dtype: float32}}
teacher: {{kind: megatron, path: {stage.model("teacher")}, dtype: float32}}
data: {{prompts: {stage.root / "prompts.jsonl"}, max_prompt_tokens: 64}}
rollout: {{prompts_per_step: {PROMPTS}, samples_per_prompt: {SAMPLES}, max_new_tokens: {LONGEST}}}
objective: {{kind: opd, topk: 9}}
loss: {{chunk_tokens: 13}}
batch: {{tokens_per_micro_batch: 80}}
optimizer: {{learning_rate: 1.0e-3}}
monitor: {{token_samples: 100}}
gates: {{longest_sequence: false}}
verifier: {{kind: exact_match, pattern: "(?s)(.+)", unfinished: judge}}
"""
