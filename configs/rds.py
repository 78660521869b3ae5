"""RDS+ (arXiv 2503.01807): train on the examples whose hidden states are like the target set's, each target in turn.

python -m dataflex_jax.train --config=configs/rds.py                               # quickstart: a CPU, minutes
python -m dataflex_jax.train --config=configs/rds.py:lora --config.data.root=DIR --config.targets.root=MMLU/dev
python -m dataflex_jax.select --config=configs/rds.py:lora --checkpoint=RUN --output=selected.npz ...   # no training

Forward passes only. DIR and MMLU/dev are as of configs/less.py.
"""

from dataflex_jax.configs import selection


def get_config(variant: str = "quickstart"):
    return selection.get_config("rds", variant)
