"""Weighters: how much each row counts in the loss. One file an algorithm."""
