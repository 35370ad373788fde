"""The two custom functions of the matrix (`elementary`), which are the building blocks of all losses."""

from __future__ import annotations

from torch import Tensor

from tropd_mcore.config.objectives.user_function import CustomObjective
from tropd_mcore.conformance.oracle.decisions import Decisions
from tropd_mcore.conformance.oracle.token import Token

LEARNS_FROM_PREFIXES = ("custom",)


def custom(objective: CustomObjective, token: Token, decide: Decisions) -> Tensor:
    """-log p(x), or minus the entropy, sum_v p_v log p_v."""
    if objective.function.endswith(":negative_log_prob"):
        return -token.log_p
    assert objective.function.endswith(":negative_entropy"), objective.function
    return (token.log_p_V.exp() * token.log_p_V).sum()
