"""Learning-rate schedules at their corners, and AdamW against its formula."""

import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.configs import base
from dataflex_jax.training import optim

QUERY = "layers/attention/q_proj"


def options(**fields):
    section = base.get_config().optim
    section.update(fields)
    return section


@pytest.mark.parametrize(
    ("schedule", "at"),
    [
        ("linear", {0: 0, 5: 0.5, 10: 1, 55: 0.5, 100: 0}),
        ("cosine", {0: 0, 10: 1, 55: 0.5, 100: 0, 32: 0.5 * (1 + np.cos(np.pi * 22 / 90))}),
        ("wsd", {0: 0, 10: 1, 50: 1, 90: 1, 95: 0.5, 100: 0}),
        ("constant", {0: 0, 10: 1, 50: 1, 100: 1}),
    ],
)
def test_schedules(schedule, at):
    rate = optim.learning_rate(options(learning_rate=2.0, schedule=schedule, warmup_ratio=0.1), 100)
    for step, share in at.items():
        np.testing.assert_allclose(rate(step), 2.0 * share, atol=1e-6)


def test_no_warmup_starts_at_the_peak():
    assert optim.learning_rate(options(learning_rate=2.0, schedule="linear", warmup_ratio=0.0), 10)(0) == 2.0


def test_adamw_follows_its_formula_with_decay_on_matrices_only():
    section = options(learning_rate=0.1, weight_decay=0.3, b1=0.8, b2=0.9, eps=1e-3, clip_norm=0.5)
    tx = optim.adamw(section, lambda step: 0.1)
    rng = np.random.default_rng(0)
    params = {
        QUERY: {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)},
        "norm": {"scale": rng.normal(size=(2, 3))},
    }
    flat = {(QUERY, "kernel"): True, (QUERY, "bias"): False, ("norm", "scale"): False}
    as_jax = {a: {b: jnp.asarray(x, jnp.float32) for b, x in d.items()} for a, d in params.items()}
    state = tx.init(as_jax)
    m = {key: 0.0 for key in flat}
    v = {key: 0.0 for key in flat}
    for t in range(1, 4):
        grads = {a: {b: rng.normal(size=x.shape) for b, x in d.items()} for a, d in params.items()}
        updates, state = tx.update(
            {a: {b: jnp.asarray(x, jnp.float32) for b, x in d.items()} for a, d in grads.items()}, state, as_jax
        )
        norm = np.sqrt(sum((x**2).sum() for d in grads.values() for x in d.values()))
        for (a, b), decays in flat.items():
            g = grads[a][b] * min(1, 0.5 / norm)
            m[a, b] = 0.8 * m[a, b] + 0.2 * g
            v[a, b] = 0.9 * v[a, b] + 0.1 * g * g
            step = (m[a, b] / (1 - 0.8**t)) / (np.sqrt(v[a, b] / (1 - 0.9**t)) + 1e-3)
            expected = -0.1 * (step + 0.3 * decays * params[a][b])
            np.testing.assert_allclose(updates[a][b], expected, rtol=2e-5, atol=1e-7)
