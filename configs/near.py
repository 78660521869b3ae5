"""Nearest neighbours: train on the examples that are nearest to the target set by embeddings.

python -m dataflex_jax.train --config=configs/near.py                               # quickstart: a CPU, minutes
python -m dataflex_jax.train --config=configs/near.py:lora --config.data.root=DIR --config.targets.root=MMLU/dev
python -m dataflex_jax.select --config=configs/near.py:lora --checkpoint=RUN --output=selected.npz ...   # no training
python -m dataflex_jax.select --config=configs/near.py:lora --config.selector.embedding_model=MODEL ...   # no RUN
"""

from dataflex_jax.configs import selection


def get_config(variant: str = "quickstart"):
    return selection.get_config("near", variant)
