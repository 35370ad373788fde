"""The metrics of each step and where they are written. Nothing here takes part in training."""
