"""Prompts, answers and packing: all work on tokens on the host, between the data files and the model."""
