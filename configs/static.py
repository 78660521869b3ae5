"""Fixed proportions: the baseline of the mixing recipes, at the same scales.

python -m dataflex_jax.train --config=configs/static.py[:local|:slimpajama-6b|:slimpajama-30b]
"""

from dataflex_jax.configs import scales


def get_config(variant: str = "quickstart"):
    return scales.get_config("static", variant)
