"""Log-probs of one short text from every replica of a Megatron model, at the layout of the job, on every rank.

`train.model_check` compares them with the log-probs that transformers computes from the model's folder. This module
does not score samples (`scoring`) or check converted checkpoints (`verification`). Invariant: the numbers come from the
same code that scores in training.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from tropd_mcore.data.packing import one_sample, pack_multiple
from tropd_mcore.mcore.loss_settings import LossSettings
from tropd_mcore.mcore.model import Model
from tropd_mcore.mcore.parallel import Layout
from tropd_mcore.mcore.scoring import score_micro_batches
from tropd_mcore.types import IntArray, MicroBatch


def probe_log_probs(model: Model, token_ids: IntArray, settings: LossSettings) -> npt.NDArray[np.float64]:
    """Return log-probs of token_ids[1:], each given the tokens before it: [data ranks, len(token_ids) - 1], nats.

    Every data rank scores the text with its own replica of the model. Collective.
    """
    layout = model.layout
    multiple = pack_multiple(layout.cp_size, layout.tp_size)
    pack_length = -(-len(token_ids) // multiple) * multiple
    micro_batch = probe_batch(token_ids, pack_length, layout, model.platform.device)
    (scores,) = score_micro_batches(model, [micro_batch], pack_length, k=1, settings=settings)
    mine: tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]] | None = None
    if scores is not None and layout.tp_rank == 0:
        mine = (micro_batch.token_index_T.cpu().numpy() - 1, scores.logp_T.double().cpu().numpy())
    everyone: list[tuple[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]] | None]]
    everyone = [(0, None)] * layout.world_size
    dist.all_gather_object(everyone, (layout.dp_rank, mine), group=layout.groups.control)
    found = np.full((layout.dp_size, len(token_ids) - 1), np.nan)
    for replica, part in everyone:
        if part is not None:
            found[replica, part[0]] = part[1]
    return found


def probe_batch(token_ids: IntArray, pack_length: int, layout: Layout, device: torch.device) -> MicroBatch:
    """Return this context rank's part of a pack with one sample. Every position but the last of the text is a row.

    The text is padded to `pack_length` by repeating its last token. No token before the padding attends to it.
    """
    filling = np.full(pack_length + 1 - len(token_ids), token_ids[-1])
    tokens = np.concatenate([token_ids, filling]).astype(np.int64)
    return one_sample(tokens, len(token_ids) - 1, device, cp_size=layout.cp_size, cp_rank=layout.cp_rank)
