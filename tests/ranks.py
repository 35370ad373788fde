"""The ranks that tests run on: one pool for the whole session, so that a call costs a rendezvous and no import."""

import atexit

from tropd_mcore.conformance.ranks import Pool

_POOL = Pool({"TRITON_INTERPRET": "1"})
atexit.register(_POOL.close)
run_on_ranks = _POOL.run
