"""The configuration: one YAML file and dotted overrides. All problems are reported at once. Imports no torch."""
