"""Checks that the peers' losses compute the right values and gradients, before their times are compared.

    python -m benchmarks.peer_gradients --peer-root verl=PATH --peer-root nemo_rl=PATH --peer-root slime=PATH

This prints the error of each peer's loss and gradient, and of NeMo-RL's fused log-prob, against float64 autograd on the
whole vocabulary. A composite is a peer's loss in the form K1 + top-k forward KL + entropy (see `peers`).

Shapes: T tokens, W vocabulary shard of this rank, V vocabulary, D hidden, S this rank's part of the tokens.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.inputs import Tokens, make_logits, make_tokens
from benchmarks.measure import table
from benchmarks.peers import PEERS, load_composite
from tropd_mcore import logs
from tropd_mcore.conformance.adapters import nemo_rl
from tropd_mcore.conformance.ranks import on_fresh_ranks
from tropd_mcore.progress import progress

log = logging.getLogger("benchmarks.peer_gradients")

TOKENS, VOCABULARY, TOPK, HIDDEN = 37, 516, 9, 16
"""Divisible by 1 to 4 ranks."""
FUSED_CHUNK_TOKENS = 10


def errors(names: list[str], roots: dict[str, str]) -> list[tuple[str, float, float]]:
    """Return (name, relative error of the loss, of the gradient) per composite; the same on every rank."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    width = VOCABULARY // world_size
    tokens = make_tokens(TOKENS, VOCABULARY, TOPK)
    rows = []
    for name in names:
        true_TV = torch.cat([make_logits(TOKENS, width, rank=each).double() for each in range(world_size)], dim=1)
        true_loss = _true_loss(true_TV.requires_grad_(), tokens, forward_kl=name != "slime")
        true_loss.backward()
        logits_TW = make_logits(TOKENS, width, rank=rank).requires_grad_()
        loss = load_composite(name, roots)(logits_TW * 1.0, tokens)  # not the leaf itself: a peer may overwrite it
        loss.backward()
        rows.append((name, _relative(loss.detach(), true_loss), _gradient_error(logits_TW, true_TV, dim=1)))
    if "nemo_rl" in roots:
        rows.extend(_fused_errors(Path(roots["nemo_rl"]), tokens))
    return rows


def _true_loss(logits_TV: Tensor, tokens: Tokens, *, forward_kl: bool) -> Tensor:
    logp_TV = logits_TV.log_softmax(dim=1)
    loss_T = -tokens.advantage_T.double() * logp_TV.gather(1, tokens.target_T[:, None])[:, 0]
    loss_T = loss_T + tokens.entropy_weight_T.double() * (logp_TV.exp() * logp_TV).sum(dim=1)
    if forward_kl:
        log_q_TK = tokens.topk_logp_TK.double()
        loss_T = loss_T + (log_q_TK.exp() * (log_q_TK - logp_TV.gather(1, tokens.topk_ids_TK))).sum(dim=1)
    return loss_T.sum()


def _fused_errors(root: Path, tokens: Tokens) -> list[tuple[str, float, float]]:
    """Errors of NeMo-RL's log-prob from hidden states: one row for dH and one for dW."""
    rank, group = dist.get_rank(), dist.group.WORLD
    assert group is not None
    count = TOKENS - TOKENS % group.size()
    draw = torch.Generator().manual_seed(7)
    hidden_TD = torch.randn(count, HIDDEN, generator=draw, dtype=torch.float64).requires_grad_()
    weight_VD = torch.randn(VOCABULARY, HIDDEN, generator=draw, dtype=torch.float64).requires_grad_()
    target_T, factor_T = tokens.target_T[:count], tokens.advantage_T[:count]
    true_T = (hidden_TD @ weight_VD.T).log_softmax(dim=1).gather(1, target_T[:, None])[:, 0]
    (factor_T.double() * true_T).sum().backward()

    hidden_SD = hidden_TD.detach().float().chunk(group.size())[rank].requires_grad_()
    weight_WD = weight_VD.detach().float().chunk(group.size())[rank].requires_grad_()
    logp_T = nemo_rl.fused_log_prob(
        hidden_SD, weight_WD, target_T, group=group, chunk_tokens=FUSED_CHUNK_TOKENS, root=root
    )
    (factor_T * logp_T).sum().backward()
    value = _relative(logp_T.detach(), true_T)
    return [
        ("nemo_rl fused, dH", value, _gradient_error(hidden_SD, hidden_TD, dim=0)),
        ("nemo_rl fused, dW", value, _gradient_error(weight_WD, weight_VD, dim=0)),
    ]


def _gradient_error(shard: Tensor, whole: Tensor, *, dim: int) -> float:
    """Relative error of the gradients of all shards together."""
    assert shard.grad is not None and whole.grad is not None
    shards = [torch.empty_like(shard.grad) for _ in range(dist.get_world_size())]
    dist.all_gather(shards, shard.grad.contiguous())
    return _relative(torch.cat(shards, dim=dim), whole.grad)


def _relative(found: Tensor, true: Tensor) -> float:
    """Norm of the difference / norm of the true value."""
    return float((found.double() - true.detach()).norm() / true.detach().norm())


def main() -> None:
    """Run one command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-root", action="append", default=[], metavar="PEER=PATH", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2], choices=[1, 2, 3, 4], help="numbers of ranks")
    args = parser.parse_args()
    roots = dict(entry.split("=", 1) for entry in args.peer_root)
    cells = [
        [name, str(world_size), f"{loss:.1e}", f"{gradient:.1e}"]
        for world_size in args.tp
        for name, loss, gradient in on_fresh_ranks(errors, world_size, ["naive", *roots], roots)[0]
    ]
    print(table(["composite", "ranks", "loss error", "gradient error"], cells))


if __name__ == "__main__":
    logs.configure()
    with progress(log, "benchmarks.peer_gradients"):
        main()
