"""Megatron's tracker of random states, on the CPU generator.

Prompts, sampling and trust uniforms do not use it; they have seeds of their own. Invariant: `fork(name)` runs with the
state of that name and leaves the default generator unchanged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import megatron.core.tensor_parallel.random as megatron_random
import torch
from megatron.core import tensor_parallel


class CpuRngStatesTracker(megatron_random.CudaRNGStatesTracker):
    """Megatron's tracker with the same named states; each state belongs to the CPU generator."""

    def add(self, name: str, seed: int) -> None:
        """Track a new state. Both name and seed must be new, as in Megatron's tracker."""
        assert seed not in self.seeds_ and name not in self.states_, f"random state {name} / seed {seed} exists"
        self._is_initialized = True
        self.seeds_.add(seed)
        self.states_[name] = torch.Generator().manual_seed(seed).get_state()

    @contextlib.contextmanager
    def fork(self, name: str = megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        """Use the state `name` inside the block and store its new value afterwards."""
        assert name in self.states_, f"random state {name} is not tracked"
        outer = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outer)


def install() -> None:
    """Point megatron.core.tensor_parallel.random at the CPU generator.

    `model_parallel_cuda_manual_seed` calls `torch.cuda.manual_seed`, which silently does nothing without a GPU. The
    replacement therefore also seeds the CPU generator.
    """
    megatron_random._get_cuda_rng_state = lambda device=None, clone=False, graph_safe=False: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    megatron_random.CudaRNGStatesTracker = CpuRngStatesTracker
    seed_tracker = megatron_random.model_parallel_cuda_manual_seed

    def seed_tracker_and_generator(seed: int, *args: Any, **kwargs: Any) -> None:
        seed_tracker(seed, *args, **kwargs)
        torch.manual_seed(seed)

    megatron_random.model_parallel_cuda_manual_seed = seed_tracker_and_generator
    tensor_parallel.model_parallel_cuda_manual_seed = seed_tracker_and_generator
