"""Recipes: one short file each; `get_config(variant)` returns the ConfigDict that the trainer runs."""
