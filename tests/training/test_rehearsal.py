"""Policies of users that no step can work with are refused before anything is compiled, by name."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from dataflex_jax.configs import base
from dataflex_jax.errors import InputError
from dataflex_jax.policies import (
    Mixer,
    Online,
    Selector,
    Weighter,
    register_mixer,
    register_selector,
    register_weighter,
    registry,
)
from dataflex_jax.policies.active import active_policies
from dataflex_jax.training.rehearsal import Sizes, rehearse

SIZES = Sizes(rows=8, weighed=8, tokens=16, domains=3, hidden=32)
NATURAL = jnp.asarray([0.5, 0.3, 0.2])


class State(NamedTuple):
    weights: jax.Array
    n: object


def counting(update=None, weights=lambda state: state.weights, **functions):
    update = update or (lambda state, seen: state)
    return Mixer(lambda natural: State(natural, 0), update, weights, **functions)


def rehearsed(monkeypatch, variant, *, mixer=None, weighter=None, selector=None):
    for kind, register, policy in (
        ("mixer", register_mixer, mixer),
        ("weighter", register_weighter, weighter),
        ("selector", register_selector, selector),
    ):
        registry.names(kind)
        monkeypatch.setitem(registry._FACTORIES, kind, dict(registry._FACTORIES[kind]))
        if policy is not None:
            register("mine")(_factory(policy))
    config = base.get_config(variant)
    for section in (config.mixer, config.selector):
        if section and "reference" in section:
            section.reference = "a run"
    policies = active_policies(config).drawing(NATURAL)
    states = tuple(scheduled.policy.init(SIZES.hidden) for scheduled in policies.weighters)
    rehearse(policies, policies.mixer.policy.init(NATURAL), states, SIZES)


def _factory(policy):
    return lambda: policy


@pytest.mark.parametrize("name", registry.names("mixer"))
def test_every_mixer_of_the_project_passes(monkeypatch, name):
    rehearsed(monkeypatch, f"mixer={name},weighter=loss+adapt+joint_update_aware")


def branching(state, seen):
    return state if seen.domain_loss[0] > 1 else state._replace(n=1)


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        (counting(lambda state, seen: state._replace(n=state.n + 0.5)), "n being int32[], not float32[]"),
        (counting(branching), "update raised TracerBoolConversionError: Attempted boolean conversion"),
        (counting(lambda state, seen: state.weights), "update returned float32[3]; expected the structure of the"),
        (
            counting(weights=lambda state: state.weights[:2]),
            "sampling_weights returned float32[2]; expected one number",
        ),
        (
            counting(weights=lambda state: 2 * state.weights),
            "(the sum is 2, not 1); expected a distribution over the 3",
        ),
        (
            counting(weights=lambda state: state.weights - 0.3),
            "is negative); expected a distribution over the 3 domains",
        ),
        (counting(weights=lambda state: state.weights / 0), "(not all finite); expected a distribution"),
        (counting(loss_weights=lambda state: state.n), "loss_weights returned int32[]; expected one number for each"),
        (counting(log=lambda state: state.weights), "log returned float32[3]; expected names to numbers"),
        (counting(log=lambda state: {"n": state.m}), "log raised AttributeError: 'State' object has no attribute 'm'"),
        ("a Mixer", "its factory returned a str; a Mixer is expected"),
    ],
)
def test_a_mixer_that_no_step_can_work_with_is_named(monkeypatch, mixer, message):
    with pytest.raises(InputError) as caught:
        rehearsed(monkeypatch, "mixer=mine", mixer=mixer)
    line, *places = str(caught.value).splitlines()
    assert line.startswith("mixer 'mine': ")
    assert message in line
    assert bool(places) == ("raised" in line)


@pytest.mark.parametrize(
    ("weigh", "message"),
    [
        (
            lambda state, seen: seen.losses[1:],
            "weigh returned float32[7]; expected a weight of each row, [8], or of each",
        ),
        (lambda state, seen: seen.losses if seen.losses[0] > 0 else 1, "weigh raised TracerBoolConversionError"),
        (lambda state, seen: seen.embeddings + 1, "weigh raised TypeError"),
    ],
)
def test_a_weighter_that_no_step_can_work_with_is_named(monkeypatch, weigh, message):
    with pytest.raises(InputError, match=r"^weighter 'mine': ") as caught:
        rehearsed(monkeypatch, "weighter=mine", weighter=Weighter(lambda width: (), weigh))
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["greats", "rho_loss"])
def test_every_selector_inside_the_step_passes(monkeypatch, name):
    rehearsed(monkeypatch, f"selector={name}")


@pytest.mark.parametrize(
    ("pick", "message"),
    [
        (lambda seen, num: jnp.arange(num + 1), "online.pick returned int32[9]; expected the places of 8 rows, int[8]"),
        (lambda seen, num: jnp.argsort(seen.losses @ seen.gradients.gram)[:num], "online.pick raised AttributeError"),
    ],
)
def test_a_selector_that_picks_what_no_step_can_work_with_is_named(monkeypatch, pick, message):
    with pytest.raises(InputError, match=r"^selector 'mine': ") as caught:
        rehearsed(monkeypatch, "selector=mine", selector=Selector(None, None, online=Online(pick)))
    assert message in str(caught.value)
