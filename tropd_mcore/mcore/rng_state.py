"""Saves and restores Megatron's random states of one rank in a file.

Prompts, sampling and trust uniforms need no state, because they are functions of a seed and the step. Invariant: a
state is restored only on the rank that wrote it, at the same layout. No other rank's state would fit.
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
    """Return the file of the states of `rank`."""
    return folder / f"rng_{rank:05d}.safetensors"


def save_rng(folder: Path, rank: int) -> None:
    """Write the states of the host, of the device and of Megatron's model-parallel tracker, as bytes."""
    states: dict[str, Tensor] = {_HOST: torch.get_rng_state(), _DEVICE: megatron_random._get_cuda_rng_state()}
    states |= {_TRACKER + name: state for name, state in get_cuda_rng_tracker().get_states().items()}
    save_file({name: state.cpu().clone() for name, state in states.items()}, rng_file(folder, rank))
    sync(rng_file(folder, rank))


def load_rng(folder: Path, rank: int) -> None:
    """Restore the states that `save_rng` wrote. Raises ModelError if the file is missing or damaged."""
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
