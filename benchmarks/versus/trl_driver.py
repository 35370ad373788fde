"""Trains with TRL's DistillationTrainer and writes the seconds of each part per step. Runs in TRL's environment.

    python -m benchmarks.versus.trl_driver SETTINGS.json OUT

OUT/metrics.jsonl has the lines and the names of a run of ours (`time/<part>`); OUT/weights/step_<n> are Hugging Face
folders. The trainer is TRL's own. Its methods are only timed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from benchmarks.versus.settings import DIVERGENCES, Settings


class Clock:
    """Seconds of each part of a step. A second belongs to the innermost open part."""

    def __init__(self) -> None:
        self._begun = self._charged = time.monotonic()
        self._parts: dict[str, float] = {}
        self._open: list[str] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of the block to part `name`."""
        self.start(name)
        try:
            yield
        finally:
            self.stop()

    def start(self, name: str) -> None:
        """Open a part."""
        self._charge()
        self._open.append(name)

    def stop(self) -> None:
        """Close the innermost part."""
        self._charge()
        self._open.pop()

    def take(self) -> dict[str, float]:
        """Return the seconds since the last call, and start from zero."""
        self._charge()
        taken = {**self._parts, "step": self._charged - self._begun}
        self._parts, self._begun = {}, self._charged
        return taken

    def _charge(self) -> None:
        now = time.monotonic()
        if self._open:
            self._parts[self._open[-1]] = self._parts.get(self._open[-1], 0.0) + now - self._charged
        self._charged = now


class TimedTrainer(DistillationTrainer):
    """TRL's trainer with a clock around its methods."""

    clock: Clock

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        with self.clock.part("pack"):
            return super()._prepare_inputs(generation_batch)

    def _generate(self, prompts: list[Any]) -> Any:
        with self.clock.part("rollout"):
            return super()._generate(prompts)

    def _get_last_hidden_state(self, unwrapped_model: Any, *args: Any, **kwargs: Any) -> Any:
        if unwrapped_model is not self.accelerator.unwrap_model(self.teacher_model):
            return super()._get_last_hidden_state(unwrapped_model, *args, **kwargs)
        with self.clock.part("teacher"):
            return super()._get_last_hidden_state(unwrapped_model, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.clock.part("forward_backward"):
            loss = super().training_step(*args, **kwargs)
        self.clock.start("optimizer")  # until the step's end: clipping, the update, the schedule
        return loss


class Record(TrainerCallback):
    """Writes a line per step, and the weights where they are asked for."""

    def __init__(self, clock: Clock, out: Path, settings: Settings, tokenizer: Any) -> None:
        self.clock, self.out, self.settings, self.tokenizer = clock, out, settings, tokenizer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop the seconds before the first step."""
        self.clock.take()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Write the line, then the weights; those seconds go to the next line, as with ours."""
        self.clock.stop()
        line = {"step": state.global_step - 1} | {f"time/{name}": value for name, value in self.clock.take().items()}
        with (self.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        every = self.settings.export_every
        if every is not None and state.global_step % every == 0:
            with self.clock.part("checkpoint"):
                folder = self.out / "weights" / f"step_{state.global_step}"
                model.save_pretrained(folder)
                self.tokenizer.save_pretrained(folder)


def arguments(settings: Settings, out: Path, **more: Any) -> DistillationConfig:
    """Return TRL's arguments: the shared settings, and otherwise its defaults, on a CPU in float32."""
    _, beta = DIVERGENCES[settings.loss]
    given = {
        "output_dir": str(out / "trainer"),
        "beta": beta,
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.prompts_per_step * settings.samples_per_prompt,
        "gradient_accumulation_steps": 1,
        "max_completion_length": settings.max_new_tokens,
        "temperature": settings.temperature,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": settings.weight_decay,
        "adam_beta1": settings.beta1,
        "adam_beta2": settings.beta2,
        "adam_epsilon": settings.eps,
        "max_grad_norm": settings.clip_grad_norm,
        "seed": settings.seed,
        "shuffle_dataset": False,
        "gradient_checkpointing": False,  # ours does not recompute either
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return DistillationConfig(**(given | more))


def prompts(settings: Settings) -> Dataset:
    """Return each prompt `samples_per_prompt` times in a row, in the order of the file."""
    lines = [json.loads(line) for line in Path(settings.prompts).read_text().splitlines()]
    repeated = [{"prompt": line["messages"]} for line in lines for _ in range(settings.samples_per_prompt)]
    return Dataset.from_list(repeated)


def trainer(settings: Settings, out: Path, *, load: dict[str, Any] | None = None, **more: Any) -> TimedTrainer:
    """Return TRL's trainer, ready to train. `load`: for from_pretrained, `more`: for the configuration."""
    tokenizer = AutoTokenizer.from_pretrained(settings.student, padding_side="left")
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **(load or {}))
        for folder in (settings.student, settings.teacher)
    )
    clock = Clock()
    made = TimedTrainer(
        model=student,
        teacher_model=teacher,
        args=arguments(settings, out, **more),
        train_dataset=prompts(settings),
        processing_class=tokenizer,
        callbacks=[Record(clock, out, settings, tokenizer)],
    )
    made.clock = clock
    return made


def main() -> None:
    """Train as the settings say."""
    settings, out = Settings.read(Path(sys.argv[1])), Path(sys.argv[2])
    torch.set_num_threads(settings.threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    out.mkdir(parents=True, exist_ok=True)
    trainer(settings, out).train()


if __name__ == "__main__":
    main()
