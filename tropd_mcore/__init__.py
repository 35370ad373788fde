"""TrOPD: on-policy distillation of large teachers on Megatron-Core, with SGLang rollouts.

The loss can be used alone: `from tropd_mcore import distill_loss` imports only torch (docs/library.md).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tropd_mcore import objectives
    from tropd_mcore.errors import LossInputError
    from tropd_mcore.kernel.token_losses import TokenLosses
    from tropd_mcore.library.arguments import (
        DistillLoss,
        OutputLayer,
        StudentTopK,
        TeacherLogits,
        TeacherTopK,
        VocabParallel,
    )
    from tropd_mcore.library.log_probs import loss_from_log_probs
    from tropd_mcore.library.loss import distill_loss
    from tropd_mcore.library.scores import distributed_topk, support_log_probs
    from tropd_mcore.library.uniforms import trust_uniforms
    from tropd_mcore.objectives.inputs import TokenInputs

__version__ = "0.1.0"

__all__ = [
    "DistillLoss",
    "LossInputError",
    "OutputLayer",
    "StudentTopK",
    "TeacherLogits",
    "TeacherTopK",
    "TokenInputs",
    "TokenLosses",
    "VocabParallel",
    "distill_loss",
    "distributed_topk",
    "loss_from_log_probs",
    "objectives",
    "support_log_probs",
    "trust_uniforms",
]

_HOMES = {
    "DistillLoss": "library.arguments",
    "LossInputError": "errors",
    "OutputLayer": "library.arguments",
    "StudentTopK": "library.arguments",
    "TeacherLogits": "library.arguments",
    "TeacherTopK": "library.arguments",
    "TokenInputs": "objectives.inputs",
    "TokenLosses": "kernel.token_losses",
    "VocabParallel": "library.arguments",
    "distill_loss": "library.loss",
    "distributed_topk": "library.scores",
    "loss_from_log_probs": "library.log_probs",
    "support_log_probs": "library.scores",
    "trust_uniforms": "library.uniforms",
}
"""Name -> module that defines it. The module is imported when the name is first used."""


def __getattr__(name: str) -> Any:
    if name == "objectives":
        return importlib.import_module("tropd_mcore.objectives")
    if name not in _HOMES:
        raise AttributeError(f"module 'tropd_mcore' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tropd_mcore.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
