"""Runs that take seconds with policies that weight the loss, by name; see tests/tiny.py."""

from pathlib import Path

from ml_collections import ConfigDict

from dataflex_jax.policies import registry
from dataflex_jax.train import train_and_evaluate
from tests import tiny


def config(root: Path, mixer: str | None = None, weighter: str | None = None, **fields) -> ConfigDict:
    """8 steps of a one-layer model with policies by name ("loss+adapt" for two weighters); `fields` as in tiny.py."""
    made = tiny.config(root, mixer)
    made.train_step, made.warmup_step, made.update_step, made.eval_rows = 8, 0, 1, 2
    made.model.update(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    made.data.seq_len = 16
    if weighter is not None and "+" in weighter:
        made.weighter = ConfigDict({name: registry.policy_config("weighter", name) for name in weighter.split("+")})
    elif weighter is not None:
        made.weighter = registry.policy_config("weighter", weighter)
    for name, value in fields.items():
        *path, field = name.split("__")
        section = made
        for part in path:
            section = section[part]
        section[field] = value
    return made


def train(folder: Path, root: Path, mixer: str | None = None, weighter: str | None = None, **fields) -> Path:
    """Runs `config` to its end in `folder`, which it returns."""
    train_and_evaluate(config(root, mixer, weighter, **fields), folder)
    return folder
