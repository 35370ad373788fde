"""The loss for other trainers: what `from tropd_mcore import ...` offers (docs/library.md).

Training jobs of this package do not use it (`mcore.loss`). Invariants: it imports only torch. If an input is missing or
would give another gradient, the call is refused in one line before any collective.
"""

from tropd_mcore.kernel.source import OLDEST_TORCH, torch_version

if torch_version() < OLDEST_TORCH:
    import torch

    raise ImportError(
        f"tropd_mcore needs torch {'.'.join(map(str, OLDEST_TORCH))} or newer, found {torch.__version__}; older ones "
        "lack the mixed-precision product that the loss needs"
    )
