"""The inputs of a soak: tiny models, prompts with answers, stored teacher responses, and a configuration.

This module does not run the soak (`soak` does). Invariants: every part of a default run is used (trust region,
guidance, gates, its own server, checkpoints). Only sizes are small, so that a step takes a fraction of a second.
Things that grow by default and have a key that bounds them (rollouts, the server's log) are bounded, so that a run of a
thousand steps shows the bound.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PROMPTS = 64
RESPONSE_TOKENS = 12
REAL_TOKENS = 280
"""Ids below have a text in the tiny tokenizer. Ids from 3 on are not special tokens."""


@dataclass(frozen=True)
class Stage:
    """Folders of one soak."""

    root: Path

    @property
    def run_dir(self) -> Path:
        return self.root / "run"

    @property
    def config(self) -> Path:
        return self.root / "soak.yaml"

    @property
    def temporary(self) -> Path:
        """The job's TMPDIR."""
        return self.root / "tmp"

    @property
    def log(self) -> Path:
        return self.root / "job.log"


def set_stage(root: Path, *, steps: int, ranks: int) -> Stage:
    """Write everything that the job reads. `ranks` are tensor-parallel."""
    from tests.tiny_models import write_tiny_model

    stage = Stage(root)
    stage.temporary.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(("student", "teacher")):
        write_tiny_model(root / name, seed=seed, num_hidden_layers=2)
    generator = np.random.default_rng(7)
    prompts, responses = [], []
    for number in range(PROMPTS):
        text = "how many apples " * (1 + number % 3)
        prompts.append({"id": f"p{number}", "prompt": text, "answer": str(number)})
        ids = generator.integers(3, REAL_TOKENS, RESPONSE_TOKENS)
        responses.append({"id": f"p{number}", "response_ids": ids.tolist()})
    _write_lines(root / "prompts.jsonl", prompts)
    _write_lines(root / "responses.jsonl", responses)
    stage.config.write_text(_config(stage, steps, ranks))
    return stage


def _write_lines(path: Path, records: Sequence[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _config(stage: Stage, steps: int, ranks: int) -> str:
    root = stage.root
    return f"""\
run: {{dir: {stage.run_dir}, steps: {steps}, checkpoint_every: 50, keep_rollouts: 200, export_at_end: false}}
platform: {{kind: cpu}}
parallel: {{tensor: {ranks}}}
student: {{path: {root / "student"}, dtype: float32}}
teacher: {{kind: megatron, path: {root / "teacher"}, dtype: float32}}
data: {{prompts: {root / "prompts.jsonl"}, teacher_responses: {root / "responses.jsonl"}, max_prompt_tokens: 64}}
rollout:
  prompts_per_step: 2
  samples_per_prompt: 2
  max_new_tokens: 8
  server: {{max_total_tokens: 4096, log_max_mib: 0.5}}
objective: {{kind: tropd, outlier: {{topk: 8}}, guidance: {{min_continuation: 2}}}}
batch: {{tokens_per_micro_batch: 256}}
optimizer: {{learning_rate: 1.0e-5}}
verifier: {{kind: exact_match}}
"""
