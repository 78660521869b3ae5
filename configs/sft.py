"""Instruction tuning: the loss is on the responses only.

python -m dataflex_jax.train --config=configs/sft.py                       # quickstart: a CPU, minutes
python -m dataflex_jax.train --config=configs/sft.py:quickstart,mixer=odm  # and mix the datasets while training
python -m dataflex_jax.train --config=configs/sft.py:local --config.data.root=DIR --config.data.domains="('alpaca_en',)"

`local` reads the datasets of DIR/dataset_info.json, as LLaMA-Factory has it; --config.data.source=local or hub with
--config.data.formatting=alpaca, sharegpt, openai or pairs reads files and datasets without one.
"""

from configs import base, scales
from dataflex_jax.errors import InputError


def get_config(variant: str = "quickstart"):
    name, *policies = variant.split(",")
    variants = {"quickstart": quickstart, "local": local}
    if name not in variants:
        raise InputError(f"unknown variant {name!r} of the sft recipe; known: {', '.join(variants)}")
    config = base.get_config(",".join(policies))
    variants[name](config)
    return config


def quickstart(config):
    """A small random Qwen2 on questions about the Python installation."""
    scales.quickstart(config)
    config.data.update(formatting="alpaca", cutoff_len=192, buckets=(64, 128, 192))


def local(config):
    """The same model on the datasets of a folder with dataset_info.json, given by --config.data.root."""
    quickstart(config)
    config.data.update(source="dataset_info", formatting=None, tokenizer="train:4096", cutoff_len=512, buckets=None)
