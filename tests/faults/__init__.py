"""Faults that a user can experience, played with real processes, and a long run that shows whether anything grows."""
