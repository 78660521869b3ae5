"""NICE: train on the examples whose gradients point where a reward of the model's own responses rises.

python -m dataflex_jax.train --config=configs/nice.py                               # quickstart: a CPU, minutes
python -m dataflex_jax.train --config=configs/nice.py:lora --config.data.root=DIR --config.targets.root=MMLU/dev
python -m dataflex_jax.select --config=configs/nice.py:lora --checkpoint=RUN --output=selected.npz ...   # no training

The reward is `config.selector.reward`: a rule, such as token_f1, a function of your own, my_package.rewards:function,
or a reward model, hf:FOLDER_OR_ID; docs/algorithms.md has them. DIR and MMLU/dev are as of configs/less.py.
"""

from dataflex_jax.configs import selection


def get_config(variant: str = "quickstart"):
    return selection.get_config("nice", variant)
