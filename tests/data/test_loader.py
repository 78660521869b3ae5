"""Batches are exactly the planned rows; held-out rows cover the split once."""

import jax
import numpy as np
import pytest

from dataflex_jax.data.domains import open_domains
from dataflex_jax.data.loader import Loader, held_out_batches
from dataflex_jax.data.pool import Pool
from dataflex_jax.data.sampler import Plan
from dataflex_jax.data.window import Sequences, shuffled_epochs
from dataflex_jax.sharding import make_mesh
from tests.helpers import tiny

SEQ_LEN = 32


@pytest.fixture(scope="module")
def domains(tmp_path_factory):
    root = tiny.write_domains(tmp_path_factory.mktemp("data") / "domains")
    return open_domains(tiny.config(root).data, progress=False)[0]


@pytest.fixture(scope="module")
def stores(domains):
    return [domain.store for domain in domains]


def loaded(domains, mesh, plan):
    pool = Pool(domains)
    return Loader(pool, mesh).load(Sequences(pool.groups(by_domain=True), 0).ids(plan), plan.drawn_with)


def test_a_batch_holds_the_planned_rows_of_the_planned_domains(domains, stores):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    rng = np.random.default_rng(0)
    plan = Plan(1, rng.integers(0, 3, 8), rng.integers(0, 500, 8), np.array([0.2, 0.3, 0.5]))
    batch = loaded(domains, mesh, plan)
    assert batch.tokens.sharding.shard_shape((8, SEQ_LEN + 1)) == (2, SEQ_LEN + 1)
    np.testing.assert_array_equal(batch.domain, plan.domains)
    np.testing.assert_allclose(batch.drawn_with, plan.drawn_with, rtol=1e-6)
    assert np.asarray(batch.mask).all()
    for b, (domain, position) in enumerate(zip(plan.domains, plan.positions, strict=True)):
        tokens = stores[domain].train
        i = shuffled_epochs(range(tokens.num_rows(SEQ_LEN)), stores[domain].name, 0)[int(position)]
        np.testing.assert_array_equal(batch.tokens[b], tokens.row(i, SEQ_LEN))


def test_an_epoch_is_a_permutation_and_the_next_one_is_another():
    epochs = shuffled_epochs(range(50), "name", 3)
    first, second = [epochs[i] for i in range(50)], [epochs[i] for i in range(50, 100)]
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert first != [shuffled_epochs(range(50), "other", 3)[i] for i in range(50)]
    assert first == [shuffled_epochs(range(50), "name", 3)[i] for i in range(50)]


def test_held_out_batches_predict_every_held_out_token_once(domains, stores):
    mesh = make_mesh({"fsdp": 8})
    predicted = {k: [] for k in range(3)}
    for batch in held_out_batches(domains, 8, 10_000, mesh):
        tokens, mask, domains = map(np.asarray, (batch.tokens, batch.mask, batch.domain))
        for row, weights, domain in zip(tokens, mask, domains, strict=True):
            predicted[int(domain)] += row[1:][weights == 1].tolist()
    for k, store in enumerate(stores):
        assert store.valid.num_tokens > 1
        assert predicted[k] == store.valid.tokens[1:].tolist()


def test_held_out_rows_are_capped_per_domain(domains):
    batches = list(held_out_batches(domains, 8, 2, make_mesh({"fsdp": 8})))
    rows = sum(int(np.asarray(b.mask).any(axis=1).sum()) for b in batches)
    assert rows == 6


def test_training_and_held_out_text_are_disjoint(stores):
    """The peer's held-out rows leak into training."""
    for store in stores:
        eos = store.train.tokens[-1]
        documents = [
            {tuple(d) for d in np.split(a.tokens, np.flatnonzero(a.tokens == eos) + 1) if len(d)}
            for a in (store.train, store.valid)
        ]
        assert documents[0]
        assert documents[1]
        assert not documents[0] & documents[1]


def test_a_loader_of_one_device_gives_the_same_rows(domains):
    plan = Plan(1, np.arange(8) % 3, np.arange(8), np.ones(3) / 3)
    meshes = [make_mesh({"fsdp": 8}), make_mesh({}, devices=jax.devices()[:1])]
    tokens = [np.asarray(loaded(domains, mesh, plan).tokens) for mesh in meshes]
    np.testing.assert_array_equal(*tokens)
