"""Recipes: one short file each, `get_config(variant)` returns the ConfigDict that `python -m dataflex_jax.train` runs."""
