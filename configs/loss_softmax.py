"""A softmax over the domains' losses, the simple baseline.

python -m dataflex_jax.train --config=configs/loss_softmax.py                  # quickstart: a CPU, minutes
python -m dataflex_jax.train --config=configs/loss_softmax.py:local --config.data.root=DIR
python -m dataflex_jax.train --config=configs/loss_softmax.py:slimpajama-6b    # or slimpajama-30b
"""

from dataflex_jax.configs import scales


def get_config(variant: str = "quickstart"):
    return scales.get_config("loss_softmax", variant)
