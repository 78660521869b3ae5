"""The inner products of the domains' gradients that DoGE goes by, on one device and on eight, and written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dataflex_jax.signals.model import domain_gram

from dataflex_jax.data.domains import open_domains
from dataflex_jax.models import decoder
from dataflex_jax.models.hf.resolve import model_config
from dataflex_jax.models.layout import param_shardings
from dataflex_jax.sharding import make_mesh, replicated
from tests.helpers import policy_runs, tiny

ROWS = 8


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """(graphdef, parameters, {tokens [K, B, T+1], mask [K, B, T]}) of a run's model and first rows."""
    config = policy_runs.config(tiny.write_domains(tmp_path_factory.mktemp("data") / "domains"))
    domains, tokenizer = open_domains(config.data)
    create = functools.partial(decoder.create, model_config(config.model, tokenizer.vocab_size))
    graphdef, params = jax.jit(create)(jax.random.key(0))
    tokens = np.stack([[domain.train.row(i).tokens for i in range(ROWS)] for domain in domains])
    mask = np.random.default_rng(0).random((*tokens.shape[:2], tokens.shape[2] - 1)) < 0.8
    return graphdef, jax.device_get(params), {"tokens": tokens, "mask": mask.astype(np.float32)}


def written_out(graphdef, params, batches):
    """Each domain's flat gradient of its token-mean loss, in float64."""

    @jax.jit
    @jax.grad
    def gradient(params, tokens, mask):
        losses, _ = decoder.token_losses(graphdef, params, tokens)
        return jnp.sum(mask * losses) / jnp.sum(mask)

    each = [gradient(params, *rows) for rows in zip(batches["tokens"], batches["mask"], strict=True)]
    return np.stack([np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(g)]) for g in each]).astype(np.float64)


@pytest.mark.parametrize("devices", [1, 8])
def test_inner_products_are_those_of_the_written_out_gradients(opened, devices):
    graphdef, params, batches = opened
    flat = written_out(graphdef, params, batches)
    target = {name: values[1, ::-1] for name, values in batches.items()}
    along = flat @ flat[1]
    mesh = make_mesh({"fsdp": devices}, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        params = jax.device_put(params, param_shardings(mesh, params))
        batches, target = jax.device_put((batches, target), replicated(mesh))
        gram, along_target = domain_gram(graphdef, params, None, batches, target)
    scale = np.abs(flat @ flat.T).max()
    np.testing.assert_allclose(gram, flat @ flat.T, atol=1e-5 * scale)
    np.testing.assert_allclose(along_target, along, atol=1e-5 * scale)
