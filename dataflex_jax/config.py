"""Validation of the configuration: unknown or impossible values are refused at start-up, with the accepted ones.

`configs/base.py` explains the fields; `CHECKS` says which values each one takes, `data.sources.table.check` what suits
a source.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dataflex_jax.data.sources import table as sources
from dataflex_jax.data.text.chat import BUILT_IN
from dataflex_jax.errors import InputError
from dataflex_jax.models.layout import LORA_MODULES
from dataflex_jax.policies.proportions import normalised
from dataflex_jax.policies.registry import KINDS, checked, load_plugins


class Check(NamedTuple):
    """What a field accepts, in words and as a predicate."""

    accepts: str
    test: Callable[[Any], bool]


def _is_int(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


def _integer(least: int) -> Check:
    return Check(f"an integer >= {least}", lambda x: _is_int(x) and x >= least)


def _number(low: float, high: float = math.inf, *, open_low: bool = False, open_high: bool = True) -> Check:
    words = f"a number {'>' if open_low else '>='} {low:g}"
    if high < math.inf:
        words += f" and {'<' if open_high else '<='} {high:g}"
    return Check(
        words,
        lambda x: (
            _is_number(x) and (x > low or (x == low and not open_low)) and (x < high or (x == high and not open_high))
        ),
    )


def _one_of(*values: str) -> Check:
    return Check("one of " + ", ".join(map(repr, values)), lambda x: x in values)


def _names_of(*values: str) -> Check:
    return Check(
        "a tuple of one or more of " + ", ".join(map(repr, values)),
        lambda x: isinstance(x, (tuple, list)) and len(x) > 0 and all(name in values for name in x),
    )


def _optional(check: Check) -> Check:
    return Check(f"{check.accepts}, or None", lambda x: x is None or check.test(x))


_TEXT = Check("a non-empty string", lambda x: isinstance(x, str) and x != "")
_BOOL = Check("True or False", lambda x: isinstance(x, bool))
_NAMES = Check(
    "a tuple of distinct non-empty strings",
    lambda x: isinstance(x, (tuple, list)) and all(map(_TEXT.test, x)) and len(set(x)) == len(x),
)
_LENGTHS = Check(
    "a tuple of increasing integers >= 1",
    lambda x: isinstance(x, (tuple, list)) and all(map(_integer(1).test, x)) and list(x) == sorted(set(x)) != [],
)
_MESH_AXIS = Check("an integer >= 1, or -1 for the rest", lambda x: _is_int(x) and (x >= 1 or x == -1))
_PROPORTIONS = Check(
    'a tuple of numbers, "uniform", a weights file (.json), or None for the natural ones',
    lambda x: (
        x is None
        or x == "uniform"
        or (isinstance(x, str) and x.endswith(".json"))
        or (isinstance(x, (tuple, list)) and len(x) > 0 and all(map(_is_number, x)))
    ),
)

CHECKS: dict[str, Check] = {
    "seed": _integer(0),
    "train_step": _integer(1),
    "log_every": _integer(1),
    "eval_every": _integer(0),
    "eval_rows": _integer(1),
    "evaluators": _NAMES,
    "checkpoint_every": _integer(1),
    "keep": _integer(1),
    "tensorboard": _BOOL,
    "wandb_project": _optional(_TEXT),
    "warmup_step": _integer(0),
    "update_step": _integer(1),
    "update_times": _integer(-1),
    "plugins": _NAMES,
    "model.name_or_path": _optional(_TEXT),
    "model.from_scratch": _BOOL,
    "model.architecture": _TEXT,
    "model.vocab_size": _optional(_integer(2)),
    "model.hidden_size": _optional(_integer(1)),
    "model.intermediate_size": _optional(_integer(1)),
    "model.num_hidden_layers": _optional(_integer(1)),
    "model.num_attention_heads": _optional(_integer(1)),
    "model.num_key_value_heads": _optional(_integer(1)),
    "model.head_dim": _optional(_integer(1)),
    "model.max_position_embeddings": _optional(_integer(1)),
    "model.rms_norm_eps": _optional(_number(0)),
    "model.rope_theta": _optional(_number(0, open_low=True)),
    "model.tie_word_embeddings": _optional(_BOOL),
    "model.initializer_range": _optional(_number(0, open_low=True)),
    "model.dtype": _one_of("bfloat16", "float32"),
    "model.param_dtype": _one_of("float32", "bfloat16"),
    "model.remat": _TEXT,
    "model.attention": _one_of("auto", "xla", "cudnn"),
    "model.trainable": _optional(_NAMES),
    "lora.rank": _integer(0),
    "lora.alpha": _optional(_number(0, open_low=True)),
    "lora.dropout": _number(0, 1),
    "lora.name_or_path": _optional(_TEXT),
    "lora.use_rslora": _BOOL,
    "lora.target_modules": _names_of(*LORA_MODULES, "all"),
    "lora.base_dtype": _one_of("bfloat16", "float32"),
    "data.source": _TEXT,
    "data.root": _optional(_TEXT),
    "data.domains": _optional(_NAMES),
    "data.domain_field": _optional(_TEXT),
    "data.domain_values": _optional(_NAMES),
    "data.hub_config": _optional(_TEXT),
    "data.hub_split": _TEXT,
    "data.text_field": _TEXT,
    "data.tokenizer": _optional(_TEXT),
    "data.eos_token": _optional(_TEXT),
    "data.begin_of_text": _optional(_BOOL),
    "data.seq_len": _integer(2),
    "data.batch_size": _integer(1),
    "data.grad_accumulation": _integer(1),
    "data.weigh_over": _one_of("batch", "microbatch"),
    "data.proportions": _PROPORTIONS,
    "data.valid_fraction": _number(0, 1),
    "data.draw": _one_of("systematic", "multinomial"),
    "data.lag": _integer(0),
    "data.cache_dir": _TEXT,
    "data.on_bad_record": _one_of("raise", "skip"),
    "data.formatting": _optional(_TEXT),
    "data.template": _optional(_one_of(*BUILT_IN)),
    "data.cutoff_len": _integer(2),
    "data.train_on_prompt": _BOOL,
    "data.mask_history": _BOOL,
    "data.packing": _BOOL,
    "data.buckets": _optional(_LENGTHS),
    "targets.source": _optional(_TEXT),
    "targets.root": _optional(_TEXT),
    "targets.domains": _optional(_NAMES),
    "targets.domain_field": _optional(_TEXT),
    "targets.domain_values": _optional(_NAMES),
    "targets.hub_config": _optional(_TEXT),
    "targets.hub_split": _TEXT,
    "targets.text_field": _TEXT,
    "targets.formatting": _optional(_TEXT),
    "targets.group_field": _optional(_TEXT),
    "targets.group_rows": _optional(_integer(1)),
    "sweep.batch_rows": _optional(_integer(1)),
    "optim.learning_rate": _number(0),
    "optim.schedule": _one_of("linear", "cosine", "wsd", "constant"),
    "optim.warmup_ratio": _number(0, 1),
    "optim.weight_decay": _number(0),
    "optim.b1": _number(0, 1),
    "optim.b2": _number(0, 1),
    "optim.eps": _number(0, open_low=True),
    "optim.clip_norm": _number(0),
    "mesh.data": _MESH_AXIS,
    "mesh.fsdp": _MESH_AXIS,
    "mesh.tensor": _MESH_AXIS,
}


def fields(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted names and values of all fields outside the policies' sections."""
    for name, value in config.items():
        if not prefix and name in KINDS:
            continue
        if isinstance(value, ConfigDict):
            yield from fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def validate(config: ConfigDict, *, data_is_read: bool = True) -> None:
    """Imports the plugins, and checks every field by itself and what the fields must be to each other.

    What depends on the data, the model or the devices is checked where these are opened.

    Args:
        config: of a run.
        data_is_read: whether the data that it names will be; otherwise they need not be named.

    Raises:
        InputError: names the field and what is accepted.
    """
    values = dict(fields(config))
    for name, value in values.items():
        if name not in CHECKS:
            raise InputError("unknown field; configs/base.py lists them all", option=name)
        if not CHECKS[name].test(value):
            raise InputError(f"must be {CHECKS[name].accepts}", option=name, value=value)
    if missing := sorted(CHECKS.keys() - values.keys()):
        raise InputError("missing; start the recipe from configs/base.py", option=missing[0])
    load_plugins(config.plugins)
    data = config.data
    if data_is_read:
        sources.check(data)
        if config.targets.source is not None:
            sources.check(config.targets, "targets")
    if config.lora.name_or_path is not None and config.lora.rank == 0:
        raise InputError(f"must be that of the adapter {config.lora.name_or_path!r}", option="lora.rank", value=0)
    if not config.model.from_scratch and config.model.name_or_path is None:
        reason = "needs config.model.name_or_path, a folder or a hub id"
        raise InputError(reason, option="model.from_scratch", value=False)
    if not config.model.from_scratch and (data.tokenizer or "").startswith("train:"):
        raise InputError(
            "pretrained weights (config.model.from_scratch = False) need the tokenizer that they were trained with, "
            f"such as {config.model.name_or_path!r}",
            option="data.tokenizer",
            value=data.tokenizer,
        )
    if data.batch_size % data.grad_accumulation:
        raise InputError(
            f"must be a multiple of config.data.grad_accumulation = {data.grad_accumulation}",
            option="data.batch_size",
            value=data.batch_size,
        )
    if (config.selector or config.order) and data.packing:
        reason = "a selector or an order needs one example a row; set it to False"
        raise InputError(reason, option="data.packing", value=True)
    if data.train_on_prompt and data.mask_history:
        reason = "not together with config.data.train_on_prompt; set one to False"
        raise InputError(reason, option="data.mask_history")
    if data.buckets is not None and data.buckets[-1] < data.cutoff_len - 1:
        raise InputError(
            f"the last one must hold config.data.cutoff_len = {data.cutoff_len} tokens, the first of which is not "
            "predicted",
            option="data.buckets",
            value=tuple(data.buckets),
        )
    if data.domains is not None and isinstance(data.proportions, (tuple, list)):
        checked("data", normalised, "proportions", data.proportions, len(data.domains))
    if [config.mesh[axis] for axis in config.mesh].count(-1) > 1:
        raise InputError("-1 (the rest) is accepted for one axis only", option="mesh")
