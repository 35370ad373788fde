"""A policy server over given servers whose student has the weights of a Hugging Face folder, without Megatron."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from safetensors.torch import load_file

from tests.glue.stubs import make_config, make_student
from tropd_mcore.mcore.parallel import Layout
from tropd_mcore.monitor.clock import StepClock
from tropd_mcore.rollout import policy_server as policy_server_module
from tropd_mcore.rollout.policy_server import PolicyServer, PolicyServers
from tropd_mcore.train import components


@contextmanager
def policy_on(
    layout: Layout, servers: PolicyServers, folder: Path, run_dir: Path, clock: StepClock | None = None
) -> Iterator[PolicyServer]:
    """A launch whose responses end at the model's own tokens, with gates.weight_sync. Collective."""
    tensors = load_file(folder / "model.safetensors")
    config = make_config(run_dir, gates={"sampler_logprob": False, "tokenizer": False, "weight_sync": True})
    site: Any = SimpleNamespace(
        config=config,
        layout=layout,
        platform=SimpleNamespace(name="cpu"),
        student=SimpleNamespace(vocab_size=tensors["model.embed_tokens.weight"].shape[0]),
    )
    shapes = [(name, tuple(tensor.shape)) for name, tensor in tensors.items()]
    student = make_student(layout)
    student.config = SimpleNamespace(params_dtype=next(iter(tensors.values())).dtype)
    ends: Any = SimpleNamespace(ids=())
    with (
        mock.patch.object(policy_server_module, "iterate_hf", lambda *_, **__: iter(tensors.items())),
        mock.patch.object(components, "hf_weight_plan", lambda _: shapes),
    ):
        policy = components.make_policy(site, student, ends, servers, clock)
        try:
            yield policy
        finally:
            policy.close()
