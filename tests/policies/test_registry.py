"""Policies by name: defaults, refusals, schedules, and a user's own policy in a package of the user's."""

import sys

import numpy as np
import pytest
from ml_collections import ConfigDict

from dataflex_jax.errors import InputError
from dataflex_jax.policies import Mixer, registry
from dataflex_jax.policies.schedule import Schedule

EVERY_STEP = Schedule(0, 1, -1)


@pytest.mark.parametrize(
    ("kind", "least"),
    [
        ("mixer", {"static", "odm", "doremi"}),
        ("weighter", {"loss", "adapt"}),
        (
            "selector",
            {
                *(
                    "random",
                    "full",
                    "loss",
                    "delta_loss",
                    "less",
                    "icons",
                    "nice",
                    "cluster_less",
                    "near",
                    "tsds",
                    "rds",
                ),
                *("greats", "rho_loss"),
            },
        ),
        ("order", {"sorting", "shuffle", "folding", "zigzag", "segment", "cross_guidance"}),
    ],
)
def test_every_policy_builds_from_its_default_section_but_for_the_reference(kind, least):
    assert least <= set(registry.names(kind))
    for name in registry.names(kind):
        section = registry.policy_config(kind, name)
        if "reference" in section:
            with pytest.raises(InputError, match=rf"config\.{kind}\.reference = None: must be a run folder"):
                registry.build(kind, section, EVERY_STEP)
            section.reference = "runs/reference"
        scheduled = registry.build(kind, section, EVERY_STEP)
        assert (scheduled.name, scheduled.schedule) == (name, EVERY_STEP)
        if kind in ("mixer", "weighter"):
            assert (scheduled.policy.reference is not None) == ("reference" in section)
        if kind == "selector":
            assert not scheduled.policy.replacement


def test_unknown_names_and_hyperparameters_are_refused_with_the_accepted_ones():
    with pytest.raises(InputError, match=r"unknown mixer 'omd'; known: ado, doge, doremi, dynamic_moe, "):
        registry.policy_config("mixer", "omd")
    with pytest.raises(
        InputError, match=r"config.mixer.alhpa: mixer 'odm' has no such hyperparameter; accepted: alpha, "
    ):
        registry.build("mixer", ConfigDict({"name": "odm", "alhpa": 0.5}), EVERY_STEP)
    with pytest.raises(InputError, match=r"config.mixer.alpha = 2.0: must be in"):
        registry.build("mixer", ConfigDict({"name": "odm", "alpha": 2.0}), EVERY_STEP)


def test_a_section_overrides_the_schedule():
    section = registry.policy_config("mixer", "odm")
    section.update_step = 7
    assert registry.build("mixer", section, Schedule(3, 1, 5)).schedule == Schedule(3, 7, 5)
    section.update_step = 0
    with pytest.raises(InputError, match=r"config.mixer.update_step = 0: must be >= 1"):
        registry.build("mixer", section, EVERY_STEP)


PLUGIN = '''
"""Draws in proportion to the square of the domain losses."""
import jax.numpy as jnp
from dataflex_jax.policies import Mixer, register_mixer

@register_mixer("{name}")
def squared(*, power: float = 2.0) -> Mixer:
    def update(weights, observation):
        score = jnp.where(observation.domain_rows > 0, observation.domain_loss**power, weights)
        return score / score.sum()
    return Mixer(init=lambda natural: natural, update=update, sampling_weights=lambda weights: weights)
'''


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    (tmp_path / "users_package").mkdir()
    (tmp_path / "users_package" / "__init__.py").write_text("")
    (tmp_path / "users_package" / "squared.py").write_text(PLUGIN.format(name="users_squared"))
    monkeypatch.syspath_prepend(tmp_path)
    yield "users_package.squared"
    for module in ("users_package", "users_package.squared"):
        sys.modules.pop(module, None)
    registry._FACTORIES["mixer"].pop("users_squared", None)


def test_a_plugin_registers_itself_and_its_fields_can_be_overridden(plugin):
    registry.load_plugins([plugin])
    section = registry.policy_config("mixer", "users_squared")
    assert section.power == 2.0
    section.power = 3.0
    registry.build("mixer", section, EVERY_STEP)


@pytest.mark.parametrize(
    ("kind", "name", "field", "value", "accepted"),
    [
        ("selector", "loss", "quantiles", ("a", "b"), r"a tuple \(a finite 32-bit number, a finite 32-bit number\)"),
        ("selector", "loss", "save_all_scores", 1, "True or False"),
        ("selector", "loss", "keep", "half", "a finite 32-bit number or None"),
        ("selector", "loss", "keep", 0.0, r"in \(0, 1\]"),
        ("selector", "loss", "keep", 1.5, r"in \(0, 1\]"),
        ("selector", "greats", "oversample", 1, ">= 2"),
        ("selector", "greats", "oversample", 2.5, "a 32-bit integer"),
        ("selector", "greats", "target_rows", 0, ">= 1"),
        ("selector", "less", "projection_seed", 2**31, "a 32-bit integer"),
        ("mixer", "odm", "initial_proportions", ("a", 1), "a tuple of finite 32-bit numbers, .* a string or None"),
        ("mixer", "odm", "update_step", 10**10, "a 32-bit integer"),
        ("mixer", "ado", "history", True, "a 32-bit integer"),
        ("order", "sorting", "dynamic", "yes", "True or False"),
    ],
)
def test_an_impossible_hyperparameter_is_refused_by_name(kind, name, field, value, accepted):
    section = registry.policy_config(kind, name)
    with section.ignore_type():
        section[field] = value
    with pytest.raises(InputError, match=f"^config.{kind}.{field} = .*: must be {accepted}$"):
        registry.build(kind, section, Schedule(0, 1, -1))


def test_a_default_need_not_be_as_its_annotation_says(monkeypatch):
    def lax(*, temperature: float = None, steps: int = 0.5) -> Mixer:  # noqa: RUF013
        assert (temperature, steps) == (None, 0.5)
        return Mixer(lambda natural: natural, lambda state, seen: state, lambda state: state)

    monkeypatch.setitem(registry._FACTORIES["mixer"], "lax", lax)
    registry.build("mixer", registry.policy_config("mixer", "lax"), Schedule(0, 1, -1))


def test_a_missing_plugin_is_named():
    with pytest.raises(InputError, match=r"config.plugins: cannot import 'no_such_package.mixer'"):
        registry.load_plugins(["no_such_package.mixer"])


@pytest.mark.parametrize("module", ["..", ".mixer", "", "a..b", "my mixer"])
def test_what_is_no_name_of_a_module_is_refused(module):
    with pytest.raises(InputError, match=r"^config.plugins = '.*': a module's name is accepted, such as my_package"):
        registry.load_plugins([module])


def test_two_policies_of_one_name_are_refused(plugin):
    registry.load_plugins([plugin])
    with pytest.raises(InputError, match=r"'odm' of .* is already registered by dataflex_jax.policies.mixers.odm"):
        registry.register_mixer("odm")(registry._FACTORIES["mixer"]["users_squared"])


def test_a_factory_with_positional_or_catch_all_parameters_is_refused():
    with pytest.raises(InputError, match="parameter 'options' must be keyword-only"):
        registry.register_mixer("loose")(lambda **options: None)


def test_only_a_refused_value_is_the_configurations_fault():
    def factory(*, power):
        if power <= 0:
            raise ValueError(f"power = {power}: must be > 0")
        return np.zeros(2) + np.zeros(3)

    with pytest.raises(InputError, match=r"^config.mixer.power = 0: must be > 0$"):
        registry.checked("mixer", factory, power=0)
    with pytest.raises(ValueError, match="could not be broadcast"):
        registry.checked("mixer", factory, power=1)
