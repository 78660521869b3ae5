"""What the recipes that select examples share."""

from ml_collections import ConfigDict

from dataflex_jax.configs import base, sft
from dataflex_jax.errors import InputError

BY_INFLUENCE = ("less", "cluster_less", "icons", "nice")
MMLU_REWARD = {"reward": "multiple_choice", "max_new_tokens": 8}
WITH_TARGETS = (*BY_INFLUENCE, "near", "tsds", "rds", "dsir")


def get_config(selector: str, variant: str) -> ConfigDict:
    """A recipe with `selector`; "quickstart" or "lora", and further policies after commas."""
    name, policies = base.split(variant, "quickstart")
    variants = {"quickstart": quickstart, "lora": lora}
    if name not in variants:
        raise InputError(f"unknown variant {name!r} of the {selector} recipe; known: {', '.join(variants)}")
    config = base.get_config(f"selector={selector},{policies}")
    variants[name](config)
    if config.selector.name in BY_INFLUENCE:
        config.selector.proj_dim = 1024 if name == "quickstart" else 8192
    if config.selector.name == "coincide" and name == "quickstart":
        config.selector.num_clusters = 32
    if config.selector.name == "nice":
        rewarded = {"reward": "token_f1", "max_new_tokens": 32} if name == "quickstart" else MMLU_REWARD
        config.selector.update(**rewarded)
    if config.selector.name in WITH_TARGETS and name == "lora":
        config.targets.update(source="local", formatting="mmlu")
    return config


def quickstart(config: ConfigDict) -> None:
    """Adapters on a small random Qwen2, built-in questions; the targets are held-out ones, a group a dataset."""
    sft.quickstart(config)
    config.train_step = 120
    config.warmup_step = 40
    config.update_step = 20
    config.eval_every = 40
    config.lora.rank = 8
    config.lora.base_dtype = "float32"
    config.data.domains = ("purposes", "topics")
    config.data.valid_fraction = 0.05
    config.targets.group_rows = 32


def lora(config: ConfigDict) -> None:
    """Adapters on pretrained Qwen2.5-0.5B, or on another model.name_or_path."""
    sft.lora(config)
    config.warmup_step = 100
    config.update_step = 100
