"""What a pruned persona is stored as."""
