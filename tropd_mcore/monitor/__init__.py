"""What is measured each step and where it is written; nothing here takes part in training."""
