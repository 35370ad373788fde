"""Asks TRL for what its users or ours may need, and lets it answer. Runs in TRL's environment.

    python -m benchmarks.versus.trl_probes NAME SETTINGS.json OUT

Each probe prints what came out as its last line, or ends with TRL's own exception.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from trl.trainer.utils import pad

from benchmarks.versus.settings import Settings
from benchmarks.versus.trl_driver import arguments, trainer


def train(settings: Settings, out: Path, **more: Any) -> None:
    """Train as the settings say. The model folders are the question. `more`: for `trainer`."""
    made = trainer(settings, out, **more)
    made.train()
    print(f"trained {made.state.global_step} steps, mean loss {made.state.log_history[-1]['train_loss']:.4g}")


def tensor_parallel(settings: Settings, out: Path) -> None:
    """Train on the ranks of torchrun, tensor-parallel as transformers and accelerate do it."""
    from accelerate import ParallelismConfig

    ranks = ParallelismConfig(tp_size=int(os.environ["WORLD_SIZE"]))
    train(settings, out, load={"tp_plan": "auto"}, parallelism_config=ranks)


def teacher_topk(settings: Settings, out: Path) -> None:
    """Ask for the divergence on the 16 best tokens of a teacher in the process."""
    arguments(settings, out, loss_top_k=16)
    print("accepted")


def served_topk(settings: Settings, out: Path) -> None:
    """Ask for the reverse KL on the 16 best tokens of a served teacher."""
    from trl.experimental.server_distillation import ServerDistillationConfig

    ServerDistillationConfig(
        output_dir=str(out), use_cpu=True, bf16=False, beta=1.0, loss_top_k=16,
        teacher_model_server_url="http://127.0.0.1:1",
    )  # fmt: skip
    print("accepted")


def resume(settings: Settings, out: Path) -> None:
    """Train without a stop, and once more from the checkpoint in the middle, and compare the weights."""
    half = settings.steps // 2
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": half}
    trainer(settings, out / "whole", **saving).train()
    resumed = trainer(settings, out / "resumed", **saving)
    resumed.train(resume_from_checkpoint=str(out / "whole" / "trainer" / f"checkpoint-{half}"))
    last = f"trainer/checkpoint-{settings.steps}/model.safetensors"
    first, second = load_file(out / "whole" / last), load_file(out / "resumed" / last)
    differ = [name for name in first if not torch.equal(first[name], second[name])]
    print(f"{len(differ)} of {len(first)} tensors differ after a resume from step {half} of {settings.steps}")


def loss(settings: Settings, out: Path) -> None:
    """Compute the loss and the gradient norm of OUT/rollouts.json, without an update."""
    made = trainer(settings, out)
    rows = json.loads((out / "rollouts.json").read_text())

    def padded(name: str, side: str) -> tuple[torch.Tensor, torch.Tensor]:
        ids = [torch.tensor(row[name]) for row in rows]
        return (
            pad(ids, padding_value=made.processing_class.pad_token_id, padding_side=side),
            pad([torch.ones_like(each) for each in ids], padding_value=0, padding_side=side),
        )

    (prompt_ids, prompt_mask), (completion_ids, completion_mask) = padded("prompt", "left"), padded("response", "right")
    inputs = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "num_items_in_batch": completion_mask.sum(),
    }
    made.model.train()
    value = made.compute_loss(made.model, inputs)
    value.backward()
    norm = torch.nn.utils.clip_grad_norm_(made.model.parameters(), float("inf"))
    print(json.dumps({"loss": float(value), "gradient_norm": float(norm)}))


PROBES: dict[str, Callable[[Settings, Path], None]] = {
    "train": train,
    "tensor_parallel": tensor_parallel,
    "teacher_topk": teacher_topk,
    "served_topk": served_topk,
    "resume": resume,
    "loss": loss,
}


def main() -> None:
    """Run one probe."""
    settings, out = Settings.read(Path(sys.argv[2])), Path(sys.argv[3])
    torch.set_num_threads(settings.threads)
    out.mkdir(parents=True, exist_ok=True)
    PROBES[sys.argv[1]](settings, out)


if __name__ == "__main__":
    main()
