"""Supervised fine-tuning: -log p(x) on every supervised token, whoever wrote it.

Source: maximum likelihood.
"""

from __future__ import annotations

from torch import Tensor

from tropd_mcore.config.objectives.supervised import SftObjective
from tropd_mcore.conformance.oracle.decisions import Decisions
from tropd_mcore.conformance.oracle.token import Token

LEARNS_FROM_PREFIXES = ("sft",)


def sft(objective: SftObjective, token: Token, decide: Decisions) -> Tensor:
    """-log p(x)."""
    return -token.log_p
