"""Imported at the start of every Python process of a mutation run. Counts lines and refuses wrong sources.

The folder is on PYTHONPATH, so spawned ranks and commands that tests start load this too.
"""

import os
import sys
from importlib.util import find_spec

if os.environ.get("COVERAGE_PROCESS_START"):
    import coverage

    coverage.process_startup()
    _running = coverage.Coverage.current()
    if _running is not None and os.environ.get("MUTATION_CONTEXT"):
        _running.switch_context(os.environ["MUTATION_CONTEXT"])

if "MUTATION_COPY" in os.environ:
    _spec = find_spec("tropd_mcore")
    _origin = _spec.origin if _spec is not None and _spec.origin is not None else "nowhere"
    if not _origin.startswith(os.environ["MUTATION_COPY"] + os.sep):
        print(f"WRONG SOURCES: tropd_mcore is imported from {_origin}", file=sys.stderr, flush=True)
        os._exit(97)
