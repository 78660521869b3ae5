"""Thousands of random configurations: each is accepted, or refused in one line that names a field."""

import collections
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from dataflex_jax import config as configuration
from dataflex_jax.errors import InputError, TrainingError
from dataflex_jax.policies import registry
from dataflex_jax.policies.active import active_policies, weighter_sections
from dataflex_jax.training.domain_weights import with_weights_files
from dataflex_jax.training.evaluation import check_evaluators
from dataflex_jax.training.setup import train_and_evaluate
from tests.helpers import any_config, tiny

NAMES = ("a", "b", "c")
SETTINGS = settings(derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))


def started(config):
    """All that is checked before data and model are opened, and the states that the policies begin with."""
    configuration.validate(config)
    active_policies(config)
    check_evaluators(config)
    config = with_weights_files(config, NAMES)
    policies = active_policies(config)
    weights = registry.checked("mixer", policies.mixer.policy.init, jnp.ones(len(NAMES)) / len(NAMES))
    for weighter in policies.weighters:
        weighter.policy.init(8)
    return np.asarray(policies.mixer.policy.sampling_weights(weights))


@pytest.mark.slow
def test_two_thousand_random_configurations_are_accepted_or_refused_in_one_line():
    outcomes = collections.Counter()

    @settings(SETTINGS, max_examples=2000)
    @given(any_config.choices())
    def starts(choice):
        try:
            weights = started(any_config.made(*choice))
        except InputError as error:
            outcomes["lines"] += len(str(error).splitlines())
            outcomes["refused"] += 1
        else:
            np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5)
            outcomes["accepted"] += 1

    starts()
    assert outcomes["lines"] == outcomes["refused"]
    assert min(outcomes["accepted"], outcomes["refused"]) > 200


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A function that trains what `any_config.choices` has drawn for two steps on tiny data."""
    folder = tmp_path_factory.mktemp("runs")
    root = tiny.write_domains(folder / "domains", characters=3000)
    train_and_evaluate(tiny.config(root, "static", train_step=1), folder / "reference")

    def start(variant, changes, number):
        config = any_config.made(variant, ())
        small = tiny.config(root, "", train_step=2, warmup_step=0, update_step=1, checkpoint_every=2)
        for name in ("train_step", "warmup_step", "update_step", "checkpoint_every", "tensorboard", "model", "data"):
            config[name] = small[name]
        for section in (config.mixer or {}, *weighter_sections(config).values()):
            if "reference" in section:
                section.reference = str(folder / "reference")
        if config.selector and "proj_dim" in config.selector:
            config.selector.proj_dim = 64
        any_config.change(config, changes)
        configuration.validate(config)
        train_and_evaluate(config, folder / str(number))

    return start


@pytest.mark.slow
def test_thirty_random_configurations_that_are_accepted_train_or_end_in_one_line(run, monkeypatch):
    monkeypatch.setattr(any_config, "NUMBERS", [x for x in any_config.NUMBERS if not 128 < abs(x) < math.inf])
    outcomes = collections.Counter()

    @settings(SETTINGS, max_examples=150, phases=[Phase.generate])
    @given(any_config.choices(2))
    def trains(choice):
        if outcomes.total() == 30:
            return
        try:
            run(*choice, outcomes.total())
        except InputError:
            return  # before or when the data are opened
        except TrainingError:
            outcomes["stopped"] += 1
        else:
            outcomes["trained"] += 1

    trains()
    assert outcomes.total() == 30
    assert outcomes["trained"] >= 20
