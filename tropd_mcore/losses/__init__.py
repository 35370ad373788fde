"""What the student is trained on: log-probs from vocabulary shards, and objectives made of them.

Two layers that never mix. `kernel` turns sharded logits into replicated per-token numbers and knows nothing of
distillation. `objectives`, made of `trust`, `divergences`, `importance` and `policy_gradient`, turn such numbers into a
loss and know nothing of parallelism; `batch_statistics` tells them of other tokens, `method_table` binds constants.
"""
