"""The plan and the weight stream of a Hugging Face folder, in the form that a publisher takes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from tropd_mcore.types import SampleRequest

Plan = list[tuple[str, tuple[int, ...], torch.dtype]]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def plan(folder: Path) -> Plan:
    return [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in weights(folder).items()]


def stream(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    yield from weights(folder).items()


def request(sample_id: str, prompt: list[int], *, prefix: list[int] | None = None, new: int = 12) -> SampleRequest:
    return SampleRequest(
        sample_id=sample_id,
        prompt_id=sample_id,
        prompt_ids=np.array(prompt, np.int32),
        prefix_ids=np.array(prefix or [], np.int32),
        max_new_tokens=new,
        carries_prefix_loss=bool(prefix),
        answer=None,
    )
