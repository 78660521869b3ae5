"""Every form of per-example gradients against materialised ones and float64 algebra."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dataflex_jax.data.batch import Batch
from dataflex_jax.models.config import REMAT_POLICIES
from dataflex_jax.models.model import Model
from dataflex_jax.policies.signals import Projection
from dataflex_jax.signals.gradients import directional_derivatives, gradient_features, gradient_norms
from dataflex_jax.signals.moments import adam_moments
from dataflex_jax.signals.rows import named_leaves
from tests.helpers.gradient_model import (
    ADAPTED,
    BETAS,
    MODEL,
    adam_by_hand,
    assert_same,
    batch_of,
    build,
    expected_features,
    materialised,
    random_moments,
)

KERNELS = {f"layers/attention/{name}_proj/kernel" for name in "qkvo"} | {
    f"layers/mlp/{name}_proj/kernel" for name in ("gate", "up", "down")
}
# A size that no width divides, and less than a layer has.
DIM = 60


@functools.cache
def jitted(projection, parameters=None, example_loss=None):
    return jax.jit(gradient_features(projection, parameters=parameters, example_loss=example_loss))


def compute(cfg, projection, batch, moments=None, **options):
    return jitted(projection, **options)(build(cfg), batch, moments)


@functools.cache
def reference(cfg):
    """Materialised gradients of what is projected by default."""
    gradients = materialised(build(cfg), batch_of())
    return gradients if cfg.lora else {path: gradients[path] for path in gradients if path in KERNELS}


@pytest.mark.parametrize(
    ("cfg", "method"),
    [
        (MODEL, "sketch"),
        (MODEL, "kronecker"),
        pytest.param(ADAPTED, "kronecker", marks=pytest.mark.slow),
        pytest.param(ADAPTED, "rademacher", marks=pytest.mark.slow),
    ],
    ids=["full-sketch", "full-kronecker", "lora-kronecker", "lora-rademacher"],
)
def test_features_are_the_projections_of_the_gradients(cfg, method):
    projection = Projection(method, DIM)
    got = compute(cfg, projection, batch_of())
    assert (got.shape, got.dtype) == ((4, DIM), jnp.float32)
    assert_same(got, expected_features(projection, reference(cfg)))
    assert not np.any(got[-1])  # a row without targets


@pytest.mark.parametrize(
    ("cfg", "method"),
    [(MODEL, "sketch"), (ADAPTED, "sketch"), pytest.param(MODEL, "rademacher", marks=pytest.mark.slow)],
    ids=["full-sketch", "lora-sketch", "full-rademacher"],
)
def test_features_with_adam_are_the_projections_of_its_steps(cfg, method):
    projection = Projection(method, DIM)
    moments = random_moments(build(cfg).params)
    assert_same(compute(cfg, projection, batch_of(), moments), expected_features(projection, reference(cfg), moments))


@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("eps_mode", ["outside", "inside"])
def test_nothing_is_lost_without_a_projection(eps_mode, bias_correction):
    moments = random_moments(build(ADAPTED).params, eps_mode=eps_mode, bias_correction=bias_correction, eps=1e-3)
    got = compute(ADAPTED, Projection("none"), batch_of(), moments)
    gradients = reference(ADAPTED)
    expected = [adam_by_hand(np.asarray(gradients[path], np.float64), moments, path) for path in gradients]
    assert_same(got, np.concatenate([part.reshape(4, -1) for part in expected], axis=1))
    assert got.shape[1] == ADAPTED.num_lora_params()


@pytest.mark.slow
def test_any_parameter_can_be_chosen():
    """Among them one outside the layers that is used twice, vectors, and those of single modules."""
    cfg = dataclasses.replace(MODEL, tie_word_embeddings=True, vocab_size=64)
    chosen = {"embed_tokens/embedding", "norm/scale", "layers/input_layernorm/scale", "layers/attention/q_proj/bias"}
    gradients = materialised(build(cfg), batch_of())
    gradients = {path: gradients[path] for path in gradients if path in chosen}
    assert gradients.keys() == chosen
    moments, projection = random_moments(build(cfg).params), Projection("sketch", DIM)
    got = compute(cfg, projection, batch_of(), moments, parameters=chosen.__contains__)
    assert_same(got, expected_features(projection, gradients, moments))
    got = compute(cfg, Projection("none"), batch_of(), parameters=chosen.__contains__)
    assert_same(got, np.concatenate([np.asarray(g).reshape(4, -1) for g in gradients.values()], axis=1))

    one = "layers/mlp/up_proj/kernel"
    got = compute(MODEL, Projection("kronecker", DIM), batch_of(), parameters=one.__eq__)
    assert_same(got, expected_features(Projection("kronecker", DIM), {one: reference(MODEL)[one]}))


@pytest.mark.parametrize(
    ("method", "remat"),
    [pytest.param("sketch", remat, marks=pytest.mark.slow) for remat in REMAT_POLICIES if remat != MODEL.remat]
    + [("kronecker", "none")],
)
def test_remat_changes_nothing(method, remat):
    cfg, projection = dataclasses.replace(MODEL, remat=remat), Projection(method, DIM)
    moments = random_moments(build(cfg).params) if method == "sketch" else None
    assert_same(compute(cfg, projection, batch_of(), moments), expected_features(projection, reference(MODEL), moments))


@pytest.mark.parametrize("method", ["sketch", "kronecker"])
def test_bfloat16_compute_stays_near_float32(method):
    projection = Projection(method, DIM)
    expected = compute(MODEL, projection, batch_of())
    got = compute(dataclasses.replace(MODEL, dtype="bfloat16"), projection, batch_of())
    assert got.dtype == jnp.float32
    error = np.linalg.norm(got - expected, axis=1) / np.linalg.norm(expected, axis=1).max()
    assert 0 < error.max() < 0.1


@pytest.mark.parametrize("method", ["sketch", "kronecker"])
def test_neither_the_batch_nor_the_padding_changes_a_row(method):
    projection, batch = Projection(method, DIM), batch_of()
    moments = None if method == "kronecker" else random_moments(build(MODEL).params)
    expected = compute(MODEL, projection, batch, moments)
    order = np.array([2, 0])
    longer = jax.tree.map(lambda x: jnp.pad(x[order], ((0, 0), (0, 7))[: x.ndim]), batch)
    longer = dataclasses.replace(longer, tokens=longer.tokens.at[:, 13:].set(9))
    assert_same(compute(MODEL, projection, longer, moments), expected[order])


@pytest.mark.parametrize("method", ["sketch", "kronecker"])
def test_losses_of_ones_own(method):
    projection, batch = Projection(method, DIM), batch_of()
    expected = compute(MODEL, projection, batch)
    # REINFORCE: a reward for the sum of the log-probabilities, which a field of the batch holds for every token.
    rewards, counts = np.array([2.0, -0.5, 0.0, 1.0])[:, None], np.asarray(batch.row_tokens)[:, None]

    def own(losses, row):
        return jnp.sum(losses * row.mask * row.reference_losses)

    with_rewards = dataclasses.replace(batch, reference_losses=jnp.asarray(rewards * np.ones(batch.mask.shape)))
    assert_same(compute(MODEL, projection, with_rewards, example_loss=own), rewards * counts * expected)


@pytest.mark.parametrize("cfg", [MODEL, ADAPTED], ids=["full", "lora"])
def test_norms_are_those_of_the_gradients(cfg):
    got = jax.jit(gradient_norms())(build(cfg), batch_of())
    parts = [np.asarray(part, np.float64).reshape(4, -1) for part in reference(cfg).values()]
    np.testing.assert_allclose(got, np.linalg.norm(np.concatenate(parts, axis=1), axis=1), rtol=1e-5)
    assert got.shape == (4,)
    one = next(iter(reference(cfg)))
    got = jax.jit(gradient_norms(parameters=one.__eq__))(build(cfg), batch_of())
    np.testing.assert_allclose(got, np.linalg.norm(parts[0], axis=1), rtol=1e-5)


@pytest.mark.parametrize(
    "cfg",
    [ADAPTED, dataclasses.replace(MODEL, tie_word_embeddings=True, remat="dots")],
    ids=["lora", "tied"],
)
def test_directional_derivatives_are_inner_products(cfg):
    """With all trained parameters, those outside the layers too."""
    model, rng = build(cfg), np.random.default_rng(2)
    directions = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=(2, *x.shape)), jnp.float32), model.params)
    got = jax.jit(directional_derivatives)(model, batch_of(), directions)
    gradients = materialised(model, batch_of())
    flat = [np.asarray(gradients[path], np.float64).reshape(4, -1) for path in gradients]
    along = [np.asarray(named_leaves(directions)[path], np.float64).reshape(2, -1) for path in gradients]
    expected = np.concatenate(flat, axis=1) @ np.concatenate(along, axis=1).T
    assert_same(got, expected)
    assert np.abs(expected[:-1]).min() > 0


# What is alive, and what is computed.


def compiled(cfg, method, rows=8, length=16):
    model = jax.eval_shape(functools.partial(Model.random, cfg), jax.random.key(0))
    state = jax.eval_shape(optax.adam(0.1).init, model.params)
    per_row = jax.ShapeDtypeStruct((rows,), jnp.int32)
    batch = Batch(
        tokens=jax.ShapeDtypeStruct((rows, length + 1), jnp.int32),
        mask=jax.ShapeDtypeStruct((rows, length), jnp.float32),
        lengths=per_row,
        domain=per_row,
    )
    moments = None if method == "kronecker" else adam_moments(state, **BETAS)
    return jax.jit(gradient_features(Projection(method, 128))).lower(model, batch, moments).compile()


@pytest.mark.parametrize("remat", ["full", pytest.param("none", marks=pytest.mark.slow)])
def test_one_layers_gradients_are_alive_at_a_time(remat):
    """More layers cost activations, but neither gradients nor moments nor weights of more than one layer."""
    wide = dataclasses.replace(MODEL, hidden_size=64, intermediate_size=128, remat=remat)
    few, many = (
        compiled(dataclasses.replace(wide, num_hidden_layers=n), "sketch").memory_analysis().temp_size_in_bytes
        for n in (2, 12)
    )
    kernels = 4 * sum(a * b for a, b in wide.linear_widths().values())
    kept = {"full": 64, "none": 2000}[remat]  # numbers of activations a token
    assert (many - few) / 10 < 4 * 8 * 16 * kept + 0.2 * kernels
    assert few < {"full": 3.5, "none": 5}[remat] * 8 * kernels


@pytest.mark.parametrize("method", ["sketch", "kronecker"])
def test_no_gradient_is_computed_that_nobody_reads(method):
    """Not the head's; in the kronecker form not the blocks' either, neither the rows' nor their sum."""
    cfg = dataclasses.replace(MODEL, hidden_size=64, intermediate_size=136, vocab_size=320)
    text = compiled(cfg, method, rows=8, length=30).as_text()
    made = {
        tuple(map(int, match[1].split(",")))
        for match in re.finditer(r"= [a-z]+\d+\[([\d,]+)\]\S* (?:dot|custom-call)\(", text)
    }

    def any_made(inputs, outputs):
        return any({inputs, outputs} == set(shape[-2:]) for shape in made if len(shape) > 1)

    assert made
    assert not any_made(64, 320)
    assert any_made(64, 136) == (method == "sketch")


# What is refused.


def test_what_cannot_be_served_is_refused():
    model, batch = build(MODEL), batch_of()
    with pytest.raises(ValueError, match=r"^moments: .*'kronecker'"):
        gradient_features(Projection("kronecker", DIM))(model, batch, random_moments(model.params))
    with pytest.raises(ValueError, match=r"^parameters: layers/input_layernorm/scale is not a matrix"):
        gradient_features(Projection("kronecker", DIM), parameters=lambda path: path.endswith("scale"))(model, batch)
    with pytest.raises(ValueError, match=r"^parameters: select none"):
        gradient_features(Projection(), parameters=lambda _: False)(model, batch)
    with pytest.raises(ValueError, match=r"^method = 'dense'"):
        gradient_features(Projection("dense"))
    with pytest.raises(ValueError, match=r"^moments: has none of layers/"):
        gradient_features(Projection("sketch", DIM))(model, batch, random_moments(build(ADAPTED).params))
