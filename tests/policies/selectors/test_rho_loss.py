"""RHO-LOSS beside a float64 transcription of its scores."""

import jax
import jax.numpy as jnp
import numpy as np

from dataflex_jax.policies import DrawnRows
from dataflex_jax.policies.selectors.rho_loss import rho_loss


def picked(losses, reference, mask, num):
    losses, reference, mask = (np.asarray(x, np.float32) for x in (losses, reference, mask))
    drawn = DrawnRows(
        step=jnp.int32(1),
        key=jax.random.key(0),
        losses=jnp.asarray((mask * losses).sum(1) / np.maximum(mask.sum(1), 1)),
        token_losses=jnp.asarray(losses),
        mask=jnp.asarray(mask),
        domains=jnp.zeros(len(losses), jnp.int32),
        reference_losses=jnp.asarray(reference),
    )
    pick = rho_loss(reference="runs/reference").online.pick
    return jax.jit(pick, static_argnums=1)(drawn, num).tolist()


def test_it_takes_the_largest_reducible_losses():
    rng = np.random.default_rng(0)
    losses, reference = rng.gamma(2.0, 1.0, (2, 20, 7))
    mask = rng.random((20, 7)) < 0.6
    mask[:, 0] = True
    means = [
        sum(own - theirs for own, theirs, counts in zip(*row, strict=True) if counts) / row[2].sum()
        for row in zip(losses, reference, mask, strict=True)
    ]
    assert picked(losses, reference, mask, 8) == sorted(range(20), key=lambda i: -means[i])[:8]


def test_of_equals_the_first_and_rows_without_a_finite_loss_or_a_token_last():
    losses = [[3.0], [3.0], [np.inf], [9.0], [-5.0]]
    mask = [[1], [1], [1], [0], [1]]
    assert picked(losses, np.zeros((5, 1)), mask, 3) == [0, 1, 4]
    assert sorted(picked(losses, np.zeros((5, 1)), mask, 5)) == list(range(5))
