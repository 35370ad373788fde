"""The vocabulary-parallel kernel: from hidden states or logits shards to a loss and its gradients.

One collective a chunk in the forward pass, none in the backward pass but that of the hidden states' gradient; nothing
of size [tokens, vocabulary] is allocated.
"""
