"""Thousands of random configurations: each is accepted, or refused in one line that names a field."""

import collections

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from dataflex_jax import config as configuration
from dataflex_jax.errors import InputError
from dataflex_jax.policies import registry
from dataflex_jax.policies.active import active_policies
from dataflex_jax.training.domain_weights import with_weights_files
from dataflex_jax.training.evaluation import check_evaluators
from tests.helpers import any_config

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
