"""GREATS beside a float64 transcription of its greedy choice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.policies import DrawnRows, RowGradients
from dataflex_jax.policies.selectors.greats import greats


def seen(gradients, target, eta, mask=None):
    """Rows of these gradients [R, P], to be compared with the target gradient [P]."""
    rows = len(gradients)
    mask = np.ones((rows, 2), np.float32) if mask is None else mask
    numbers = RowGradients(*(jnp.asarray(x, jnp.float32) for x in (gradients @ gradients.T, gradients @ target, eta)))
    return DrawnRows(
        step=jnp.int32(1),
        key=jax.random.key(0),
        losses=jnp.ones(rows),
        token_losses=jnp.ones((rows, 2)),
        mask=jnp.asarray(mask),
        domains=jnp.zeros(rows, jnp.int32),
        gradients=numbers,
    )


def transcribed(gradients, target, eta, num):
    scores, taken = [eta * (g @ target) for g in gradients], []
    for _ in range(num):
        best = max((i for i in range(len(gradients)) if i not in taken), key=lambda i: scores[i])
        taken.append(best)
        scores = [s - eta**2 * (gradients[best] @ g) for s, g in zip(scores, gradients, strict=True)]
    return taken


def picked(*arguments, num, **fields):
    return jax.jit(greats().online.pick, static_argnums=1)(seen(*arguments, **fields), num).tolist()


@pytest.mark.parametrize("seed", range(4))
def test_it_takes_what_the_definition_takes(seed):
    rng = np.random.default_rng(seed)
    gradients, target = rng.normal(size=(24, 6)), rng.normal(size=6)
    expected = transcribed(gradients, target, 0.3, 12)
    assert picked(gradients, target, 0.3, num=12) == expected
    alone = np.argsort(-gradients @ target, kind="stable")[:12].tolist()
    assert sorted(alone) != sorted(expected)
    assert picked(gradients, target, 0.0, num=12) == alone  # the first step of a warm-up


def test_the_same_row_again_is_worth_less():
    gradients, target = np.array([[2.0, 0.0], [2.0, 0.0], [0.0, 1.0]]), np.array([1.0, 1.0])
    assert picked(gradients, target, 0.5, num=2) == [0, 2]
    assert picked(gradients, target, 0.01, num=2) == [0, 1]


def test_rows_without_a_finite_gradient_or_a_token_come_last():
    gradients = np.array([[9.0], [np.nan], [-1.0], [-2.0]])
    mask = np.ones((4, 2), np.float32)
    mask[0] = 0
    assert picked(gradients, np.array([1.0]), 0.1, num=2, mask=mask) == [2, 3]
    assert sorted(picked(gradients, np.array([1.0]), 0.1, num=4, mask=mask)) == [0, 1, 2, 3]
