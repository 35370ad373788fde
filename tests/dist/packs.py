"""A pack for the tests of weights, checkpoints and optimizers, which need tokens and no rollouts."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from tropd_mcore.data.packing import one_sample
from tropd_mcore.types import MicroBatch


def whole_sequence(tokens: Tensor) -> MicroBatch:
    """A pack of one sample [P] in which every position is a row. The last row predicts token 0."""
    return one_sample(np.append(tokens.numpy(), 0), len(tokens), tokens.device)
