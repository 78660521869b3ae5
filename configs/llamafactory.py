"""What LLaMA-Factory and its trainer do where a YAML file says nothing: `dataflex_jax.convert` writes recipes on top.

docs/coming_from_dataflex.md shows one.
"""

from ml_collections import ConfigDict

from dataflex_jax.configs import base


def get_config(variant: str = "") -> ConfigDict:
    """Adapters on `model.name_or_path`, three epochs of the datasets in data/dataset_info.json."""
    config = base.get_config(base.split(variant, "")[1])
    config.update(train_step=None, epochs=3.0)
    config.model.update(from_scratch=False, dtype="float32")
    config.lora.update(rank=8, base_dtype="float32")
    config.data.update(source="dataset_info", root="data", valid_fraction=0.0)
    config.optim.update(learning_rate=5e-5, schedule="linear", warmup_ratio=0.0, weight_decay=0.0, b2=0.999)
    return config


def tune(config: ConfigDict, kind: str, name: str, **hyperparameters) -> None:
    """Sets hyperparameters of a policy, unless a variant has put another one into its place."""
    section = config[kind]
    section = section and section.get(name, section)  # of several weighters
    if section and section.get("name") == name:
        section.update(hyperparameters)
