"""The training job: assembles the parts that other packages define, checks them, and runs the training loop."""
