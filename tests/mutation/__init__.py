"""Plant faults, drawn by a seed, in the files outside the loss, and list those that no test detects.

docs/mutation.md says how to run it and which faults it plants.
"""
