"""The objectives: one function each, from per-token numbers of student and teacher to a loss.

Every objective has the form

    loss of a token = - w A log p(x) + c D

with an advantage A (constant), a ratio w, a divergence D (both differentiable in the student) and a constant c. A
method is defined by its choice of A, c and D. Equation -> function -> test: docs/objectives.md.

A family of objectives has the same module name in three packages: `config.objectives.<family>` (its keys),
`objectives.<family>` (its equations) and `conformance.oracle.<family>` (an independent reference). `catalogue` has the
defaults of all constants and imports no torch. `registry` finds the function of a configured objective. `parts` has the
building blocks that several families share. Parallelism is not handled here, but in the kernel.

`objectives.tropd(outlier_weight=0.5)` is an objective for `distill_loss`. The names below are those of `catalogue`.
"""

from tropd_mcore.objectives.catalogue import (
    Objective,
    PolicyGradient,
    aopd,
    custom,
    entropy_opd,
    eopd,
    exopd,
    from_name,
    gkd,
    iw_opd,
    jsd,
    kdrl,
    lsm,
    opd,
    opsd,
    power_opd,
    reopold,
    rethinking,
    rlad,
    sdpo,
    sft,
    topd,
    tropd,
    tropd_aopd,
    vopd,
)

__all__ = [
    "Objective",
    "PolicyGradient",
    "aopd",
    "custom",
    "entropy_opd",
    "eopd",
    "exopd",
    "from_name",
    "gkd",
    "iw_opd",
    "jsd",
    "kdrl",
    "lsm",
    "opd",
    "opsd",
    "power_opd",
    "reopold",
    "rethinking",
    "rlad",
    "sdpo",
    "sft",
    "topd",
    "tropd",
    "tropd_aopd",
    "vopd",
]
