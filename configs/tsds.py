"""TSDS (arXiv 2410.11303): train on examples that are distributed as the target set is, near-duplicates thinned out.

python -m dataflex_jax.train --config=configs/tsds.py                               # quickstart: a CPU, minutes
python -m dataflex_jax.train --config=configs/tsds.py:lora --config.data.root=DIR --config.targets.root=MMLU/dev
python -m dataflex_jax.select --config=configs/tsds.py:lora --checkpoint=RUN --output=selected.npz ...   # no training
"""

from dataflex_jax.configs import selection


def get_config(variant: str = "quickstart"):
    return selection.get_config("tsds", variant)
