"""Mixing by router load (arXiv 2406.11256), on a mixture of experts.

python -m dataflex_jax.train --config=configs/dynamic_moe.py           # quickstart: a tiny random OLMoE, a CPU, minutes
python -m dataflex_jax.train --config=configs/dynamic_moe.py:local --config.data.root=DIR
"""

from dataflex_jax.configs import base, scales
from dataflex_jax.errors import InputError

SCALES = ("quickstart", "local")


def get_config(variant: str = "quickstart"):
    scale, _ = base.split(variant, "quickstart")
    if scale not in SCALES:
        raise InputError(f"unknown variant {scale!r} of the dynamic_moe recipe; known: {', '.join(SCALES)}")
    config = scales.get_config("dynamic_moe", variant)
    config.update_step = 10
    config.model.update(
        architecture="olmoe", intermediate_size=128, num_experts=8, num_experts_per_tok=2, tie_word_embeddings=False
    )
    return config
