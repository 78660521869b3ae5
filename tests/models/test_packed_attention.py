"""Packed rows on cuDNN: what it is given is the mask of the segment ids, and all around its call is right."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from dataflex_jax.aot import compiler
from dataflex_jax.aot.cards import CARDS
from dataflex_jax.models import attention, packed_attention
from dataflex_jax.models.attention import causal_attention
from dataflex_jax.models.decoder import Hooks
from dataflex_jax.models.layout import param_shardings
from dataflex_jax.models.packed_attention import lengths_and_offsets, segment_lengths
from dataflex_jax.policies.signals import Projection
from dataflex_jax.sharding import batch_sharding, make_mesh
from dataflex_jax.signals.gradients import gradient_features
from tests.helpers.tiny_model import MODEL, batch_of, created

MOST = 8


def packings(rows, length, seed):
    """Segment ids of rows: from 1, then padding's 0; the first row is full, the last one all padding."""
    random = np.random.default_rng(seed)
    ids = np.zeros((rows, length), np.int32)
    for row in range(rows - 1):
        filled = length if row == 0 else int(random.integers(1, length + 1))
        count = min(int(random.integers(1, MOST)), filled)
        ends = np.sort(random.choice(np.arange(1, filled), count - 1, replace=False)) if count > 1 else []
        for number, part in enumerate(np.split(np.arange(filled), ends), start=1):
            ids[row, part] = number
    return ids


def mask_of(ids):
    """[B, T, T]: query t sees key s."""
    places = np.arange(ids.shape[1])
    return (ids[:, :, None] == ids[:, None]) & (places[:, None] >= places)


def as_cudnn_reads(lengths, query_offsets, key_offsets, query_shape, key_shape):
    """The mask over all tokens of a batch, and how often each query is written.

    Segment i has `lengths[i]` tokens from an offset in numbers, wherever the row ends; all arrays are flat.
    """
    tokens = query_shape[0] * query_shape[1]
    seen, written = np.zeros((tokens, tokens), bool), np.zeros(tokens, int)
    for i, length in enumerate(lengths.tolist()):
        first_query, first_key = query_offsets[i] // np.prod(query_shape[2:]), key_offsets[i] // np.prod(key_shape[2:])
        for t in range(length):
            seen[first_query + t, first_key : first_key + t + 1] = True
            written[first_query + t] += 1
    return seen, written


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("key_heads", [6, 2])
def test_what_cudnn_is_given_is_the_mask_of_the_segment_ids(seed, key_heads):
    ids = packings(5, 23, seed)
    handed = {}

    def caught(query, key, value, **options):
        handed.update(options, query=query, key=key)
        return query, None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cudnn, "dot_product_attention", caught)
        query, key = jnp.zeros((5, 23, 6, 8)), jnp.zeros((5, 23, key_heads, 8))
        packed_attention._on_one_device(query, key, key, segment_lengths(jnp.asarray(ids), MOST))
    assert handed["mask_type"] is cudnn.MaskType.PADDING_CAUSAL
    names = ("q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets", "query", "key")
    # What JAX itself makes of them before cuDNN has them.
    fixed = [np.asarray(x).ravel() for x in cudnn._fix_seqlen_offsets(*(handed[name] for name in names))]
    np.testing.assert_array_equal(fixed[0], fixed[1])
    seen, written = as_cudnn_reads(fixed[0], *fixed[2:], handed["query"].shape, handed["key"].shape)
    np.testing.assert_array_equal(written, 1)
    expected = np.zeros_like(seen)
    for row, mask in enumerate(mask_of(ids)):
        part = slice(row * 23, (row + 1) * 23)
        expected[part, part] = mask
    np.testing.assert_array_equal(seen, expected)


def test_lengths_are_of_the_runs_in_their_order():
    ids = jnp.array([[1, 1, 2, 2, 2, 0], [5, 5, 5, 5, 5, 5], [0, 0, 0, 0, 0, 0], [1, 2, 3, 4, 0, 0]])
    lengths = segment_lengths(ids, 5)
    np.testing.assert_array_equal(lengths, [[2, 3, 1, 0, 0], [6, 0, 0, 0, 0], [6, 0, 0, 0, 0], [1, 1, 1, 1, 2]])
    of_segments, offsets = lengths_and_offsets(lengths)
    np.testing.assert_array_equal(of_segments[0], [2, 3, 1, -1, -1])
    np.testing.assert_array_equal(offsets, [[0, 2, 5, -1, -1, -1], *[[0, *[-1] * 5]] * 2, [0, 1, 2, 3, 4, -1]])


def stand_in(
    query, key, value, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type, qkv_layout, return_residual
):
    """cuDNN's attention by XLA; NaN for tokens that no segment has."""
    del kv_seqlen, kv_offsets
    assert (mask_type, qkv_layout, return_residual) == (cudnn.MaskType.PADDING_CAUSAL, "BTNH", True)
    starts, places = q_offsets[:, :-1, None], jnp.arange(query.shape[1])
    inside = (starts >= 0) & (starts <= places) & (places < starts + q_seqlen[..., None])
    mask = jnp.einsum("bmt,bms->bts", inside.astype(int), inside.astype(int))[:, None] > 0
    attended = jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=True, scale=scale)
    return jnp.where(inside.any(1)[..., None, None], attended, jnp.nan), jnp.zeros(())


@pytest.fixture
def _stand_in(monkeypatch):
    monkeypatch.setattr(cudnn, "dot_product_attention", stand_in)
    chosen = attention.choose_implementation
    hopper = {"backend": "gpu", "hopper": True, "dtype": jnp.bfloat16, "head_dim": 64}
    monkeypatch.setattr(
        attention, "choose_implementation", lambda requested, **fields: chosen(requested, **(fields | hopper))
    )


def rows_of(rows=8, length=24, seed=3):
    ids = packings(rows, length, seed)
    positions = np.concatenate([np.zeros((rows, 1), int), ids[:, 1:] != ids[:, :-1]], axis=1)
    starts = np.maximum.accumulate(np.where(positions, np.arange(length), 0), axis=1)
    tokens = jax.random.randint(jax.random.key(seed), (rows, length + 1), 0, 64)
    return batch_of(
        tokens,
        segment_ids=jnp.asarray(ids),
        positions=jnp.asarray(np.arange(length) - starts, jnp.int32),
        mask=jnp.asarray(ids > 0, jnp.float32),
        most_segments=MOST,
    )


def model_of(**fields):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return created(dataclasses.replace(MODEL, **heads, head_dim=8, **fields))


def loss_and_gradient(model, batch):
    def loss(params):
        losses = model.with_params(params).token_losses(batch, Hooks()).losses
        return jnp.sum(batch.mask * losses) / jnp.sum(batch.mask), losses

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(model.params)


def assert_close(actual, expected, tolerance=2e-5):
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)


@functools.cache
def by_xla():
    return loss_and_gradient(model_of(attention="xla"), rows_of())


@pytest.mark.parametrize("remat", [pytest.param("none", marks=pytest.mark.slow), "dots"])
@pytest.mark.usefixtures("_stand_in")
def test_losses_and_gradients_are_those_of_xlas_attention(remat):
    assert_close(loss_and_gradient(model_of(attention="cudnn", remat=remat), rows_of()), by_xla())


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "tensor": 4}])
@pytest.mark.usefixtures("_stand_in")
def test_a_mesh_splits_rows_and_heads(sizes):
    """The last one has more parts than there are key heads."""
    mesh, model = make_mesh(sizes), model_of(attention="cudnn", remat="full")
    with jax.set_mesh(mesh):
        model = jax.device_put(model, param_shardings(mesh, model))
        actual = loss_and_gradient(model, jax.device_put(rows_of(), batch_sharding(mesh)))
    assert_close(actual, by_xla())


@pytest.mark.parametrize("sizes", [pytest.param(None, marks=pytest.mark.slow), {"fsdp": 8}])
@pytest.mark.usefixtures("_stand_in")
def test_rows_under_vmap_are_more_rows(sizes):
    batch, features = rows_of(), gradient_features(Projection("none", 1))
    expected = jax.jit(features)(model_of(attention="xla"), batch)
    model = model_of(attention="cudnn")
    if sizes is None:
        actual = jax.jit(features)(model, batch)
    else:
        mesh = make_mesh(sizes)
        with jax.set_mesh(mesh):
            model = jax.device_put(model, param_shardings(mesh, model))
            actual = jax.jit(features)(model, jax.device_put(batch, batch_sharding(mesh)))
    assert_close(actual, expected)


def attended_and_gradients(implementation):
    """Of queries, keys, values [.., H], segment ids and the output's gradient."""

    def of(query, key, value, ids, gradient):
        def attend(*projected):
            return causal_attention(*projected, segment_ids=ids, most_segments=MOST, implementation=implementation)

        attended, transposed = jax.vjp(attend, query, key, value)
        return attended, *transposed(gradient)

    return of


@pytest.mark.skipif(compiler.missing() is not None, reason=str(compiler.missing()))
def test_it_compiles_for_hopper_and_stays_xlas_on_ampere():
    """With rows and heads split, over more devices than there are key heads."""
    programs = {}
    for name in ("h100", "a100"):
        card = CARDS[name]
        mesh = make_mesh({"fsdp": 2, "tensor": 4}, card.devices(8))
        split = batch_sharding(mesh)
        shapes = [(4, 128, heads, 64) for heads in (4, 2, 2, 4)]
        query, key, value, gradient = (jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=split) for s in shapes)
        ids = jax.ShapeDtypeStruct((4, 128), jnp.int32, sharding=split)
        arguments = (query, key, value, ids, gradient)
        programs[name] = compiler.lowered(jax.jit(attended_and_gradients("auto")), arguments, mesh, card)
    assert "fmha" not in programs["a100"].as_text()
    text = programs["h100"].compile().as_text()
    calls = re.findall(
        r'custom_call_target="(__cudnn\$fmha\w+)".*"mask_type": ?"(\w+)".*"max_seg_per_batch": ?(\d+)', text
    )
    names = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")
    assert set(calls) == {(name, "PADDING_CAUSAL", str(MOST)) for name in names}


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
def test_on_a_gpu_it_is_xlas_attention(seed, heads):
    """As near to the float32 values as XLA's own in bfloat16, forward and backward."""
    ids, keys = jnp.asarray(packings(4, 256, seed)), jax.random.split(jax.random.key(seed), 4)
    of = (heads[0], heads[1], heads[1], heads[0])
    arrays = [jax.random.normal(key, (4, 256, count, 64), jnp.bfloat16) for key, count in zip(keys, of, strict=True)]

    def computed(implementation, dtype):
        query, key, value, gradient = (x.astype(dtype) for x in arrays)
        found = jax.jit(attended_and_gradients(implementation))(query, key, value, ids, gradient)
        return [np.asarray(x, np.float32) for x in found]

    with jax.default_matmul_precision("highest"):  # a GPU's products of float32 are otherwise in TF32
        exact = computed("xla", jnp.float32)
    by_xla = computed("xla", jnp.bfloat16)
    # In a dry run, without a GPU, the comparison itself is tried.
    packed = computed("cudnn" if jax.default_backend() == "gpu" else "auto", jnp.bfloat16)
    for want, usual, got in zip(exact, by_xla, packed, strict=True):
        scale = np.abs(want).max()
        assert np.abs(got - want).max() <= 2 * np.abs(usual - want).max() + 2**-8 * scale
