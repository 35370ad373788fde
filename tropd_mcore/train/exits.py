"""Exit codes of a rank. They tell the launcher which message has already been printed.

Codes of other commands are in `cli.main`.
"""

EXPLAINED = 2
"""An error that the user can act upon. The rank has printed one line."""
BUG = 1
"""Any other error. The rank has printed a traceback."""
BYSTANDER = 3
"""The rank ended because another rank did."""
STOPPED = 4
"""The rank was asked to stop when there was nothing to save. Its launcher prints that and exits with 0."""
LOST = 75
"""A node or a rank is gone or stands still. Nothing has to be changed: the same command resumes (EX_TEMPFAIL)."""
INTERRUPTED = 130
"""SIGINT."""
