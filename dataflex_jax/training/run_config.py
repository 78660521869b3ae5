"""A run folder's config.json: the resolved configuration and what it ran on."""

import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

import dataflex_jax
from dataflex_jax.errors import InputError
from dataflex_jax.files import JsonlWriter, replace_json
from dataflex_jax.foreign import read_object

# Fields that runs of version 0.1.0 may lack, and what they mean there.
_NEWER = {"evaluators": ("held_out",)}
_NEWER_OF_MODEL = {"trainable": None}
# Beside config.json: what it said in earlier starts of the run, a line each.
HISTORY = "config_history.jsonl"


def _git_revision() -> str | None:
    root = Path(dataflex_jax.__file__).parent.parent
    if not (root / ".git").exists():
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
    try:
        saved = json.loads(path.read_text())["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not the config.json of a run ({error})") from error
    config = ConfigDict(_with_tuples(saved))
    for section, newer in ((config, _NEWER), (config.model, _NEWER_OF_MODEL)):
        for name, value in newer.items():
            if name not in section:
                section[name] = value
    return config


def _with_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_tuples(field) for name, field in value.items()}
    return tuple(value) if isinstance(value, list) else value
