"""Rows sent to experts against a float64 transcription: their gradients, their sizes, and over a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dataflex_jax.models import dispatch, swiglu
from dataflex_jax.models.swiglu import Weights
from dataflex_jax.sharding import make_mesh, map_rows


def mixed_by_hand(x, factors, experts, gate, up, down):
    """sum_k factor_k down_k (silu(gate_k x) up_k x), a row at a time, in float64; an expert beyond the last is none."""
    x, factors, gate, up, down = (np.asarray(v, np.float64) for v in (x, factors, gate, up, down))
    y = np.zeros_like(x)
    for r, k in np.ndindex(*experts.shape):
        if (e := experts[r, k]) < len(gate):
            g = x[r] @ gate[e]
            y[r] += factors[r, k] * ((g / (1 + np.exp(-g)) * (x[r] @ up[e])) @ down[e])
    return y


def all_experts_under_a_mask(x, factors, experts, weights):
    """The same, differentiable, of all experts with all rows."""
    product = functools.partial(jnp.einsum, precision="highest")
    hidden = jax.nn.silu(product("rd,edf->ref", x, weights.gate)) * product("rd,edf->ref", x, weights.up)
    of_experts = jnp.sum(jax.nn.one_hot(experts, len(weights.gate)) * factors[..., None], axis=1)
    return product("re,ref,efd->rd", of_experts, hidden, weights.down)


def random_mixture(rows, top_k, number, seed=0, hidden=6, width=5, spread=3.0):
    """(x, factors, experts, Weights); some experts get nearly all rows, some none."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1, (rows, number)) + rng.normal(0, spread, number)
    experts = jnp.asarray(np.argsort(-logits, axis=-1)[:, :top_k])
    shapes = [(rows, hidden), (rows, top_k), *[(number, hidden, width)] * 2, (number, width, hidden)]
    x, factors, *weights = (jnp.asarray(rng.normal(0, 0.7, shape), jnp.float32) for shape in shapes)
    return x, factors, experts, Weights(*weights)


def gradients(mix, x, factors, experts, weights):
    """Of a random sum of the output, with respect to the rows, their factors and the weights."""
    cotangent = jnp.asarray(np.random.default_rng(1).normal(0, 1, x.shape), jnp.float32)
    return jax.jit(jax.grad(lambda x, f, w: jnp.sum(cotangent * mix(x, f, experts, w)), (0, 1, 2)))(x, factors, weights)


def assert_close(found, expected, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), found, expected)


@pytest.fixture
def by_kernel(monkeypatch):
    """As on a GPU, whose kernels are interpreted here."""
    sizes = dispatch._blocks
    monkeypatch.setattr(dispatch, "_blocks", lambda experts, number, _: sizes(experts, number, True))
    mix = swiglu.swiglu
    monkeypatch.setattr(dispatch, "swiglu", lambda *operands: mix(*operands[:-1], True))


@pytest.mark.parametrize(
    ("rows", "top_k", "number", "least"),
    [(18, 2, 4, 128), (1, 1, 8, 128), (21, 3, 3, 2), (40, 1, 5, 3), (30, 4, 16, 4)],
)
def test_equals_the_sum_over_experts_one_row_at_a_time(monkeypatch, rows, top_k, number, least):
    monkeypatch.setattr(dispatch, "LEAST_SLOTS", least)
    x, factors, experts, weights = random_mixture(rows, top_k, number)
    expected = mixed_by_hand(x, factors, experts, *weights.kernels)
    np.testing.assert_allclose(jax.jit(dispatch.mixed)(x, factors, experts, weights), expected, rtol=1e-5, atol=1e-6)


def test_a_slot_of_no_expert_adds_nothing():
    x, factors, experts, weights = random_mixture(20, 3, 5)
    experts = experts.at[::2, 1].set(5).at[3].set(5)
    expected = mixed_by_hand(x, factors, experts, *weights.kernels)
    np.testing.assert_allclose(jax.jit(dispatch.mixed)(x, factors, experts, weights), expected, rtol=1e-5, atol=1e-6)
    found = gradients(dispatch.mixed, x, factors, experts, weights)
    assert not np.asarray(found[1])[experts == 5].any()
    assert_close(found, gradients(all_experts_under_a_mask, x, factors, experts, weights), rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_all_experts_under_a_mask():
    mixture = random_mixture(18, 2, 4)
    expected = gradients(all_experts_under_a_mask, *mixture)
    assert_close(gradients(dispatch.mixed, *mixture), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("rows", "top_k", "number"), [(50, 2, 4), (3, 1, 6)])
def test_kernels_compute_the_same(by_kernel, rows, top_k, number):
    mixture = random_mixture(rows, top_k, number, hidden=32, width=48)
    x, factors, experts, weights = mixture
    by_hand = mixed_by_hand(x, factors, experts, *weights.kernels)
    np.testing.assert_allclose(jax.jit(dispatch.mixed)(*mixture), by_hand, rtol=1e-4, atol=1e-4)
    expected = gradients(all_experts_under_a_mask, *mixture)
    assert_close(gradients(dispatch.mixed, *mixture), expected, rtol=1e-3, atol=1e-3)


def test_kernels_are_mapped_over_rows_alone(by_kernel):
    """As for per-example gradients: one row each, with weights that are shared."""
    x, factors, experts, weights = random_mixture(3, 2, 4, hidden=16, width=16)

    def of_row(x, factors, experts):
        return gradients(dispatch.mixed, x[None], factors[None], experts[None], weights)[2]

    expected = jax.jit(lambda *rows: jax.lax.map(lambda row: of_row(*row), rows))(x, factors, experts)
    assert_close(jax.jit(jax.vmap(of_row))(x, factors, experts), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernels", [False, True])
def test_the_gradient_is_differentiated(request, kernels):
    """As directional derivatives do: the transpose of the gradient as a function of what it is a gradient of."""
    if kernels:
        request.getfixturevalue("by_kernel")
    x, factors, experts, weights = random_mixture(9, 2, 4, hidden=16, width=16)

    @functools.partial(jax.jit, static_argnums=0)
    def transposed(mix):
        y, gradient = jax.vjp(lambda x, w: mix(x, factors, experts, w), x, weights)
        _, transpose = jax.vjp(gradient, jnp.zeros_like(y))
        return transpose((x + 1, jax.tree.map(jnp.cos, weights)))

    assert_close(transposed(dispatch.mixed), transposed(all_experts_under_a_mask), rtol=1e-3, atol=1e-3)


def test_no_array_has_rows_times_experts_times_width():
    operands = random_mixture(128, 2, 16, hidden=8, width=8)
    text = str(jax.make_jaxpr(lambda *o: gradients(dispatch.mixed, *o))(*operands))
    largest = max(np.prod([int(n) for n in found.split(",")]) for found in _shapes(text))
    slots = 128 * 2
    assert largest <= 2 * slots * 8  # all slots, and no more than as much padding


def _shapes(jaxpr):
    return [part.split("]")[0] for part in jaxpr.split("[")[1:] if part.split("]")[0].replace(",", "").isdigit()]


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize(("rows", "top_k", "number"), [(16384, 8, 128), (32768, 2, 8)])
def test_padding_is_less_than_a_tenth_of_many_slots(rows, top_k, number, kernels):
    """On average: of each expert's last block half is padding, and blocks that are not used are left out."""
    experts = jnp.asarray(np.random.default_rng(0).integers(0, number, (rows, top_k)), jnp.int32)
    _, grouping, size = jax.jit(dispatch._blocks, static_argnums=(1, 2))(experts, number, kernels)
    assert rows * top_k <= grouping.used * size < 1.1 * rows * top_k


# Over a mesh.


def exchange(mesh, x, factors, experts, weights):
    rows, split = P(("data", "fsdp", "expert")), Weights(*(P("expert"),) * 3)
    exchanged = functools.partial(dispatch.exchanged, axis="expert")
    return map_rows(exchanged, (rows, rows, rows, split), rows)(x, factors, experts, weights)


@pytest.mark.parametrize(("devices", "spread"), [(2, 0.3), (4, 9.0), (8, 0.3), (8, 9.0)])
def test_experts_of_other_devices_compute_the_same(devices, spread):
    """With an even load, in one round; and where one device has nearly all of it, in several."""
    mixture = random_mixture(64, 2, 8, spread=spread)
    with jax.set_mesh(make_mesh({"fsdp": 8 // devices, "expert": devices})) as mesh:
        mix = functools.partial(exchange, mesh)
        np.testing.assert_allclose(jax.jit(mix)(*mixture), jax.jit(dispatch.mixed)(*mixture), rtol=1e-5, atol=1e-5)
        found = gradients(mix, *mixture)
    assert_close(found, gradients(dispatch.mixed, *mixture), rtol=1e-5, atol=2e-5)


def test_nothing_is_dropped_where_all_go_to_one_expert():
    x, factors, experts, weights = random_mixture(64, 1, 8)
    experts = jnp.full_like(experts, 5)
    with jax.set_mesh(make_mesh({"expert": 8})) as mesh:
        found = jax.jit(functools.partial(exchange, mesh))(x, factors, experts, weights)
    np.testing.assert_allclose(found, mixed_by_hand(x, factors, experts, *weights.kernels), rtol=1e-5, atol=1e-5)
