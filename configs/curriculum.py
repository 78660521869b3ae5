"""Curricula: the examples in the order of a score.

python -m dataflex_jax.train --config=configs/curriculum.py                           # quickstart: easy to hard, a CPU
python -m dataflex_jax.train --config=configs/curriculum.py:quickstart,order=zigzag   # sorting, folding, segment ...
python -m dataflex_jax.train --config=configs/curriculum.py:lora --config.data.root=DIR --config.order.scores=FILE

The score is the model's loss (--config.order.scores=loss), a field of the record (field:NAME), a .npy or .jsonl file
with one score a candidate, or "selector" with a selector, `:quickstart,order=sorting,selector=less`.
--config.order.dynamic=True takes it anew at each update.
"""

from dataflex_jax.configs import base, selection
from dataflex_jax.errors import InputError


def get_config(variant: str = "quickstart"):
    name, policies = base.split(variant, "quickstart")
    variants = {"quickstart": selection.quickstart, "lora": selection.lora}
    if name not in variants:
        raise InputError(f"unknown variant {name!r} of the curriculum recipe; known: {', '.join(variants)}")
    config = base.get_config(f"order=sorting,{policies}")
    variants[name](config)
    return config
