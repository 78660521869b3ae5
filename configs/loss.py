"""Examples drawn by their present loss: easy, medium or hard ones first.

python -m dataflex_jax.train --config=configs/loss.py                               # quickstart: a CPU, minutes
python -m dataflex_jax.train --config=configs/loss.py:lora --config.data.root=DIR
"""

from dataflex_jax.configs import selection


def get_config(variant: str = "quickstart"):
    return selection.get_config("loss", variant)
