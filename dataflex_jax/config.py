"""Validation of the configuration: unknown or impossible values are refused at start-up, with the accepted ones.

`configs/base.py` explains the fields; `CHECKS` says which values each one takes, `data.sources.table.check` what suits
a source, the signatures of policies' factories (`policies.registry`) what their hyperparameters take.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dataflex_jax.data.sources import table as sources
from dataflex_jax.data.text.chat import BUILT_IN
from dataflex_jax.errors import InputError
from dataflex_jax.files import expanded
from dataflex_jax.models.config import ATTENTION_IMPLEMENTATIONS, DTYPES, LARGEST, REMAT_POLICIES
from dataflex_jax.models.hf.resolve import model_config
from dataflex_jax.models.layout import LORA_MODULES
from dataflex_jax.policies import options
from dataflex_jax.policies.active import weighter_sections
from dataflex_jax.policies.proportions import normalised
from dataflex_jax.policies.registry import KINDS, checked, is_module_name, load_plugins


class Check(NamedTuple):
    """What a field accepts, in words and as a predicate."""

    accepts: str
    test: Callable[[Any], bool]


_MOST = options.LARGEST_INT
_MOST_TOKENS = 2**24  # of a row


def _integer(least: int, most: int = _MOST) -> Check:
    return Check(
        f"an integer >= {least} and {'< 2**31' if most == _MOST else f'<= {most}'}",
        lambda x: options.is_integer(x) and least <= x <= most,
    )


def _number(low: float, high: float = options.LARGEST_NUMBER, *, open_low: bool = False) -> Check:
    return Check(
        f"a number {'>' if open_low else '>='} {low:g} and {'<=' if high == options.LARGEST_NUMBER else '<'} {high:g}",
        lambda x: options.is_number(x) and (x > low or (x == low and not open_low)) and x < high,
    )


def _one_of(*values: str) -> Check:
    return Check("one of " + ", ".join(map(repr, values)), lambda x: isinstance(x, str) and x in values)


def _tuple_of(words: str, of: Callable[[Any], bool], *, empty: bool = True) -> Check:
    def test(x: Any) -> bool:
        return isinstance(x, tuple | list) and (empty or len(x) > 0) and all(map(of, x)) and len(set(x)) == len(x)

    return Check(f"a tuple of {'' if empty else 'one or more '}{words}", test)


def _optional(check: Check) -> Check:
    return Check(f"{check.accepts}, or None", lambda x: x is None or check.test(x))


def _is_text(x: Any) -> bool:
    """Whether it can name a file, a field or a domain."""
    if not isinstance(x, str) or x == "" or "\0" in x:
        return False
    try:
        os.fsencode(x)
    except UnicodeEncodeError:
        return False
    return True


def _is_proportions(x: Any) -> bool:
    if isinstance(x, Mapping | ConfigDict):
        return len(x) > 0 and all(map(options.is_number, x.values()))
    if isinstance(x, str):
        return x == "uniform" or (x.endswith(".json") and _is_text(x))
    if not isinstance(x, tuple | list) or len(x) == 0:
        return x is None
    return all(map(options.is_number, x)) or all(
        isinstance(pair, tuple | list) and len(pair) == 2 and _is_text(pair[0]) and options.is_number(pair[1])
        for pair in x
    )


def _is_max_epochs(x: Any) -> bool:
    if isinstance(x, Mapping | ConfigDict):
        x = tuple(x.items())
    if not isinstance(x, tuple | list):
        return x is None or _EPOCHS.test(x)
    numbers = [each[1] if isinstance(each, tuple | list) and len(each) == 2 else each for each in x]
    return len(x) > 0 and all(map(_EPOCHS.test, numbers)) and len({isinstance(each, tuple | list) for each in x}) == 1


_EPOCHS = _number(0, open_low=True)
_MAX_EPOCHS = Check("a number > 0, a tuple of one for each domain, numbers by domain, or None", _is_max_epochs)
_TEXT = Check("a non-empty string", _is_text)
_BOOL = Check("True or False", lambda x: isinstance(x, bool))
_NAMES = _tuple_of("distinct non-empty strings", _is_text)
_SOME_NAMES = _tuple_of("distinct non-empty strings", _is_text, empty=False)
_MODULES = _tuple_of("distinct names of modules, such as 'my_package.my_mixer'", is_module_name)
_LENGTH = _integer(2, _MOST_TOKENS)
_LENGTHS = Check(
    f"a tuple of increasing integers >= 1 and <= {_MOST_TOKENS}",
    lambda x: (
        isinstance(x, tuple | list) and all(map(_integer(1, _MOST_TOKENS).test, x)) and list(x) == sorted(set(x)) != []
    ),
)
_MESH_AXIS = Check("an integer >= 1, or -1 for the rest", lambda x: options.is_integer(x) and (x >= 1 or x == -1))
_PROPORTIONS = Check(
    'a tuple of numbers, "uniform", a weights file (.json), numbers by domain, or None for the natural ones',
    _is_proportions,
)
_SEED = Check("an integer >= 0 and < 2**63", lambda x: type(x) is int and 0 <= x < 2**63)
_LORA_MODULES = Check(
    "a tuple of one or more of " + ", ".join(map(repr, (*LORA_MODULES, "all"))),
    lambda x: isinstance(x, tuple | list) and len(x) > 0 and all(name in (*LORA_MODULES, "all") for name in x),
)

CHECKS: dict[str, Check] = {
    "seed": _SEED,
    "train_step": _optional(_integer(1)),
    "epochs": _optional(_number(0, open_low=True)),
    "log_every": _integer(1),
    "eval_every": _integer(0),
    "eval_rows": _integer(1),
    "evaluators": _NAMES,
    "eval_tasks": _NAMES,
    "eval_tasks_every": _integer(0),
    "eval_num_fewshot": _optional(_integer(0)),
    "eval_limit": _optional(_number(0, open_low=True)),
    "eval_include_path": _optional(_TEXT),
    "eval_mmlu_root": _optional(_TEXT),
    "checkpoint_every": _integer(1),
    "keep": _integer(1),
    "tensorboard": _BOOL,
    "wandb_project": _optional(_TEXT),
    "warmup_step": _integer(0),
    "update_step": _integer(1),
    "update_times": _integer(-1),
    "plugins": _MODULES,
    "model.name_or_path": _optional(_TEXT),
    "model.from_scratch": _BOOL,
    "model.resize_vocab": _BOOL,
    "model.architecture": _TEXT,
    "model.vocab_size": _optional(_integer(2, 2**26)),
    **{f"model.{name}": _optional(_integer(1, most)) for name, most in LARGEST.items() if name != "vocab_size"},
    "model.max_position_embeddings": _optional(_integer(1)),
    "model.rms_norm_eps": _optional(_number(0, open_low=True)),
    "model.rope_theta": _optional(_number(0, open_low=True)),
    "model.tie_word_embeddings": _optional(_BOOL),
    "model.norm_topk_prob": _optional(_BOOL),
    **dict.fromkeys(("model.router_aux_loss_coef", "model.router_z_loss_coef"), _optional(_number(0))),
    "model.initializer_range": _optional(_number(0, open_low=True)),
    "model.dtype": _one_of(*DTYPES),
    "model.param_dtype": _one_of(*DTYPES),
    "model.remat": _one_of(*REMAT_POLICIES),
    "model.scan_layers": _BOOL,
    "model.attention": _one_of(*ATTENTION_IMPLEMENTATIONS),
    "model.trainable": _optional(_SOME_NAMES),
    "lora.rank": _integer(0, 2**16),
    "lora.alpha": _optional(_number(0, open_low=True)),
    "lora.dropout": _number(0, 1),
    "lora.name_or_path": _optional(_TEXT),
    "lora.use_rslora": _BOOL,
    "lora.target_modules": _LORA_MODULES,
    "lora.base_dtype": _one_of(*DTYPES),
    "data.source": _TEXT,
    "data.root": _optional(_TEXT),
    "data.domains": _optional(_SOME_NAMES),
    "data.domain_field": _optional(_TEXT),
    "data.domain_values": _optional(_SOME_NAMES),
    "data.max_samples": _optional(_integer(1)),
    "data.hub_config": _optional(_TEXT),
    "data.hub_split": _TEXT,
    "data.text_field": _TEXT,
    "data.tokenizer": _optional(_TEXT),
    "data.eos_token": _optional(_TEXT),
    "data.begin_of_text": _optional(_BOOL),
    "data.seq_len": _LENGTH,
    "data.batch_size": _integer(1),
    "data.grad_accumulation": _integer(1),
    "data.weigh_over": _one_of("batch", "microbatch"),
    "data.proportions": _PROPORTIONS,
    "data.max_epochs": _MAX_EPOCHS,
    "data.valid_fraction": _number(0, 1),
    "data.draw": _one_of("systematic", "multinomial"),
    "data.lag": _integer(0),
    "data.cache_dir": _TEXT,
    "data.verify": _one_of("size", "sampled", "content"),
    "data.on_bad_record": _one_of("raise", "skip"),
    "data.formatting": _optional(_TEXT),
    "data.template": _optional(_one_of(*BUILT_IN)),
    "data.cutoff_len": _LENGTH,
    "data.train_on_prompt": _BOOL,
    "data.mask_history": _BOOL,
    "data.weight_key": _optional(_TEXT),
    "data.packing": _BOOL,
    "data.buckets": _optional(_LENGTHS),
    "targets.source": _optional(_TEXT),
    "targets.root": _optional(_TEXT),
    "targets.domains": _optional(_SOME_NAMES),
    "targets.domain_field": _optional(_TEXT),
    "targets.domain_values": _optional(_SOME_NAMES),
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
    "mesh.expert": _MESH_AXIS,
    "mesh.tensor": _MESH_AXIS,
}


# Fields with paths, in which `~` and environment variables are expanded; policies' are found by their values.
PATHS = (
    "eval_include_path",
    "eval_mmlu_root",
    "model.name_or_path",
    "lora.name_or_path",
    "data.root",
    "data.tokenizer",
    "data.cache_dir",
    "data.proportions",
    "targets.root",
)
_NO_PATHS = ("target_prefix",)  # hyperparameters that are texts, whatever is in them


def fields(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted names and values of all fields outside the policies' sections."""
    for field, value in config.items():
        name = f"{prefix}{field}"
        if name in KINDS:
            continue
        if isinstance(value, ConfigDict) and name not in CHECKS:
            yield from fields(value, f"{name}.")
        else:
            yield name, value


def validate(config: ConfigDict, *, data_is_read: bool = True) -> None:
    """Imports the plugins, expands paths, and checks every field by itself and what the fields must be to each other.

    What depends on the data, the model or the devices is checked where these are opened.

    Args:
        config: of a run; afterwards its paths are without `~` and variables, its numbers by name (name, number) pairs.
        data_is_read: whether the data that it names will be; otherwise they need not be named.

    Raises:
        InputError: names the field and what is accepted.
    """
    _check_fields(config)
    _check_duration(config)
    _settle(config)
    load_plugins(config.plugins)
    if data_is_read:
        sources.check(config.data)
        if config.targets.source is not None:
            sources.check(config.targets, "targets")
        _check_batch(config.data)
    _check_model(config)
    _check_data(config)
    if [config.mesh[axis] for axis in config.mesh].count(-1) > 1:
        raise InputError("-1 (the rest) is accepted for one axis only", option="mesh")


def _check_fields(config: ConfigDict) -> None:
    values = dict(fields(config))
    for name, value in values.items():
        if name not in CHECKS:
            raise InputError("unknown field; configs/base.py lists them all", option=name)
        if not CHECKS[name].test(value):
            raise InputError(f"must be {CHECKS[name].accepts}", option=name, value=value)
    if missing := sorted((CHECKS.keys() | set(KINDS)) - values.keys() - set(config)):
        raise InputError("missing; start the recipe from configs/base.py", option=missing[0])
    for kind in KINDS:
        _check_section(kind, config[kind])
    for option, section in weighter_sections(config).items():
        _check_section(option, section)


def _check_duration(config: ConfigDict) -> None:
    if config.train_step is None and config.epochs is None:
        raise InputError("must be a number of steps, or config.epochs of passes", option="train_step", value=None)
    if config.train_step is not None and config.epochs is not None:
        reason = f"not together with config.train_step = {config.train_step}; set one of them to None"
        raise InputError(reason, option="epochs", value=config.epochs)


def _check_section(option: str, section: Any) -> None:
    if not isinstance(section, ConfigDict | None):
        raise InputError("must be a section with a name and its hyperparameters, or None", option=option, value=section)


def _settle(config: ConfigDict) -> None:
    """Puts paths in the place of `~` and variables, and pairs in the place of numbers by name."""
    for name in PATHS:
        section, _, field = name.rpartition(".")
        _settle_field(config[section] if section else config, field, name)
    if isinstance(config.data.max_epochs, Mapping | ConfigDict):
        _settle_field(config.data, "max_epochs", "data.max_epochs")
    for option, section in _sections(config).items():
        for field, value in section.items():
            if field in _NO_PATHS:
                continue
            if isinstance(value, ConfigDict) or (isinstance(value, str) and re.search("/|^[~$]", value)):
                _settle_field(section, field, f"{option}.{field}")


def _sections(config: ConfigDict) -> dict[str, ConfigDict]:
    """The sections of the policies, by their dotted names."""
    return {kind: config[kind] for kind in KINDS if kind != "weighter" and config[kind]} | weighter_sections(config)


def _settle_field(section: ConfigDict, field: str, option: str) -> None:
    value = section[field]
    if value is None or isinstance(value, tuple | list):
        return
    try:
        settled = expanded(value) if isinstance(value, str) else tuple(value.items())
    except InputError as error:
        raise InputError(str(error), option=option) from error
    with section.ignore_type():
        section[field] = settled


def _check_model(config: ConfigDict) -> None:
    model, tokenizer = config.model, config.data.tokenizer
    if config.lora.name_or_path is not None and config.lora.rank == 0:
        raise InputError(f"must be that of the adapter {config.lora.name_or_path!r}", option="lora.rank", value=0)
    if model.name_or_path is None:
        model_config(model, 1)
    if not model.from_scratch and model.name_or_path is None:
        reason = "needs config.model.name_or_path, a folder or a hub id"
        raise InputError(reason, option="model.from_scratch", value=False)
    if not model.from_scratch and (tokenizer or "").startswith("train:"):
        raise InputError(
            "pretrained weights (config.model.from_scratch = False) need the tokenizer that they were trained with, "
            f"such as {model.name_or_path!r}",
            option="data.tokenizer",
            value=tokenizer,
        )


def _check_batch(data: ConfigDict) -> None:
    length = "cutoff_len" if sources.is_instruction(data) else "seq_len"
    if data.batch_size * data[length] > options.LARGEST_INT:
        reason = f"with rows of config.data.{length} = {data[length]} a batch has 2**31 tokens or more"
        raise InputError(reason, option="data.batch_size", value=data.batch_size)


def _check_data(config: ConfigDict) -> None:
    data = config.data
    if data.batch_size % data.grad_accumulation:
        raise InputError(
            f"must be a multiple of config.data.grad_accumulation = {data.grad_accumulation}",
            option="data.batch_size",
            value=data.batch_size,
        )
    if data.max_epochs is not None and (config.selector or config.order) and not config.mixer:
        reason = "needs a mixer beside a selector or an order, such as static, so that rows are drawn by domain"
        raise InputError(reason, option="data.max_epochs", value=data.max_epochs)
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
    if data.domains is not None and isinstance(data.proportions, tuple | list):
        numbers = tuple(each[1] if isinstance(each, tuple | list) else each for each in data.proportions)
        checked("data", normalised, "proportions", numbers, len(data.domains))
