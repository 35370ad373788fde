"""Adapters that use the loss in other training stacks. Each file is meant to be copied (docs/integrations.md)."""
