"""LESS (arXiv 2402.04333): train on the examples whose gradients point where the target set's point.

python -m dataflex_jax.train --config=configs/less.py                               # quickstart: a CPU, minutes
python -m dataflex_jax.train --config=configs/less.py:lora --config.data.root=DIR --config.targets.root=MMLU/dev
python -m dataflex_jax.select --config=configs/less.py:lora --checkpoint=RUN --output=selected.npz ...   # no training

`lora` takes the pool from DIR/dataset_info.json (LLaMA-Factory's format) and the targets from a folder of MMLU's csv
files, SUBJECT_dev.csv, each subject a group.
"""

from dataflex_jax.configs import selection


def get_config(variant: str = "quickstart"):
    return selection.get_config("less", variant)
