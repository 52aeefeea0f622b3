"""Stage 1: from a persona to questions that depend on it, answered in character."""
