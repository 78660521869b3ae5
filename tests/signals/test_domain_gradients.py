"""The inner products of the domains' gradients that DoGE goes by, on one device and on eight, and written out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.data.batch import collated
from dataflex_jax.data.domains import open_domains
from dataflex_jax.models.hf.resolve import model_config
from dataflex_jax.models.layout import param_shardings
from dataflex_jax.models.model import Model
from dataflex_jax.sharding import make_mesh, replicated
from dataflex_jax.signals.domain_gradients import domain_gram
from tests.helpers import policy_runs, tiny

ROWS = 8


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """(the model, the batches [K, B, ...]) of a run's first rows."""
    config = policy_runs.config(tiny.write_domains(tmp_path_factory.mktemp("data") / "domains"))
    domains, tokenizer = open_domains(config.data)
    cfg = model_config(config.model, tokenizer.vocab_size)
    model = jax.jit(Model.random, static_argnums=0)(cfg, jax.random.key(0))
    batches = [
        collated([domain.train.row(i) for i in range(ROWS)], config.data.seq_len, [k] * ROWS)
        for k, domain in enumerate(domains)
    ]
    batches = jax.tree.map(lambda *values: np.stack(values), *batches)
    mask = np.random.default_rng(0).random(batches.mask.shape) < 0.8
    return jax.device_get(model), dataclasses.replace(batches, mask=mask.astype(np.float32))


def written_out(model, batches):
    """Each domain's flat gradient of its token-mean loss, in float64."""

    @jax.jit
    @jax.grad
    def gradient(params, batch):
        losses = model.having(params).token_losses(batch).losses
        return jnp.sum(batch.mask * losses) / jnp.sum(batch.mask)

    each = [gradient(model.params, jax.tree.map(lambda x: x[k], batches)) for k in range(len(batches.tokens))]  # noqa: B023
    return np.stack([np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(g)]) for g in each]).astype(np.float64)


@pytest.mark.parametrize("devices", [1, 8])
def test_inner_products_are_those_of_the_written_out_gradients(opened, devices):
    model, batches = opened
    flat = written_out(model, batches)
    target = jax.tree.map(lambda x: x[1, ::-1], batches)
    along = flat @ flat[1]
    mesh = make_mesh({"fsdp": devices}, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        model = model.having(jax.device_put(model.params, param_shardings(mesh, model.params)))
        batches, target = jax.device_put((batches, target), replicated(mesh))
        gram, along_target = domain_gram(model, batches, target)
    scale = np.abs(flat @ flat.T).max()
    np.testing.assert_allclose(gram, flat @ flat.T, atol=1e-5 * scale)
    np.testing.assert_allclose(along_target, along, atol=1e-5 * scale)
