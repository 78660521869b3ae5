"""Online Data Mixing (arXiv 2312.02406).

python -m dataflex_jax.train --config=configs/odm.py                                  # quickstart: a CPU, minutes
python -m dataflex_jax.train --config=configs/odm.py:local --config.data.root=DIR     # a domain a JSONL file
python -m dataflex_jax.train --config=configs/odm.py:slimpajama-6b                    # Qwen2.5-1.5B on GPUs
python -m dataflex_jax.train --config=configs/odm.py:slimpajama-30b --config.data.root=DIR
"""

from dataflex_jax.configs import scales


def get_config(variant: str = "quickstart"):
    return scales.get_config("odm", variant)
