"""The objectives: one function each, from per-token numbers of student and teacher to a loss.

Every one has the form

    loss of a token = - w A log p(x) + c D

with an advantage A (constant), a ratio w and a divergence D (both differentiable in the student) and a constant c; what
a method is, is its choice of A, c and D. Equation -> function -> test: docs/objectives.md.

A family of objectives has one name in three rooms: `config.objectives.<family>` (its keys), `objectives.<family>` (its
equations) and `conformance.oracle.<family>` (an independent truth). `catalogue` has the defaults of all constants and
imports no torch; `registry` finds the function of a configured objective; `parts` are what several families are made
of. Nothing here knows of parallelism: that is the kernel's.

`objectives.tropd(outlier_weight=0.5)` is an objective for `distill_loss`: the names below are those of `catalogue`.
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
    "topd",
    "tropd",
    "tropd_aopd",
    "vopd",
]
