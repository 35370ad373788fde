"""What a Megatron model says of one short text, at the layout of the job: all of its replicas, on every rank.

For the comparison with an independent reading of its folder (`train.model_check`). Not for scoring samples (`scoring`)
or for converted checkpoints (`verification`). Invariant: the numbers come from the code that scores in training.
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
    """Log-probs of token_ids[1:], each given those before it: [data ranks, len(token_ids) - 1], nats. Collective.

    Every data rank scores the text with its own replica of the model.
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
    """This context rank's part of a pack of one sample, in which every position but the last of the text is a row.

    The text is filled up to `pack_length` by repeating its last token: no token before the filling attends to it.
    """
    filling = np.full(pack_length + 1 - len(token_ids), token_ids[-1])
    tokens = np.concatenate([token_ids, filling]).astype(np.int64)
    return one_sample(tokens, len(token_ids) - 1, device, cp_size=layout.cp_size, cp_rank=layout.cp_rank)
