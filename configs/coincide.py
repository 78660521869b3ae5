"""COINCIDE (arXiv 2406.10995): train on examples of many kinds, more of those that are like others; no target set.

python -m dataflex_jax.train --config=configs/coincide.py                           # quickstart: a CPU, minutes
python -m dataflex_jax.train --config=configs/coincide.py:lora --config.data.root=DIR
python -m dataflex_jax.select --config=configs/coincide.py:lora --checkpoint=RUN --output=selected.npz ... # no training
"""

from dataflex_jax.configs import selection


def get_config(variant: str = "quickstart"):
    return selection.get_config("coincide", variant)
