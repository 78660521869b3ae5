"""The fit on power laws that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.policies.common import scaling_law
from tests.helpers.power_laws import LAWS, law_losses

FIT = jax.jit(jax.vmap(scaling_law.fit))


@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 1e-3), (0.01, 0.05)])
def test_the_fit_recovers_known_power_laws(noise, tolerance):
    samples = np.tile(np.linspace(3200, 1.5e6, 96), (4, 1))
    losses = law_losses(LAWS, samples)
    noisy = losses * np.exp(noise * np.random.default_rng(0).normal(size=losses.shape))
    counts = np.ones_like(losses)
    counts[:, 90:] = 0
    noisy[:, 90:] = 0
    fitted = np.asarray(FIT(*(jnp.asarray(x, jnp.float32) for x in (samples, noisy, counts))), np.float64)
    np.testing.assert_allclose(np.exp(fitted[:, 1]), np.exp(LAWS[:, 1]), rtol=tolerance)
    np.testing.assert_allclose(law_losses(fitted, samples), losses, rtol=tolerance)


def test_the_fit_minimises_no_worse_than_the_law_that_made_the_losses():
    """The objective in float64, at what was found and at the truth."""
    samples = np.tile(np.linspace(3200, 1.5e6, 96), (4, 1))
    noisy = law_losses(LAWS, samples) * np.exp(0.01 * np.random.default_rng(1).normal(size=samples.shape))

    def objective(laws):
        residuals = np.abs(np.log(law_losses(laws, samples)) - np.log(noisy))
        huber = np.where(residuals <= 1e-3, residuals**2 / 2, 1e-3 * (residuals - 5e-4))
        a, e, b = laws.T
        bounds = [np.maximum(x, 0) for x in (a - 6.5, 0.5 - e, b - 0.8, 0.001 - b)]
        return huber.sum(axis=1) + sum(bounds)

    arguments = (jnp.asarray(x, jnp.float32) for x in (samples, noisy, np.ones_like(noisy)))
    fitted = np.asarray(FIT(*arguments), np.float64)
    assert (objective(fitted) <= objective(LAWS) * (1 + 1e-4)).all()


@pytest.mark.slow
def test_a_long_history_with_few_points_is_fitted():
    """Over several domains, as a run does from its eighth point on."""
    rng, points = np.random.default_rng(0), 256
    samples = np.tile(np.linspace(100, 1e5, points), (5, 1)).astype(np.float32)
    losses = (2 + 5 * samples**-0.3 + 0.05 * rng.normal(size=samples.shape)).astype(np.float32)
    counts = np.tile(np.where(np.arange(points) < 20, 10.0, 0.0), (5, 1)).astype(np.float32)
    laws = FIT(samples, losses, counts)
    assert np.isfinite(laws).all()
    for law, n, loss in zip(np.asarray(laws, np.float64), samples[:, :20], losses[:, :20], strict=True):
        a, e, b = law
        assert np.abs(np.exp(e) + np.exp(a) * n**-b - loss).mean() < 0.06
