"""How well a pruned model still plays the character, and how fast it runs."""
