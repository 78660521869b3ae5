"""Hugging Face's config.json, in and out."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dataflex_jax.errors import InputError
from dataflex_jax.models import families
from dataflex_jax.models.checks import check_choice, check_positive, shown
from dataflex_jax.models.config import EXPERT_FIELDS, LARGEST, REQUIRED, ModelConfig, RopeScaling
from dataflex_jax.models.hf import folders

_ROPE_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_OF_MIXTURES = {"num_local_experts": "num_experts"}  # as transformers 5 writes it for some, whatever they read
# Of `ModelConfig`: what has another form in a config.json, or no place there.
_OWN_FORM = ("dtype", "rope_theta", "rope_scaling", "sliding_window")
_OURS = (
    *("architecture", "qk_norm", "sliding_window", "router_z_loss_coef"),
    *("dtype", "param_dtype", "remat", "scan_layers", "attention", "lora"),
)


def read_shape(folder: Path) -> dict[str, Any]:
    """The contents of a model's config.json, from which `from_hf` makes a configuration.

    Raises:
        InputError: there is none, it cannot be read, or `from_hf` refuses it; names the file.
    """
    shape = folders.read_config(folder)
    with folders.naming(folder / folders.CONFIG):
        from_hf(shape)
    return shape


def from_hf(hf: Mapping[str, Any], **overrides: Any) -> ModelConfig:
    """Reads the contents of a Hugging Face config.json, with either spelling of the rotary settings.

    Args:
        hf: the parsed config.json; absent fields take Hugging Face's defaults for the model type.
        **overrides: fields of `ModelConfig` that replace what was read, such as dtype="float32" or remat="dots".

    Returns:
        The configuration.

    Raises:
        InputError: a model type, activation, rotary type or other field whose maths this decoder does not compute.
    """
    hf = in_our_names(hf)
    family = families.family(hf.get("model_type"), "model_type")
    for name in REQUIRED:
        if hf.get(name) is None:
            raise InputError(f"model config has no {name}: give a positive integer")
        check_positive(name, hf[name], int, LARGEST[name])
    for name, accepted in family.neutral.items():
        if name in hf and hf[name] is not None:
            check_choice(name, hf[name], accepted)
    fields = dict(family.defaults)
    for field in dataclasses.fields(ModelConfig):
        if hf.get(field.name) is not None and field.name not in (*_OWN_FORM, *_OURS):
            fields[field.name] = hf[field.name]
    fields["architecture"] = family.name
    fields["rope_theta"], fields["rope_scaling"] = _read_rope(hf, family.defaults.get("rope_theta", 10000.0))
    fields["sliding_window"] = family.window.read(hf)
    if isinstance(overrides.get("rope_scaling"), Mapping):
        overrides["rope_scaling"] = _read_rope({"rope_scaling": overrides["rope_scaling"]}, 0.0)[1]
    return ModelConfig(**(fields | overrides))


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The config.json contents from which Hugging Face builds this model (rope_theta / rope_scaling spelling)."""
    family = config.family
    hf = {k: v for k, v in dataclasses.asdict(config).items() if k not in _OURS}
    hf = {"model_type": family.name, "architectures": [family.hf_class]} | hf
    for name in EXPERT_FIELDS:
        if name in hf and hf[name] is None:
            del hf[name]
    hf["torch_dtype"] = config.param_dtype
    if config.rope_scaling is not None:
        hf["rope_scaling"] = {"rope_type": "llama3", **hf["rope_scaling"]}
    if family.attention_bias is not None:
        del hf["attention_bias"]
    hf |= family.window.write(config.sliding_window, config.num_hidden_layers)
    return {family.names.get(name, name): value for name, value in hf.items()}


def in_our_names(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config.json by the names that `ModelConfig` gives them.

    Raises:
        InputError: a model type that is not registered, or a field that is there under two names with two values.
    """
    family = families.family(hf.get("model_type"), "model_type")
    ours = {theirs: name for name, theirs in family.names.items()}
    if family.experts is not None:
        ours |= _OF_MIXTURES
        for theirs, name in _OF_MIXTURES.items():
            if theirs in hf and hf.get(name, hf[theirs]) != hf[theirs]:
                raise InputError(f"model {name}={shown(hf[name])} and {theirs}={shown(hf[theirs])}: must be the same")
    return {ours.get(name, name): value for name, value in hf.items()}


def _read_rope(hf: Mapping[str, Any], default_theta: float) -> tuple[float, RopeScaling | None]:
    """(rope_theta, scaling) from rope_parameters (transformers 5) or from rope_theta and rope_scaling (before)."""
    name = "rope_parameters" if hf.get("rope_parameters") else "rope_scaling"
    rope = hf.get(name) or {}
    if not isinstance(rope, Mapping):
        raise InputError(f"model {name}={shown(rope)}: must be an object with the rotary settings")
    theta = rope.get("rope_theta", hf.get("rope_theta"))
    if theta is None:
        theta = default_theta
    else:
        check_positive("rope_theta", theta, float)
    for kind in ("rope_type", "type"):
        if kind in rope:
            check_choice(f"{name}.{kind}", rope[kind], ("default", "llama3"))
    if rope.get("partial_rotary_factor") is not None:
        check_choice(f"{name}.partial_rotary_factor", rope["partial_rotary_factor"], (1,))
    scaled = rope.get("rope_type", rope.get("type", "default")) == "llama3"
    scaling = {key: value for key, value in rope.items() if key not in _ROPE_KEYS}
    accepted = [field.name for field in dataclasses.fields(RopeScaling)] if scaled else []
    for key in scaling:
        check_choice(f"{name} field", key, accepted or ["rope_type", "rope_theta"])
    for key in accepted:
        if key not in scaling:
            raise InputError(f"model {name} of type 'llama3' has no {key}: give a positive number")
    return float(theta), RopeScaling(**scaling) if scaled else None
