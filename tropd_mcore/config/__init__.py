"""One YAML, dotted overrides, every problem reported at once. Imports no torch."""
