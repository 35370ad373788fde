"""The reference of every objective: over the whole vocabulary, in float64, one token at a time.

It is written from the equations only. It imports the configuration keys and the inputs of a case, but no code of
`kernel`, `objectives` or `mcore`. Autograd differentiates a token's loss back to the complete row of logits. Constants
of a method are Python floats, so no gradient can flow through them.
"""
