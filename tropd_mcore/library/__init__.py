"""The loss for other trainers: what `from tropd_mcore import ...` offers (docs/library.md).

Not for training jobs, which hand it their packs (`mcore.loss`). Invariants: torch is all that is imported; whatever is
missing or would make another gradient is refused in one line before any collective.
"""
