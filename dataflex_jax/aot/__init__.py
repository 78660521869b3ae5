"""XLA's GPU compiler without a GPU: programs of a configuration as a card would run them, and what they take."""
