"""Run a language model as one character at a fraction of its cost."""
