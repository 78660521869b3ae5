"""Validation of fields and of pairs of them; what depends on data, model or devices is tested with whole runs."""

import re

import pytest

from dataflex_jax import config as configuration
from dataflex_jax.configs import base
from dataflex_jax.errors import InputError


def test_every_field_of_the_base_recipe_has_a_check_and_passes_it():
    config = base.get_config()
    assert dict(configuration.fields(config)).keys() == configuration.CHECKS.keys()
    configuration.validate(config)


def changed(name, value):
    config = base.get_config("mixer=odm").unlock()
    *path, field = name.split(".")
    section = config
    for part in path:
        section = section[part]
    with section.ignore_type():
        section[field] = value
    return config


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("seed", -1, "an integer >= 0"),
        ("seed", 1.5, "an integer >= 0"),
        ("train_step", 0, "an integer >= 1"),
        ("train_step", True, "an integer >= 1"),
        ("update_step", 0, "an integer >= 1"),
        ("update_times", -2, "an integer >= -1"),
        ("checkpoint_every", 0, "an integer >= 1"),
        ("keep", 0, "an integer >= 1"),
        ("tensorboard", 1, "True or False"),
        ("wandb_project", "", "a non-empty string, or None"),
        ("plugins", "my_package", "a tuple of distinct names of modules"),
        ("evaluators", ("held_out", "held_out"), "a tuple of distinct non-empty strings"),
        ("model.trainable", "norm/*", "a tuple of one or more distinct non-empty strings, or None"),
        ("model.dtype", "float16", "one of 'bfloat16', 'float32'"),
        ("model.hidden_size", 0, "an integer >= 1 and <= 1048576, or None"),
        ("data.source", "web", "one of 'builtin', 'local', 'hub'"),
        ("data.domains", ("a", "a"), "a tuple of one or more distinct non-empty strings, or None"),
        ("data.seq_len", 1, "an integer >= 2"),
        ("data.proportions", "natural", 'a tuple of numbers, "uniform", a weights file (.json), numbers by'),
        ("data.proportions", (1.0, float("nan")), 'a tuple of numbers, "uniform", a weights file (.json), numbers by'),
        ("data.valid_fraction", 1.0, "a number >= 0 and < 1"),
        ("data.draw", "random", "one of 'systematic', 'multinomial'"),
        ("data.lag", -1, "an integer >= 0"),
        ("data.on_bad_record", "ignore", "one of 'raise', 'skip'"),
        ("optim.learning_rate", float("inf"), "a number >= 0"),
        ("optim.schedule", "step", "one of 'linear', 'cosine', 'wsd', 'constant'"),
        ("optim.b2", 1.0, "a number >= 0 and < 1"),
        ("optim.eps", 0.0, "a number > 0"),
        ("mesh.fsdp", 0, "an integer >= 1, or -1 for the rest"),
    ],
)
def test_a_value_out_of_its_range_is_refused_with_what_is_accepted(name, value, accepted):
    with pytest.raises(InputError, match=f"^config.{name} = {re.escape(repr(value))}: must be {re.escape(accepted)}"):
        configuration.validate(changed(name, value))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data.batch_size": 10, "data.grad_accumulation": 4}, "batch_size = 10: must be a multiple of .* = 4"),
        (
            {"data.batch_size": 2**22, "data.seq_len": 512},
            "batch_size = 4194304: with rows of .*seq_len = 512 a batch ",
        ),
        ({"data.source": "local"}, "^config.data.root: needed for source 'local' .the folder with the data files.$"),
        ({"data.domain_field": "set"}, "^config.data.domain_field: not with source 'builtin': .*; set it to None$"),
        ({"targets.source": "hub"}, "^config.targets.root: needed for source 'hub'"),
        ({"targets.source": "web"}, "^config.targets.source = 'web': must be one of 'builtin', 'local', "),
        (
            {"targets.source": "dataset_info", "targets.root": "x", "targets.formatting": "alpaca"},
            "^config.targets.formatting: not with source 'dataset_info': each entry of dataset_info.json has its own",
        ),
        ({"data.domain_values": ("x",)}, "config.data.domain_values = .*: must have one value for each of"),
        ({"data.domains": ("a",), "data.domain_values": ("x",)}, "domain_values: needs config.data.domain_field"),
        (
            {"data.domains": ("a", "b"), "data.proportions": (1.0,)},
            r"config.data.proportions = \(1.0,\): has 1 entries; one for each",
        ),
        ({"mesh.data": -1}, "config.mesh: -1 .* one axis only"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields, message):
    config = base.get_config().unlock()
    for name, value in fields.items():
        config.update_from_flattened_dict({name: value})
    with pytest.raises(InputError, match=message):
        configuration.validate(config)


def test_unknown_and_missing_fields_are_named():
    config = base.get_config().unlock()
    config.data.sequence_length = 128
    with pytest.raises(InputError, match=r"config.data.sequence_length: unknown field"):
        configuration.validate(config)
    del config.data.sequence_length, config.optim.b2
    with pytest.raises(InputError, match=r"config.optim.b2: missing"):
        configuration.validate(config)


def test_a_text_is_no_path_whatever_is_in_it():
    config = base.get_config("selector=near")
    config.selector.update(embedding_model="~/model", target_prefix="in/out of $nothing:")
    configuration.validate(config)
    assert config.selector.target_prefix == "in/out of $nothing:"
    assert config.selector.embedding_model.startswith("/")
