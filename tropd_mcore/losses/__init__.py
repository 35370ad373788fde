"""What the student is trained on: log-probs from vocabulary shards, and objectives made of them.

Two layers that never mix. `support` and `topk` turn sharded logits into replicated per-token numbers and know nothing
of distillation; `trust`, `divergences`, `importance`, `objectives` and `method_table` turn such numbers into a loss and
know nothing of parallelism.
"""
