"""Conformance tests of a vocabulary-parallel distillation loss, ours or a peer's, against an oracle.

The oracle works over the whole vocabulary. `oracle` computes the correct results, `cases` makes the inputs, `our_loss`
and `peers` run the losses under test, `cells` plans, `matrix` runs, `judge` compares and `report` prints. Training does
not import this package.
"""
