"""What a run leaves on disk for itself: its directory and the lock of it, rollouts and scores, values per token."""
