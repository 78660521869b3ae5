"""YAML files like those of DataFlex and LLaMA-Factory, and the configurations that become of them."""

from pathlib import Path
from types import ModuleType

import yaml
from ml_collections import ConfigDict

from dataflex_jax import config as configuration
from dataflex_jax.moving.conversion import Converted, converted
from dataflex_jax.policies.active import active_policies

COMPONENTS = {  # each with parameters as DataFlex 1.1.0 ships them
    "selectors": {
        "less": {"cache_dir": "c", "gradient_type": "adam", "proj_dim": 4096, "seed": 123, "save_interval": 16},
        "icons": {"gradient_type": "adam", "proj_dim": 4096, "seed": 123, "task_boundaries": None},
        "cluster_less": {
            "proj_dim": 4096,
            "seed": 42,
            "cluster_size": 64,
            "samples_per_cluster": 4,
            "clustering_batch_size": 8,
            "clustering_max_iter": 10,
            "clustering_method": "kmeans",
            "representative_strategy": "random",
            "embedding_model_name_or_path": None,
            "embedding_model_dtype": "auto",
            "embedding_layer": -1,
        },
        "coincide": {"num_clusters": 10000},
        "nice": {"mc_samples": 4},
        "loss": {"cache_dir": "c", "focus": "medium", "score_batch_size": 8},
        "delta_loss": {"window_size": 0.2, "score_batch_size": 8},
        "tsds": {"probs_path": "p.npy"},
        "near": {"indices_path": "i.npy"},
        "random": {"seed": 42, "replacement": False},
        "custom": {"cache_dir": "c"},
    },
    "mixers": {
        "random": {"seed": 42},
        "doremi": {"reference_model_path": "ref", "reweight_eta": 0.1, "reweight_eps": 0.01},
        "static": {"proportions": [0.5, 0.5]},
        "odm": {
            "alpha": 0.9,
            "warmup_steps": 2000,
            "reward_scale": 15.0,
            "min_exploration_rate": 0.03,
            "initial_proportions": [0.5, 0.5],
        },
        "dynamic_moe": {"eta": 10.0},
    },
    "weighters": {
        "loss": {"strategy": "linupper", "delta": 1.0},
        "adapt": {"tau": 1.0, "refresh_interval": 50, "anchor_batch_size": 8, "clip": None},
        "joint_update_aware": {
            "beta": 0.1,
            "tau": 0.05,
            "fixed_point_iters": 5,
            "damping": 1.0,
            "target_update_step": 50,
            "target_batch_size": 1,
            "target_num_batches": 1,
            "embed_normalize": True,
            "pooling": "last_token",
            "embed_layer": -1,
            "objective_mode": "full",
        },
        "custom": {"strategy": "uniform"},
    },
    "reorders": {
        name: {
            "kind": "static",
            "pattern": name,
            "apply_at": "raw",
            "polarity": "higher_later",
            "window_size": 0,
            "seed": 42,
            "pattern_params": params,
            "score_source": "precomputed",
            "score_params": {"score_field": "quality"},
        }
        for name, params in {
            "sorting": None,
            "shuffle": None,
            "segment": {"x_pct": 10, "y_pct": 10, "front_is_high": False, "back_is_high": True},
            "folding": {"layers": 3},
            "zigzag": {"layers": 3},
            "stair": {"num_sections": 2, "folding_ratio": 0.225, "layers": 3},
            "saw": {"num_sections": 3, "folding_ratio": 0.075, "layers": 2},
        }.items()
    }
    | {
        "dynamic_saw": {
            "kind": "dynamic",
            "pattern": "saw",
            "polarity": "higher_later",
            "pattern_params": {"num_sections": 3, "folding_ratio": 0.075, "layers": 2},
            "score_source": "model_loss",
            "score_params": {"batch_size": 8, "num_workers": 2, "max_samples": 20000},
            "reorder_every": 3,
            "consume_once": True,
        },
        "reuse_selector_scores": {
            "kind": "dynamic",
            "pattern": "saw",
            "score_source": "cached_selection",
            "score_params": {"cache_path": "step_10.json", "metric_key": "loss"},
        },
    },
    "pipelines": {
        "hierarchical": {
            "cache_dir": "c",
            "stages": [
                {"family": "selector", "component": "loss", "mode": "filter", "keep_ratio": 0.5, "every": 200},
                {"family": "mixer", "component": "odm", "every": 50},
            ],
        },
        "all_of_them": {
            "stages": [
                {"family": "selector", "component": "less", "mode": "draw", "warmup_step": 10, "every": 20},
                {"family": "mixer", "component": "random", "every": 50},
                {"family": "reorder", "component": "dynamic_saw", "every": 5},
                {"family": "weighter", "component": "loss", "warmup_step": 10},
                {"family": "weighter", "component": "adapt"},
                {"family": "weighter", "component": "custom", "enabled": False},
            ],
        },
        "select_only": {"stages": [{"family": "selector", "component": "loss", "mode": "draw", "every": 1}]},
    },
}

SFT = {
    "model_name_or_path": "Qwen/Qwen2.5-0.5B",
    "trust_remote_code": True,
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_target": "all",
    "lora_rank": 16,
    "lora_alpha": 8,
    "dataset": "a,b",
    "dataset_dir": "data",
    "template": "qwen",
    "cutoff_len": 1024,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "learning_rate": 1.0e-4,
    "num_train_epochs": 1.0,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "bf16": True,
    "ddp_timeout": 180000000,
}
DYNAMIC = {"components_cfg_file": "components.yaml", "warmup_step": 10, "update_step": 20, "update_times": 2}


def write_components(folder: Path) -> Path:
    """A components.yaml with all of `COMPONENTS`."""
    buckets = {
        bucket: {name: {"name": name, "params": params} for name, params in components.items()}
        for bucket, components in COMPONENTS.items()
    }
    path = folder / "components.yaml"
    path.write_text(yaml.safe_dump(buckets))
    return path


def write(folder: Path, fields: dict) -> Path:
    """A file of fields, of which ... are left out."""
    path = folder / "run.yaml"
    path.write_text(
        yaml.safe_dump({name: value for name, value in fields.items() if value is not ...}, sort_keys=False)
    )
    return path


def sft(folder: Path, devices: int | None = None, **fields) -> Converted:
    """What `SFT` with other fields is converted to."""
    return converted(write(folder, SFT | fields), devices=devices)


def configuration_of(recipe: Converted, variant: str = "") -> ConfigDict:
    """The configuration of a recipe, which a run could begin with."""
    module = ModuleType("recipe")
    exec(compile(recipe.text, "recipe.py", "exec"), module.__dict__)
    config = module.get_config(variant)
    configuration.validate(config)
    active_policies(config)
    return config
