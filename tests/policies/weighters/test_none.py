"""The weighter "none"."""

import numpy as np

from dataflex_jax.policies.weighters.none import none
from tests.helpers.observations import of_rows


def test_none_weighs_every_row_the_same():
    weighter = none()
    np.testing.assert_array_equal(weighter.weigh(weighter.init(4), of_rows([3.0, 1.0, 2.0])), np.ones(3))
