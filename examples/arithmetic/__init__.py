"""A small arithmetic task with a tokenizer and two models, made from scratch. The quickstart runs this example.

It is not part of the library: nothing in `tropd_mcore` imports it.
"""
