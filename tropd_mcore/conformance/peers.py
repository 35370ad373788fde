"""The interface for another project's loss (a *peer*): its inputs, its result, and its declared coverage.

Our own loss is in `our_loss`; the code around peers is in `adapters`. A peer is one function

    @covers("opd", "gkd/fkl-*", without=("softcap",))
    def loss(case: PeerCase) -> Tensor: ...

named on the command line as `--peer package.module:loss`, or as `package.module:loss@PATH` if it takes the `root` of a
checkout. It is called on every rank of the vocabulary group with that rank's shard. On every rank the matrix then calls
`backward()` on its result and reads `case.logits_TW.grad`. This is Megatron's convention: each rank holds a replica of
the loss and differentiates its own.

Shapes: T tokens, W vocabulary shard of this rank, K teacher top-k, L student top-k.
"""

from __future__ import annotations

import fnmatch
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor
from torch.distributed import ProcessGroup

from tropd_mcore.config.objectives import ObjectiveConfig
from tropd_mcore.errors import TropdError

Feature = Literal["padding", "temperature", "softcap", "weights", "uneven"]
"""Features of a case that a peer may decline: columns beyond the vocabulary (padding), a rollout temperature, a logit
softcap, weights other than 1, shards of unequal width."""


class PeerMissing(TropdError):
    """A peer raises it if its package is not installed here. Its cells are listed as not run, with this reason."""


@dataclass(frozen=True)
class PeerCase:
    """The inputs of one rank; only the shard's tensors differ between ranks. p student, q teacher, x sampled token.

    Per-token numbers are float64 for float64 logits, else float32. No row holds NaN. Rows outside both masks hold
    values that must not matter.
    """

    name: str
    """of the objective, as listed by `tropd conformance --list`"""
    objective: ObjectiveConfig
    """its keys (tropd_mcore.config)"""
    logits_TW: Tensor
    """a leaf that requires grad; float64, float32 or bfloat16"""
    teacher_logits_TW: Tensor
    """the teacher's, same dtype, same columns"""
    vocab_start: int
    """first column of this shard"""
    vocab_stop: int
    """one past the last column; W = vocab_stop - vocab_start"""
    vocab_size: int
    """columns >= vocab_size are padding: no token, any value"""
    group: ProcessGroup
    """ranks that share the vocabulary, in the order of their shards; the same object in all cases of a process"""
    temperature: float
    """p = softmax(cap(z) / temperature); q is taken at temperature 1"""
    softcap: float | None
    """cap(z) = softcap * tanh(z / softcap), of student and teacher; None: cap(z) = z"""
    target_ids_T: Tensor
    """int64, x, global"""
    teacher_logp_T: Tensor
    """log q(x)"""
    topk_ids_TK: Tensor
    """int64, global, K different candidates: the teacher's top-k, except that in every third row the last two are
    borders of shards"""
    teacher_topk_logp_TK: Tensor
    """log q of them, over the whole vocabulary, not renormalised"""
    own_ids_TL: Tensor
    """int64, global, the student's top-k before the update; L = 0 for objectives without"""
    teacher_own_logp_TL: Tensor
    """log q of them"""
    old_logp_T: Tensor
    """log p(x) before the update: the constant of the log-ratio and of importance ratios"""
    rollout_logp_T: Tensor
    """log p(x) as the sampler reported it"""
    trust_u_T: Tensor
    """uniform in [0, 1) of the Bernoulli gate"""
    student_mask_T: Tensor
    """bool, x was sampled by the student"""
    prefix_mask_T: Tensor
    """bool, x was sampled by the teacher (guidance)"""
    weight_T: Tensor
    """factor of each token's loss"""


PeerLoss = Callable[[PeerCase], Tensor]
"""Returns a scalar, the same on every rank: the sum of weight x loss over the tokens in either mask, no mean."""


@dataclass(frozen=True)
class Coverage:
    """What a peer claims to compute. Everything else is shown as `-` and never counts as a miss."""

    objectives: tuple[str, ...]
    """names or shell patterns of objectives"""
    without: frozenset[str]
    """features of `Feature` that it declines"""
    dtypes: tuple[str, ...]

    def objective(self, name: str) -> bool:
        """Return whether the peer computes this objective."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.objectives)


def covers(
    *objectives: str, without: tuple[Feature, ...] = (), dtypes: tuple[str, ...] = ("float64", "float32", "bfloat16")
) -> Callable[[PeerLoss], PeerLoss]:
    """Declare what the decorated function computes (names or shell patterns of objectives) and what it declines."""
    unknown = sorted(set(without) - set(get_args(Feature)))
    assert not unknown, f"unknown features {unknown}, expected some of {get_args(Feature)}"

    def declare(function: PeerLoss) -> PeerLoss:
        function.coverage = Coverage(objectives, frozenset(without), dtypes)  # type: ignore[attr-defined]
        return function

    return declare


def load_peer(path: str) -> tuple[PeerLoss, Coverage]:
    """Import the peer at `package.module:function`, or `package.module:function@PATH` for one that loads a checkout.

    The latter is called with `root`, the path. Raises TropdError if the function is missing or declares no coverage.
    """
    location, _, root = path.partition("@")
    module_name, _, name = location.partition(":")
    try:
        module: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise TropdError(
            f"--peer {path}: cannot import {module_name}: {error}; expected package.module:function"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise TropdError(f"--peer {path}: {module_name} has no function {name!r}; expected package.module:function")
    coverage = getattr(function, "coverage", None)
    if not isinstance(coverage, Coverage):
        raise TropdError(
            f"--peer {path}: {name} declares no objectives; decorate it with tropd_mcore.conformance.peers.covers"
        )
    if not root:
        return function, coverage
    if "root" not in inspect.signature(function).parameters:
        raise TropdError(f"--peer {path}: {name} loads no checkout; expected package.module:function without @PATH")
    return partial(function, root=Path(root)), coverage
