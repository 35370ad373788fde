"""Megatron's random states of one rank, in a file.

Not for prompts, sampling or trust uniforms: those are functions of a seed and the step and need no state. Invariant:
a state is restored on the rank of the same layout that wrote it, or not at all (no other rank's state fits).
"""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel import random as megatron_random
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tropd_mcore.errors import ModelError
from tropd_mcore.files import sync

_HOST, _DEVICE, _TRACKER = "host", "device", "tracker."


def rng_file(folder: Path, rank: int) -> Path:
    """Where the states of `rank` are."""
    return folder / f"rng_{rank:05d}.safetensors"


def save_rng(folder: Path, rank: int) -> None:
    """Write the host's, the device's and the tracked model-parallel states, as bytes."""
    states: dict[str, Tensor] = {_HOST: torch.get_rng_state(), _DEVICE: megatron_random._get_cuda_rng_state()}
    states |= {_TRACKER + name: state for name, state in get_cuda_rng_tracker().get_states().items()}
    save_file({name: state.cpu().clone() for name, state in states.items()}, rng_file(folder, rank))
    sync(rng_file(folder, rank))


def load_rng(folder: Path, rank: int) -> None:
    """Restore what `save_rng` wrote. Raises ModelError where the file is missing or damaged."""
    path = rng_file(folder, rank)
    try:
        states = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: missing or damaged random states ({error})") from error
    torch.set_rng_state(states[_HOST])
    megatron_random._set_cuda_rng_state(states[_DEVICE])
    get_cuda_rng_tracker().set_states(
        {name.removeprefix(_TRACKER): state for name, state in states.items() if name.startswith(_TRACKER)}
    )
