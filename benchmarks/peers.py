"""Other projects' losses as the benchmarks call them: K1 + top-k forward KL + entropy of given logits.

The adapters of `tropd conformance` load them from the user's checkouts (docs/peers.md). `naive` needs no checkout.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from benchmarks.inputs import Tokens
from tropd_mcore.conformance.adapters.inputs import CompositeInputs

PEERS = ("naive", "verl", "nemo_rl", "slime")
PEER_CHUNK_TOKENS = 1024
"""Chunk size for the peers that use chunks: their default or the value of their recipes."""

Composite = Callable[[Tensor, Tokens], Tensor]
"""(logits shard that requires grad, tokens) -> loss sum"""


def load_composite(name: str, roots: dict[str, str]) -> Composite:
    """Return the composite of a peer. `roots`: peer -> checkout. Raises SystemExit if `name` is not in PEERS."""
    if name not in PEERS:
        raise SystemExit(
            f"unknown method {name}: expected ours-<backend>[-<mode>], door-<backend> or one of {', '.join(PEERS)}"
        )
    adapter = importlib.import_module(f"tropd_mcore.conformance.adapters.{name}")
    root = Path(roots[name]) if name in roots else None
    group = dist.group.WORLD
    assert group is not None

    def composite(logits_TW: Tensor, tokens: Tokens) -> Tensor:
        inputs = CompositeInputs(
            logits_TW=logits_TW,
            group=group,
            target_ids_T=tokens.target_T,
            topk_ids_TK=tokens.topk_ids_TK,
            topk_logp_TK=tokens.topk_logp_TK,
            advantage_T=tokens.advantage_T,
            entropy_weight_T=tokens.entropy_weight_T,
            chunk_tokens=PEER_CHUNK_TOKENS,
        )
        loss: Tensor = adapter.composite(inputs, root=root)
        return loss

    return composite
