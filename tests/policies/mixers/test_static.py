"""Fixed proportions, and the values that no mixer takes for proportions."""

import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.policies.mixers.static import static
from tests.helpers.observations import of_domains

NATURAL = jnp.asarray([0.6, 0.3, 0.1])


def test_static_keeps_its_proportions():
    mixer = static(proportions=(2, 1, 1))
    state = mixer.init(NATURAL)
    after = mixer.update(state, of_domains(1, [9, 1, 1], [1, 1, 1]))
    np.testing.assert_array_equal(mixer.sampling_weights(after), [0.5, 0.25, 0.25])
    np.testing.assert_allclose(static().init(NATURAL).weights, NATURAL)
    np.testing.assert_allclose(static(proportions="uniform").init(NATURAL).weights, 1 / 3, rtol=1e-6)


@pytest.mark.parametrize(
    ("proportions", "message"),
    [
        ((1, 1), r"proportions = \(1, 1\): has 2 entries; one for each of the 3"),
        ((1, -1, 1), "must be a finite number >= 0"),
        ((1, float("nan"), 1), "must be a finite number >= 0"),
        ((0, 0, 0), "at least one entry must be > 0"),
        ("even", "proportions = 'even': must be a tuple of numbers or \"uniform\""),
    ],
)
def test_impossible_proportions_are_refused(proportions, message):
    with pytest.raises(ValueError, match=message):
        static(proportions=proportions).init(NATURAL)
