"""Adaptive Data Optimization (arXiv 2410.11820): scaling laws of each domain, no extra passes.

python -m dataflex_jax.train --config=configs/ado.py                  # quickstart: a CPU, minutes
python -m dataflex_jax.train --config=configs/ado.py:local --config.data.root=DIR
python -m dataflex_jax.train --config=configs/ado.py:slimpajama-6b    # or slimpajama-30b
"""

from dataflex_jax.configs import scales


def get_config(variant: str = "quickstart"):
    config = scales.get_config("ado", variant)
    if config.mixer.name == "ado" and config.train_step <= 1000:
        config.mixer.update(ignore=20, smoothing=4)
        config.mixer.update_step = 25  # a fit costs about a step of a small model
    return config
