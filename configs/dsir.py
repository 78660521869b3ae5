"""DSIR (arXiv 2302.03169): train on examples whose words are those of the target set; no model is asked.

python -m dataflex_jax.train --config=configs/dsir.py                               # quickstart: a CPU, minutes
python -m dataflex_jax.train --config=configs/dsir.py:lora --config.data.root=DIR --config.targets.root=MMLU/dev
python -m dataflex_jax.select --config=configs/dsir.py --output=selected.npz --records=selected.jsonl ...  # no training
"""

from dataflex_jax.configs import selection


def get_config(variant: str = "quickstart"):
    return selection.get_config("dsir", variant)
