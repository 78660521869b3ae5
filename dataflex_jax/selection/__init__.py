"""From scores to the rows of the next window."""
