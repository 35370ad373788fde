"""Asks torch, Transformer Engine, cuBLAS and NCCL for algorithms that give the same bits every time.

Nothing here computes. Invariants: it is called before the first model, product and process group of this process. A
variable that the user has set is kept, and refused if it asks for the opposite.
"""

from __future__ import annotations

from collections.abc import MutableMapping

import torch

from tropd_mcore.errors import ConfigError

FIXED_REDUCTIONS = ("Ring", "Tree", "CollnetDirect", "CollnetChain", "^NVLS")
"""Values of NCCL_ALGO that Megatron-LM accepts beside its deterministic mode: NCCL adds in a fixed order with them."""
WORKSPACES = (":4096:8", ":16:8")
"""Values of CUBLAS_WORKSPACE_CONFIG with which cuBLAS repeats its results (its documentation, "Results
reproducibility")."""


def make_deterministic(environ: MutableMapping[str, str]) -> None:
    """Switch this process to deterministic algorithms. `environ` is its environment.

    Megatron's models read the switch of torch (`mcore.model`). An operation without a deterministic form raises an
    error. Raises ConfigError with all variables that contradict.
    """
    allowed = {
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
        "CUBLAS_WORKSPACE_CONFIG": WORKSPACES,
        "NCCL_ALGO": FIXED_REDUCTIONS,
    }
    problems = [
        f"platform.deterministic=true: {name}={environ[name]}, expected {' or '.join(values)}; unset the variable, or "
        "set platform.deterministic=false"
        for name, values in allowed.items()
        if name in environ and environ[name] not in values
    ]
    if problems:
        raise ConfigError(problems)
    for name, values in allowed.items():
        environ.setdefault(name, values[0])
    torch.use_deterministic_algorithms(True)
