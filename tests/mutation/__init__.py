"""Plants faults in the files outside the loss, drawn by a seed, and lists those that no test notices.

How to run it and what it plants: docs/mutation.md.
"""
