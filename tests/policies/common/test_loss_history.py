"""The history of losses against all of them kept."""

import jax
import jax.numpy as jnp
import numpy as np

from dataflex_jax.policies.common.loss_history import LossHistory


def test_the_history_holds_exact_means_over_blocks_that_double():
    rng = np.random.default_rng(0)
    losses, rows = rng.uniform(1, 6, (77, 2)), rng.integers(0, 3, (77, 2))
    samples = np.cumsum(rows, axis=0)
    history = LossHistory.empty(num_domains=2, points=4, block=3)
    add = jax.jit(LossHistory.add)
    for step in range(77):
        wanted = step >= 5
        arguments = (jnp.asarray(losses[step], jnp.float32), jnp.asarray(rows[step]), jnp.asarray(samples[step]))
        history = add(history, *arguments, jnp.bool_(wanted))
        kept = step - 4 if wanted else 0
        block = 3
        while kept >= 4 * block:
            block *= 2
        n, mean, counts = history.points()
        for domain in range(2):
            for point in range(4):
                steps = slice(5 + point * block, 5 + (point + 1) * block)
                if (point + 1) * block > kept:
                    assert counts[domain, point] == 0
                    continue
                number = rows[steps, domain].sum()
                assert counts[domain, point] == number
                np.testing.assert_allclose(n[domain, point], samples[steps, domain].mean(), rtol=1e-6)
                if number:
                    expected = (losses * rows)[steps, domain].sum() / number
                    np.testing.assert_allclose(mean[domain, point], expected, rtol=1e-5)
