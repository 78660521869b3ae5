"""The weighter "field" against its formulas in float64."""

import numpy as np
import pytest

from dataflex_jax.policies import RecordNumbers
from dataflex_jax.policies.weighters.field import field
from tests.helpers.observations import of_rows

RNG = np.random.default_rng(0)
MASK = (RNG.random((6, 5)) < 0.7).astype(float) * np.array([1, 1, 0, 1, 1, 1])[:, None]
NUMBERS = RNG.random((6, 5)) * 3


def test_rows_have_their_records_numbers_scaled_to_mean_1():
    rows = RNG.random(6) * 3
    weighter = field()
    seen = of_rows(np.ones(6), mask=MASK, record_numbers=np.broadcast_to(rows[:, None], MASK.shape))
    counted = MASK.any(axis=1)
    expected = counted.sum() * rows * counted / (rows * counted).sum()
    np.testing.assert_allclose(weighter.weigh((), seen), expected, rtol=1e-6)
    assert weighter.records == RecordNumbers("weight", "record")


def test_tokens_have_their_turns_numbers_scaled_to_mean_1():
    weighter = field(field="score", of="turns")
    seen = of_rows(np.ones(6), mask=MASK, record_numbers=NUMBERS)
    expected = MASK.sum() * NUMBERS * MASK / (NUMBERS * MASK).sum()
    np.testing.assert_allclose(weighter.weigh((), seen), expected, rtol=1e-6)
    assert weighter.records == RecordNumbers("score", "turns")


@pytest.mark.parametrize("of", ["record", "turns"])
def test_where_all_are_0_nothing_counts(of):
    weights = field(of=of).weigh((), of_rows(np.ones(6), mask=MASK, record_numbers=0 * NUMBERS))
    np.testing.assert_array_equal(weights, np.zeros(6 if of == "record" else MASK.shape))


@pytest.mark.parametrize(("options", "message"), [({"field": " "}, "field = ' '"), ({"of": "rows"}, "of = ")])
def test_impossible_hyperparameters_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        field(**options)
