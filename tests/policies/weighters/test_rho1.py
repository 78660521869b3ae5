"""Rho-1 against a transcription that looks at one token at a time."""

import jax
import numpy as np
import pytest

from dataflex_jax.policies import Reference
from dataflex_jax.policies.weighters.rho1 import rho1
from tests.helpers.observations import of_rows


def transcription(losses, reference, mask, keep):
    """Python's own sort over (excess, place)."""
    counted = [(row, token) for row in range(mask.shape[0]) for token in range(mask.shape[1]) if mask[row, token]]
    k = max(1, int(keep * len(counted) + 0.5))
    ranked = sorted(counted, key=lambda place: reference[place] - losses[place])
    weights = np.zeros(mask.shape)
    for place in ranked[:k]:
        weights[place] = len(counted) / k
    return weights


@pytest.mark.parametrize("keep", [0.01, 0.25, 0.6, 1.0])
@pytest.mark.parametrize("ties", [False, True])
def test_equals_the_transcription(keep, ties):
    rng = np.random.default_rng(0)
    losses, reference = rng.uniform(0, 5, (2, 6, 11))
    if ties:
        losses, reference = np.round(losses), np.round(reference)
    mask = rng.random((6, 11)) < 0.7
    weighter = rho1(keep=keep, reference="runs/reference")
    observation = of_rows(np.ones(6), mask=mask, token_losses=losses, reference_losses=reference)
    weights = jax.jit(weighter.weigh)(weighter.init(4), observation)
    np.testing.assert_allclose(weights, transcription(losses, reference, mask, keep), rtol=1e-6)
    np.testing.assert_allclose(np.asarray(weights)[mask].mean(), 1, rtol=1e-5)


def test_masked_tokens_never_count_however_large_their_excess():
    losses = np.array([[9.0, 1.0, 2.0, 3.0, 4.0]])
    observation = of_rows([1], mask=[[0, 1, 1, 1, 1]], token_losses=losses, reference_losses=np.zeros((1, 5)))
    weights = rho1(keep=0.5, reference="runs/reference").weigh((), observation)
    np.testing.assert_array_equal(weights, [[0, 0, 0, 2, 2]])


def test_the_reference_is_asked_for_by_path_and_way():
    assert rho1(reference="runs/a", reference_losses="cached").reference == Reference("runs/a", "cached")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0, "reference": "runs/a"}, "^keep = 0.0: must be in"),
        ({"keep": 1.5, "reference": "runs/a"}, "^keep = 1.5: must be in"),
        ({}, "^reference = None: must be a run folder"),
        (
            {"reference": "runs/a", "reference_losses": "disk"},
            "^reference_losses = 'disk': must be one of model, cached",
        ),
    ],
)
def test_impossible_hyperparameters_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        rho1(**options)
