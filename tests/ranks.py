"""The ranks that tests run on: two pools for the whole session. A call costs a rendezvous but no import.

`run_on_ranks` has Triton's interpreter and never torch.compile. Megatron on a CPU turns the compiler off in a process
for good, and the compiler cannot trace the interpreter. `run_with_compiler` is for code that torch.compile compiles.
None of its calls may open a Megatron job.
"""

import atexit

from tropd_mcore.conformance.ranks import Pool

_POOL = Pool({"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"})
_WITH_COMPILER = Pool()
atexit.register(_POOL.close)
atexit.register(_WITH_COMPILER.close)
run_on_ranks = _POOL.run
run_with_compiler = _WITH_COMPILER.run
