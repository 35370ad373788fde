"""A small arithmetic task with its tokenizer and two models, made from nothing: the example that the quickstart runs.

Not part of the library: nothing in `tropd_mcore` imports it.
"""
