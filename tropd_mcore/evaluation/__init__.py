"""How good is a model on prompts with checkable answers, and what became of a run."""
