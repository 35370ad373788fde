"""Evaluates a model on prompts with checkable answers, and writes the HTML report of a run."""
