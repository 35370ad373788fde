"""Files that a run writes for its own use: the run directory and its lock, rollouts, scores and per-token values."""
