"""A peer's loss on one rank (see `peers` for what it is given)."""

from __future__ import annotations

import torch
import torch.distributed as dist

from tropd_mcore.conformance.cases import make_batch
from tropd_mcore.conformance.cells import Cell
from tropd_mcore.conformance.entries import Entry
from tropd_mcore.conformance.our_loss import Answer
from tropd_mcore.conformance.peers import PeerCase, load_peer


def run_peer(cell: Cell, entry: Entry, device: torch.device) -> Answer:
    """Return the answer of the cell's peer; called on every rank of the default group."""
    assert cell.peer is not None
    function, _ = load_peer(cell.peer)
    case = make_case(cell, entry, device)
    loss = function(case)
    loss.backward()
    gradient = case.logits_TW.grad
    found = torch.zeros_like(case.logits_TW) if gradient is None else gradient
    return Answer(float(loss.detach()), None, logits_TW=found.detach().double().cpu())


def make_case(cell: Cell, entry: Entry, device: torch.device) -> PeerCase:
    """Return this rank's part of a case."""
    batch = make_batch(cell.conditions())
    tokens, cuts, rank = batch.tokens, cell.divided.cuts, dist.get_rank()
    columns = slice(cuts[rank], cuts[rank + 1])
    dtype = torch.float64 if batch.dtype == torch.float64 else torch.float32
    group = dist.group.WORLD
    assert group is not None
    numbers = {
        name: number.to(device=device, dtype=dtype if number.is_floating_point() else number.dtype)
        for name, number in vars(tokens).items()
        if name in PeerCase.__dataclass_fields__
    }
    return PeerCase(
        name=entry.name,
        objective=entry.objective,
        logits_TW=batch.student.logits_TW[:, columns].to(device).clone().requires_grad_(),
        teacher_logits_TW=batch.teacher.logits_TW[:, columns].to(device).clone(),
        vocab_start=columns.start,
        vocab_stop=columns.stop,
        vocab_size=batch.vocab_size,
        group=group,
        temperature=batch.temperature,
        softcap=batch.softcap,
        **numbers,
    )
