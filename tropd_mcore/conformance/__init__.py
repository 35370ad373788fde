"""The proof of a vocabulary-parallel distillation loss: any loss against an oracle over the whole vocabulary.

`oracle` says what is right, `cases` makes the inputs, `subject` and `peers` compute, `matrix` plans, runs and reports.
Nothing here is imported by training.
"""
