"""Measurements of the loss: scripts that print a table and write a JSON file with machine and commit.

Not tests: nothing here passes or fails on a time. See benchmarks/README.md.
"""
