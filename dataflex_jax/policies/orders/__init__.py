"""Orders: in which order the chosen examples come (curricula)."""
