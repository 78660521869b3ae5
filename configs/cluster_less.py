"""LESS on clusters: a few gradients stand for a cluster of similar examples.

python -m dataflex_jax.train --config=configs/cluster_less.py                               # quickstart: a CPU, minutes
python -m dataflex_jax.train --config=configs/cluster_less.py:lora --config.data.root=DIR --config.targets.root=MMLU/dev
"""

from dataflex_jax.configs import selection


def get_config(variant: str = "quickstart"):
    return selection.get_config("cluster_less", variant)
