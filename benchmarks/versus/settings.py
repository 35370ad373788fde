"""What both trainers are told, and the files that tell them. Imports only the standard library, because the driver of
the other trainer reads it in an environment that has nothing of ours.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

DIVERGENCES = {"reverse_kl": ("rkl", 1.0), "forward_kl": ("fkl", 0.0)}
"""Loss -> (`objective.divergence` of ours, `beta` of TRL). Both sum over the whole vocabulary, at temperature 1."""
SYSTEMS = ("ours", "trl")


@dataclass(frozen=True)
class Settings:
    """One training run, the same for both trainers."""

    student: str
    """Hugging Face folder; both folders have the same number of vocabulary rows"""
    teacher: str
    prompts: str
    """JSONL file; both trainers read it in the order of the file"""
    loss: str
    """a key of DIVERGENCES"""
    steps: int
    seed: int
    threads: int
    """threads of each process"""
    prompts_per_step: int = 16
    samples_per_prompt: int = 4
    max_new_tokens: int = 48
    temperature: float = 1.0
    learning_rate: float = 1e-4
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_grad_norm: float = 1.0
    export_every: int | None = None
    """steps between two copies of the weights, which are evaluated later; None = no copies"""
    tokens_per_micro_batch: int = 2048
    """of ours; TRL takes all samples of a step at once"""

    def write(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def read(path: Path) -> Settings:
        """Read what `write` wrote."""
        return Settings(**json.loads(path.read_text()))


def our_config(settings: Settings, run_dir: Path) -> dict[str, Any]:
    """Return the configuration file of ours as a dict (YAML reads JSON)."""
    divergence, _ = DIVERGENCES[settings.loss]
    steps = settings.steps
    return {
        "run": {
            "dir": str(run_dir),
            "steps": steps,
            "seed": settings.seed,
            "checkpoint_every": settings.export_every or steps,
            "keep_checkpoints": steps,
            "export_at_end": False,
        },
        "platform": {"kind": "cpu"},
        "student": {"path": settings.student, "dtype": "float32"},
        "teacher": {"kind": "megatron", "path": settings.teacher, "dtype": "float32"},
        "data": {"prompts": settings.prompts, "max_prompt_tokens": 64, "shuffle": False},
        "rollout": {
            "prompts_per_step": settings.prompts_per_step,
            "samples_per_prompt": settings.samples_per_prompt,
            "max_new_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "server": {"max_total_tokens": 16384},
        },
        "objective": {"kind": "gkd", "divergence": divergence, "full_vocabulary": True},
        "batch": {"tokens_per_micro_batch": settings.tokens_per_micro_batch},
        "optimizer": {
            "learning_rate": settings.learning_rate,
            "weight_decay": settings.weight_decay,
            "beta1": settings.beta1,
            "beta2": settings.beta2,
            "eps": settings.eps,
            "clip_grad_norm": settings.clip_grad_norm,
        },
    }
