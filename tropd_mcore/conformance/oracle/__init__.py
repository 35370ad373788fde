"""What every objective is, over the whole vocabulary, in float64, one token at a time.

Written from the equations and from nothing else: it imports the keys of the configuration and the inputs of a case, and
no code of `kernel`, `objectives` or `mcore`. A token's loss is a number that autograd follows back to the complete row
of logits; constants of a method are Python floats, so that nothing can flow through them.
"""
