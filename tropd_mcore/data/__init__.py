"""Prompts, requests and packing: what happens to tokens on the host, between the dataset and the model."""
