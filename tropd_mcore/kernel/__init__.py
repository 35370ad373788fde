"""The vocabulary-parallel kernel: from hidden states or logits shards to a loss and its gradients.

Forward: one collective per chunk (two with a Jensen-Shannon divergence over the whole vocabulary). Backward: only the
all-reduce of the hidden-state gradient. The logits of an output layer exist for one chunk of tokens at a time.
"""
