"""SwiGLU and its backward pass against the formula, differentiated by JAX in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from dataflex_jax.models.mlp import swiglu
from tests.models.test_norm import in_float64, single


def plain(gate, up):
    return gate / (1 + jnp.exp(-gate)) * up


def value_and_gradients(function, gate, up, upstream):
    value, vjp = jax.vjp(function, gate, up)
    return value, *vjp(upstream.astype(value.dtype))


def inputs():
    rng = np.random.default_rng(0)
    return [rng.normal(0, scale, (3, 40)) for scale in (6, 2, 1)]


def test_equals_the_formula_in_float64():
    expected = in_float64(lambda *v: value_and_gradients(plain, *v), *inputs())
    for actual, wanted in zip(value_and_gradients(swiglu, *single(*inputs())), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_rounded_once():
    operands = [jnp.asarray(v, jnp.bfloat16) for v in inputs()]
    expected = in_float64(lambda *v: value_and_gradients(plain, *v), *operands)
    for actual, wanted in zip(value_and_gradients(swiglu, *operands), expected, strict=True):
        assert actual.dtype == jnp.bfloat16
        np.testing.assert_allclose(actual.astype(jnp.float32), wanted, rtol=2**-8, atol=1e-5)


def test_far_gates_are_finite():
    gate, ones = jnp.asarray([-1e4, -100.0, 0.0, 100.0, 1e4]), jnp.ones(5)
    value, d_gate, d_up = value_and_gradients(swiglu, gate, ones, ones)
    np.testing.assert_allclose(value, [0, 0, 0, 100, 1e4], atol=1e-6)
    np.testing.assert_allclose(d_gate, [0, 0, 0.5, 1, 1], atol=1e-6)
    np.testing.assert_allclose(d_up, value, atol=1e-6)


def test_its_second_derivatives_are_those_of_the_formula():
    def second(function, *operands):
        squares = lambda *v: sum(jnp.sum(g**2) for g in value_and_gradients(function, *v)[1:])  # noqa: E731
        return jax.grad(squares, argnums=(0, 1, 2))(*operands)

    expected = in_float64(lambda *v: second(plain, *v), *inputs())
    for actual, wanted in zip(second(swiglu, *single(*inputs())), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-4)
