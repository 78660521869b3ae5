"""Examples drawn by how much their loss has fallen.

python -m dataflex_jax.train --config=configs/delta_loss.py                               # quickstart: a CPU, minutes
python -m dataflex_jax.train --config=configs/delta_loss.py:lora --config.data.root=DIR
"""

from dataflex_jax.configs import selection


def get_config(variant: str = "quickstart"):
    return selection.get_config("delta_loss", variant)
