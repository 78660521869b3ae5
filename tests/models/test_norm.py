"""RMSNorm and its backward pass against the formula, differentiated by JAX in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from dataflex_jax.models.norm import rms_norm

EPSILON = 1e-5


def plain(x, scale):
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + EPSILON) * scale


def normed(x, scale):
    return rms_norm(x, scale, EPSILON)


def inputs(*shape, seed=0):
    """(x, scale, upstream), float64."""
    rng = np.random.default_rng(seed)
    return rng.normal(0, 3, shape), rng.normal(1, 0.5, shape[-1]), rng.normal(size=shape)


def value_and_gradients(function, x, scale, upstream):
    value, vjp = jax.vjp(function, x, scale)
    return value, *vjp(upstream.astype(value.dtype))


def in_float64(function, *operands):
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, function(*(jnp.asarray(x, jnp.float64) for x in operands)))


def single(*operands):
    return [jnp.asarray(x, jnp.float32) for x in operands]


def test_equals_the_formula_in_float64():
    operands = inputs(2, 5, 3, 16)
    expected = in_float64(lambda *x: value_and_gradients(plain, *x), *operands)
    found = value_and_gradients(normed, *single(*operands))
    for actual, wanted in zip(found, expected, strict=True):
        assert actual.dtype == jnp.float32
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-5)


def test_bfloat16_is_rounded_once():
    x, scale, upstream = inputs(4, 64, 32)
    x, upstream = (jnp.asarray(v, jnp.bfloat16) for v in (x, upstream))
    expected = in_float64(lambda *v: value_and_gradients(plain, *v), x, scale, upstream)
    found = value_and_gradients(normed, x, jnp.asarray(scale, jnp.float32), upstream)
    assert [v.dtype for v in found] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    for actual, wanted in zip(found[:2], expected[:2], strict=True):
        # Half of the last bit of eight, and what float32 adds where terms cancel.
        np.testing.assert_allclose(actual.astype(jnp.float32), wanted, rtol=2**-8, atol=1e-5)
    np.testing.assert_allclose(found[2], expected[2], rtol=1e-5, atol=1e-4)


def test_the_backward_pass_keeps_no_float32_array_of_the_inputs_size():
    x = jax.ShapeDtypeStruct((4, 64, 32), jnp.bfloat16)
    kept = jax.eval_shape(lambda x, scale: jax.vjp(normed, x, scale)[1], x, jax.ShapeDtypeStruct((32,), jnp.float32))
    assert {leaf.dtype for leaf in jax.tree.leaves(kept) if leaf.size >= 64} == {jnp.dtype("bfloat16")}


def test_per_example_gradients_are_those_of_each_row():
    x, scale, upstream = single(*inputs(3, 4, 8))
    gradient = jax.grad(lambda scale, x, upstream: jnp.sum(normed(x, scale) * upstream))
    together = jax.vmap(gradient, in_axes=(None, 0, 0))(scale, x, upstream)
    apart = jnp.stack([gradient(scale, *row) for row in zip(x, upstream, strict=True)])
    np.testing.assert_allclose(together, apart, rtol=1e-6)


def test_its_second_derivatives_are_those_of_the_formula():
    operands = inputs(2, 3, 8)

    def second(function, x, scale, upstream):
        """Of the gradients' squares, with respect to all."""
        squares = lambda *v: sum(jnp.sum(g**2) for g in value_and_gradients(function, *v)[1:])  # noqa: E731
        return jax.grad(squares, argnums=(0, 1, 2))(x, scale, upstream)

    expected = in_float64(lambda *v: second(plain, *v), *operands)
    for actual, wanted in zip(second(normed, *single(*operands)), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=2e-5, atol=1e-4)
