"""Experiments over personas, methods and seeds: `persona-pruner compare` and `persona-pruner analyse`."""
