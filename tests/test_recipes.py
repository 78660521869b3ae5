"""The recipes: each takes further policies and plugins after its own variant, and is a configuration that can be."""

import importlib

import pytest

from dataflex_jax import config as configuration
from dataflex_jax.configs import base
from dataflex_jax.errors import InputError
from dataflex_jax.policies.active import active_policies
from tests.helpers.command import PROJECT

SHARED = {"__init__", "base", "llamafactory", "scales", "selection"}
RECIPES = sorted(path.stem for path in (PROJECT / "configs").glob("*.py") if path.stem not in SHARED)


def get_config(recipe, *variant):
    return importlib.import_module(f"dataflex_jax.configs.{recipe}").get_config(*variant)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_takes_policies_after_its_variant_and_in_place_of_its_own(recipe):
    plain = get_config(recipe)
    config = get_config(recipe, "mixer=random,selector=random,order=folding,weighter=adapt+loss,plugins=json")
    same = ("train_step", "model", "data", "optim", "lora")
    assert [config[name] for name in same] == [plain[name] for name in same]
    configuration.validate(config)
    active = active_policies(config)
    assert active.names() == {
        "mixer.name": "random",
        "selector.name": "random",
        "order.name": "folding",
        "weighter.name": "adapt+loss",
    }
    assert config.plugins == ("json",)


@pytest.mark.parametrize(
    ("recipe", "variant", "scale"),
    [
        ("odm", "local,weighter=loss", "local"),
        ("doremi", "proxy,local,weighter=loss", "local"),
        ("reweight", "loss+adapt,quickstart,mixer=odm", "builtin"),
        ("less", "lora,mixer=odm", "dataset_info"),
    ],
)
def test_the_variant_of_its_own_stays_what_it_is(recipe, variant, scale):
    config = get_config(recipe, variant)
    assert config.data.source == scale
    assert (config.mixer or config.weighter) is not None


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe != "reweight"])
def test_an_unknown_variant_is_refused_with_the_known_ones(recipe):
    with pytest.raises(InputError, match=r"^unknown variant 'locla' of the \w+ recipe; known: "):
        get_config(recipe, "locla,mixer=odm")


def test_the_domains_of_a_folder_need_not_be_named():
    assert get_config("odm", "local").data.domains is None


def test_the_base_recipe_is_a_whole_model():
    config = base.get_config("mixer=odm")
    configuration.validate(config)
    config.model.num_attention_heads = 7
    with pytest.raises(InputError, match="num_key_value_heads=32: must divide num_attention_heads=7"):
        configuration.validate(config)
