"""The loss for other trainers: what `from tropd_mcore import ...` offers (docs/library.md).

Not for training jobs, which hand it their packs (`mcore.loss`). Invariants: torch is all that is imported; whatever is
missing or would make another gradient is refused in one line before any collective.
"""

from tropd_mcore.kernel.source import OLDEST_TORCH, torch_version

if torch_version() < OLDEST_TORCH:
    import torch

    raise ImportError(
        f"tropd_mcore needs torch {'.'.join(map(str, OLDEST_TORCH))} or newer, found {torch.__version__}; older ones "
        "lack the mixed-precision product that the loss is made of"
    )
