"""A run folder's config.json: the resolved configuration and what it ran on."""

import json
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

import dataflex_jax
from dataflex_jax import config as configuration
from dataflex_jax.errors import InputError, one_line
from dataflex_jax.files import replace_json
from dataflex_jax.foreign import read_object
from dataflex_jax.json_lines import JsonlWriter
from dataflex_jax.policies.registry import KINDS

# Fields that older runs may lack, by section, and what they mean there.
_NEWER: dict[str | None, dict[str, Any]] = {
    None: {
        "evaluators": ("held_out",),
        "eval_tasks": (),
        "eval_tasks_every": 0,
        "eval_num_fewshot": None,
        "eval_limit": None,
        "eval_include_path": None,
        "eval_mmlu_root": None,
        "epochs": None,
    },
    "model": {
        "trainable": None,
        "resize_vocab": False,
        "scan_layers": True,
        "num_experts": None,
        "num_experts_per_tok": None,
        "moe_intermediate_size": None,
        "shared_expert_intermediate_size": None,
        "norm_topk_prob": None,
        "router_aux_loss_coef": None,
        "router_z_loss_coef": None,
    },
    "data": {"verify": "sampled", "begin_of_text": False, "max_samples": None, "max_epochs": None, "weight_key": None},
    "mesh": {"expert": 1},
}
# Beside config.json: what it said in earlier starts of the run, a line each.
HISTORY = "config_history.jsonl"


def _git_revision() -> str | None:
    root = Path(dataflex_jax.__file__).parent.parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    result = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


def resolved(config: ConfigDict) -> dict[str, Any]:
    """The content of the run folder's config.json: the configuration and what it ran on."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {
        "config": config.to_dict(),
        "versions": {
            "dataflex_jax": dataflex_jax.__version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in packages},
        },
        "devices": {"kind": jax.devices()[0].device_kind, "count": jax.device_count(), "hosts": jax.process_count()},
        "git_revision": _git_revision(),
    }


def write(config: ConfigDict, path: Path, step: int = 0) -> None:
    """Writes config.json, and to `HISTORY` what it said before, if that was another configuration.

    Args:
        config: of this start.
        path: of the file.
        step: steps done with the configurations before; 0: none was, or what it was is not known.
    """
    new = resolved(config)
    if step:
        old = read_object(path)
        if old["config"] != json.loads(json.dumps(new["config"])):
            with JsonlWriter(path.with_name(HISTORY)) as history:
                history.write({"until_step": step, **old})
    replace_json(path, new, indent=2)


def read(run_folder: Path) -> ConfigDict:
    """The configuration of a run, from its config.json.

    Raises:
        InputError: there is none, or it is not what a run writes.
    """
    path = run_folder / "config.json"
    saved = read_object(path).get("config")
    if not isinstance(saved, dict):
        raise InputError(f'{path}: not the config.json of a run, it has no object "config"')
    for name, newer in _NEWER.items():
        section = saved if name is None else saved.get(name)
        if isinstance(section, dict):
            section.update({field: value for field, value in newer.items() if field not in section})
    _check(path, saved)
    return ConfigDict(_with_tuples(saved))


def _check(path: Path, saved: dict[str, Any]) -> None:
    """Refuses what no run has written, field by field."""
    for name, check in configuration.CHECKS.items():
        value: Any = saved
        for field in name.split("."):
            if not isinstance(value, dict) or field not in value:
                raise InputError(f"{path}: not the config.json of a run, its config has no {name}")
            value = value[field]
        if not check.test(value):
            raise InputError(f"{path}: config.{name} is {one_line(repr(value), 100)}; a run has {check.accepts}")
    for kind in KINDS:
        section = saved.get(kind)
        if section is not None and not isinstance(section, dict):
            raise InputError(f"{path}: config.{kind} is {one_line(repr(section), 100)}; a run has an object, or null")


def _with_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_tuples(field) for name, field in value.items()}
    return tuple(value) if isinstance(value, list) else value
