"""Measurements of the loss: scripts that print a table and write a JSON file with machine and commit.

They are not tests: no time makes a script pass or fail. See benchmarks/README.md.
"""
