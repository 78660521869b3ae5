"""Instruction tuning: the loss is on the responses only.

python -m dataflex_jax.train --config=configs/sft.py                       # quickstart: a CPU, minutes
python -m dataflex_jax.train --config=configs/sft.py:quickstart,mixer=odm  # and mix the datasets while training
python -m dataflex_jax.train --config=configs/sft.py:local --config.data.root=DIR
python -m dataflex_jax.train --config=configs/sft.py:lora --config.data.root=DIR [--config.model.name_or_path=...]

`local` and `lora` read the datasets of DIR/dataset_info.json, in LLaMA-Factory's format; --config.data.source=local or
hub with --config.data.formatting=alpaca, sharegpt, openai or pairs reads files and datasets without one, and with
--config.data.formatting=mmlu the benchmark's folders of csv files.
"""

from dataflex_jax.configs import base, scales
from dataflex_jax.errors import InputError


def get_config(variant: str = "quickstart"):
    name, policies = base.split(variant, "quickstart")
    variants = {"quickstart": quickstart, "local": local, "lora": lora}
    if name not in variants:
        raise InputError(f"unknown variant {name!r} of the sft recipe; known: {', '.join(variants)}")
    config = base.get_config(policies)
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


def lora(config):
    """Adapters on pretrained Qwen2.5-0.5B, or on another model.name_or_path."""
    config.train_step = 1000
    config.eval_every = config.checkpoint_every = 200
    config.model.update(name_or_path="Qwen/Qwen2.5-0.5B", from_scratch=False)
    config.lora.rank = 16
    config.data.update(source="dataset_info", cutoff_len=2048, batch_size=64)
    config.optim.update(learning_rate=2e-4)
