"""Faults that a user meets, with real processes; and the long run that shows whether anything grows."""
