"""A swarm of small models that differ by their mixtures, all trained as one program: which mixture to train on.

python -m dataflex_jax.swarm --config=configs/swarm.py --runs=24 --verify=4 --output=runs/swarm   # a CPU, minutes
python -m dataflex_jax.swarm --config=configs/swarm.py:local --config.data.root=DIR --output=runs/swarm

A model of the swarm trains alone with `python -m dataflex_jax.train --config=configs/swarm.py`.
"""

from ml_collections import ConfigDict

from dataflex_jax.configs import base
from dataflex_jax.errors import InputError


def get_config(variant: str = "quickstart") -> ConfigDict:
    scales = {"quickstart": quickstart, "local": local}
    scale, policies = base.split(variant, "quickstart")
    if scale not in scales:
        raise InputError(f"unknown variant {scale!r} of the swarm recipe; known: {', '.join(scales)}")
    config = base.get_config(policies)
    scales[scale](config)
    return config


def quickstart(config: ConfigDict) -> None:
    """A model of 0.2 M parameters on text of the running Python installation."""
    config.train_step = 150
    config.log_every = 10
    config.eval_rows = 32
    config.checkpoint_every = 50
    config.model.update(
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        initializer_range=0.06,
        dtype="float32",
        remat="none",
    )
    config.data.update(tokenizer="train:1024", seq_len=128, batch_size=8, valid_fraction=0.05)
    config.optim.update(learning_rate=6e-3, warmup_ratio=0.1)


def local(config: ConfigDict) -> None:
    """A model of 1 M parameters on a folder of NAME.jsonl files, a domain each, given by --config.data.root."""
    quickstart(config)
    config.train_step = 500
    config.eval_rows = 128
    config.model.update(hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4)
    config.model.num_key_value_heads = 2
    config.data.update(source="local", tokenizer="train:4096", seq_len=256, batch_size=16)
