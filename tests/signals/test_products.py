"""Inner products of gradients from the layers' inputs and output gradients, beside the gradients themselves."""

import jax
import numpy as np
import pytest

from dataflex_jax.signals import products


@pytest.mark.parametrize(
    ("rows", "tokens", "width", "outputs", "block"),
    [
        (2, 3, 40, 30, 2**24),  # pair by pair
        (5, 9, 11, 6, 2**24),  # in one strip
        (5, 9, 11, 6, 100),  # in strips of which the last is not full
        (5, 9, 11, 6, 1),
    ],
)
def test_they_are_those_of_whole_gradients(monkeypatch, rows, tokens, width, outputs, block):
    monkeypatch.setattr(products, "_BLOCK", block)
    rng = np.random.default_rng(0)
    inputs, gradients = rng.normal(size=(rows, tokens, width)), rng.normal(size=(rows, tokens, outputs))
    whole = np.einsum("bti,bto->bio", inputs, gradients).reshape(rows, -1)
    found = jax.jit(products.inner_products)(np.float32(inputs), np.float32(gradients))
    np.testing.assert_allclose(found, whole @ whole.T, rtol=0, atol=1e-5 * np.abs(whole @ whole.T).max())
