"""The loss in other training stacks, one file each, to copy from (docs/integrations.md)."""
