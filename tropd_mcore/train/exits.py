"""Exit codes of a rank, by which its launcher knows what has been said already.

Not for the codes of other commands (`cli.main`).
"""

EXPLAINED = 2
"""An error that the user can act upon; the rank has printed its line."""
BUG = 1
"""Anything else; the rank has printed its traceback."""
BYSTANDER = 3
"""The rank ended because another one did."""
STOPPED = 4
"""The rank was asked to stop where there was nothing to save; its launcher says so and ends with 0."""
INTERRUPTED = 130
"""SIGINT."""
