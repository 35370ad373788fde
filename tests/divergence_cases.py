"""One setting of each objective with a divergence, for tests of the properties that all of them have."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tests.objective_batch import Batch
from tropd_mcore.kernel.token_losses import TokenLosses
from tropd_mcore.objectives.inputs import TokenInputs
from tropd_mcore.objectives.matching import eopd, gkd, jsd, lsm
from tropd_mcore.objectives.parts.policy_gradient import PolicyGradient
from tropd_mcore.objectives.self_distillation import opsd, sdpo
from tropd_mcore.objectives.trust_region import aopd, tropd_aopd

PLAIN = PolicyGradient()
MOVED = PolicyGradient(ratio="ppo_clip", mismatch="tis", tis_cap=1.3, advantage_clip=2.0)
TROPD: dict[str, Any] = {
    "trust_mode": "bernoulli",
    "trust_threshold": 0.0,
    "outlier_mode": "fkl_direct",
    "outlier_weight": 0.7,
    "outlier_norm": "tail",
    "clip_tau": -0.8,
    "beta": 0.1,
    "prefix_loss": "nll",
}
Objective = Callable[[TokenInputs], TokenLosses]


def every_objective(policy: PolicyGradient = PLAIN) -> dict[str, Objective]:
    """One setting of each objective, and every divergence of objectives that have several."""
    objectives: dict[str, Objective] = {
        "eopd": partial(eopd, entropy_threshold=3.0, norm="truncated", policy=policy),
        "aopd": partial(aopd, threshold=0.0, norm="tail", policy=policy),
        "tropd_aopd": partial(
            tropd_aopd,
            aopd_threshold=0.0,
            aopd_weight=0.4,
            **TROPD,
            policy=policy,
        ),
        "jsd": partial(jsd, beta=0.3, policy=policy),
        "lsm": partial(lsm, sampled_tail=False, clip_log_ratio=None),
        "lsm with the sampled token": partial(lsm, sampled_tail=True, clip_log_ratio=0.9),
    }
    for divergence, norm in (("fkl", "truncated"), ("fkl", "renorm"), ("rkl", "tail"), ("jsd", "truncated")):
        objectives[f"gkd {divergence} {norm}"] = partial(
            gkd, divergence=divergence, beta=0.3, norm=norm, full_vocabulary=False
        )
    for alpha, norm in ((0.0, "tail"), (0.4, "tail"), (0.4, "renorm"), (1.0, "tail")):
        objectives[f"sdpo {alpha} {norm}"] = partial(sdpo, alpha=alpha, norm=norm, ratio_cap=1.2, policy=policy)
    for norm in ("truncated", "tail"):
        objectives[f"opsd {norm}"] = partial(opsd, entry_clip=0.05, norm=norm)
    return objectives


def student_rows(batch: Batch) -> Batch:
    """The same batch with every token sampled by the student."""
    batch.origin = ["student"] * len(batch.origin)
    return batch
