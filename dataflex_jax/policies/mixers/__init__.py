"""Mixers: from which domain the next rows come. One file an algorithm."""
