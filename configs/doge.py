"""DoGE (arXiv 2310.15393): domains whose gradients help the others'.

python -m dataflex_jax.train --config=configs/doge.py                  # quickstart: a CPU, minutes
python -m dataflex_jax.train --config=configs/doge.py:local --config.data.root=DIR
python -m dataflex_jax.train --config=configs/doge.py:slimpajama-6b    # or slimpajama-30b
"""

from dataflex_jax.configs import scales


def get_config(variant: str = "quickstart"):
    config = scales.get_config("doge", variant)
    config.update_step = 10
    return config
