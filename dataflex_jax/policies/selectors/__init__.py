"""Selectors: which examples come next. One file an algorithm."""
