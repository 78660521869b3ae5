"""Sweeps: results by row, the same at every batch size, on every mesh, in every length bucket and order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.data import loader
from dataflex_jax.data.domains import open_domains
from dataflex_jax.data.pool import Pool
from dataflex_jax.errors import InputError
from dataflex_jax.policies.selectors.less import less
from dataflex_jax.policies.selectors.rds import rds
from dataflex_jax.policies.signals import Losses
from dataflex_jax.sharding import make_mesh, replicated
from dataflex_jax.signals import sweep
from dataflex_jax.signals.sweep import Sweeper
from tests.helpers import tiny_chat

MESHES = {"one": {}, "fsdp": {"fsdp": 8}, "all": {"data": 2, "fsdp": 2, "tensor": 2}}
MODEL = {"model__tie_word_embeddings": False, "model__num_key_value_heads": 2}


def mesh_of(name):
    return make_mesh(MESHES[name], jax.devices()[:1] if name == "one" else None)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """buckets -> (config, domains, tokenizer) of the same examples."""
    root = tiny_chat.write_questions(tmp_path_factory.mktemp("data") / "questions")

    def open_with(buckets=(48,)):
        config = tiny_chat.config(root, data__buckets=buckets, **MODEL)
        return config, *open_domains(config.data, progress=False)

    return functools.cache(open_with)


def signals(opened, mesh, *, rows=16, buckets=(48,), change=lambda params: params):
    return tiny_chat.model_signals(*opened(buckets), mesh, rows=rows, change=change)


def less_scores(of, projection="exact"):
    return np.asarray(less(projection=projection, proj_dim=32).score({}, of, None)[0].rows)


@pytest.fixture(scope="module")
def expected(opened):
    mesh = mesh_of("fsdp")
    with jax.set_mesh(mesh):
        of = signals(opened, mesh)
        return of.candidates.sweep(Losses()), {method: less_scores(of, method) for method in ("exact", "sketch")}


@pytest.mark.parametrize(
    ("mesh", "rows", "buckets"),
    [("one", 5, (24, 32, 48)), ("fsdp", 40, (64,)), ("all", None, (48,)), ("all", 5, (24, 32, 48))],
)
def test_losses_depend_on_nothing_but_their_row(opened, expected, mesh, rows, buckets):
    mesh = mesh_of(mesh)
    with jax.set_mesh(mesh):
        of = signals(opened, mesh, rows=rows, buckets=buckets)
        np.testing.assert_allclose(of.candidates.sweep(Losses()), expected[0], rtol=1e-5)
        order = np.random.default_rng(0).permutation(of.candidates.num_rows)
        np.testing.assert_allclose(of.candidates.sweep(Losses(), order), expected[0][order], rtol=1e-5)
        np.testing.assert_allclose(of.candidates.sweep(Losses(), order[:3]), expected[0][order[:3]], rtol=1e-5)


@pytest.mark.parametrize(
    ("mesh", "rows", "buckets", "projection"),
    [("one", 5, (48,), "exact"), ("all", 40, (64,), "exact"), ("all", 40, (64,), "sketch")],
)
def test_influences_depend_on_nothing_but_their_row(opened, expected, mesh, rows, buckets, projection):
    mesh = mesh_of(mesh)
    with jax.set_mesh(mesh):
        of = signals(opened, mesh, rows=rows, buckets=buckets)
        np.testing.assert_allclose(less_scores(of, projection), expected[1][projection], rtol=0, atol=1e-5)
    assert np.ptp(expected[1][projection]) > 0.1


def test_influences_do_not_depend_on_the_order_of_candidates(opened, expected):
    mesh = mesh_of("fsdp")
    with jax.set_mesh(mesh):
        of = signals(opened, mesh)
        order, original = np.random.default_rng(0).permutation(of.candidates.num_rows), of.candidates.sweep
        of.candidates.sweep = lambda signal, operand: original(signal, order, operand)
        np.testing.assert_allclose(less_scores(of), expected[1]["exact"][order], rtol=0, atol=1e-6)


def test_a_row_that_is_not_finite_spoils_no_other(opened, expected):
    """The embedding of a byte that only some candidates have."""
    mesh = mesh_of("fsdp")
    _, domains, tokenizer = opened()
    ((byte,),) = tokenizer.encode_batch(["h"])

    def change(params):
        table = params["embed_tokens"]["embedding"].at[byte].set(jnp.nan)
        return params | {"embed_tokens": {"embedding": table}}

    pool = Pool(domains)
    has = np.array([byte in pool.row(i).tokens[:-1] for i in range(pool.num_rows)])
    assert 5 < has.sum() < len(has) - 5
    with jax.set_mesh(mesh):
        of = signals(opened, mesh, change=change)
        losses, scores = of.candidates.sweep(Losses()), less_scores(of)
    np.testing.assert_array_equal(np.isnan(losses), has)
    np.testing.assert_array_equal(losses[~has], expected[0][~has])
    np.testing.assert_array_equal(np.isnan(scores), has)


def test_influences_without_a_target_set_are_refused(opened):
    mesh = mesh_of("one")
    with jax.set_mesh(mesh):
        of = signals(opened, mesh)
        of.targets = None
        with pytest.raises(InputError, match=r"^a selector by influence needs a target set to compare gradients with"):
            less_scores(of)


def tokens_and_length(operand, batch):
    return {"tokens": batch.tokens * operand, "length": batch.lengths}


@pytest.fixture(scope="module")
def pool(opened):
    _, domains, _ = opened((24, 32, 48))
    return Pool(domains)


@pytest.mark.parametrize("mesh", ["one", "fsdp"])
def test_a_fold_adds_up_every_row_once_with_its_number(pool, mesh):
    def add(operand, rows, total):
        batch, numbers = rows
        return total + operand * jnp.sum(numbers * batch.lengths)

    mesh = mesh_of(mesh)
    rows, rng = sweep.source(pool, mesh), np.random.default_rng(0)
    ids, numbers = rng.permutation(pool.num_rows)[:37], rng.normal(size=37)
    for options in ({"rows": 8}, {"memory": 2**20}):
        start = jax.device_put(jnp.float32(1), replicated(mesh))
        total = Sweeper(mesh, **options).fold(add, start, jnp.float32(2), rows, ids, numbers, "rows")
        np.testing.assert_allclose(total, 1 + 2 * numbers @ rows.lengths[ids], rtol=1e-5)


def test_results_come_back_by_row_whatever_the_batches(pool):
    mesh = mesh_of("fsdp")
    rows, ids = sweep.source(pool, mesh), np.random.default_rng(0).permutation(pool.num_rows)[:40]
    result = Sweeper(mesh, rows=8).run(tokens_and_length, jnp.int32(3), rows, ids, "rows")
    for i, tokens, length in zip(ids, result["tokens"], result["length"], strict=True):
        row = pool.row(int(i)).tokens
        assert length == len(row) - 1
        np.testing.assert_array_equal(tokens[: len(row)], 3 * row)
        assert not tokens[len(row) :].any()
    with pytest.raises(ValueError, match="rows: a sweep over no rows"):
        Sweeper(mesh, rows=8).run(tokens_and_length, jnp.int32(3), rows, ids[:0], "rows")


def test_a_function_is_traced_once_for_a_length_and_kind_of_operand(pool):
    traces = []

    def traced(operand, batch):
        traces.append((batch.tokens.shape, operand.shape))
        return jnp.sum(batch.tokens, axis=1) + jnp.sum(operand)

    mesh = mesh_of("fsdp")
    sweeper, rows, ids = Sweeper(mesh, rows=8), sweep.source(pool, mesh), np.arange(pool.num_rows)
    for operand in (jnp.ones(2, jnp.int32), jnp.zeros(2, jnp.int32), jnp.ones(3, jnp.int32)):
        result = sweeper.run(traced, operand, rows, ids, "rows")
        assert result[5] == pool.row(5).tokens.sum() + operand.sum()
    assert sorted(traces) == sorted(((8, length + 1), (n,)) for length in (24, 32, 48) for n in (2, 3))


def test_the_bar_says_when_it_compiles(pool, monkeypatch):
    said = []
    monkeypatch.setattr(sweep.tqdm, "set_postfix_str", lambda bar, text: said.append(text))
    mesh = mesh_of("fsdp")
    sweeper, rows = Sweeper(mesh, rows=8), sweep.source(pool, mesh)
    ids = np.flatnonzero(rows.lengths == rows.lengths[0])
    for _ in range(2):  # the second time it is compiled already
        sweeper.run(tokens_and_length, jnp.int32(3), rows, ids, "rows")
        assert said == ["compiling", ""]


@pytest.mark.parametrize("mesh", ["one", "fsdp"])
def test_batches_grow_with_the_memory_there_is(pool, monkeypatch, mesh):
    def large(operand, batch):
        return jnp.sort(batch.tokens[:, :, None] * operand, axis=1).sum(axis=(1, 2))

    sizes, load = [], loader.Loader.load
    monkeypatch.setattr(loader.Loader, "load", lambda self, ids: sizes.append(ids) or load(self, ids))
    mesh = mesh_of(mesh)
    shards = mesh.shape["fsdp"]
    rows, ids, found = sweep.source(pool, mesh), np.arange(pool.num_rows), []
    largest = []
    for megabytes in (0.01, 4, 1000):
        sizes.clear()
        sweeper = Sweeper(mesh, memory=int(megabytes * 2**20))
        found.append(sweeper.run(large, jnp.ones((1, 1, 1000)), rows, ids, "rows"))
        batches = sizes[1:]  # the first is for measuring
        seen = np.concatenate(batches)
        assert sorted(seen[seen >= 0]) == ids.tolist()
        assert all(len(batch) % shards == 0 for batch in batches)
        largest.append(max(map(len, batches)) // shards)
    assert largest[0] == 1 < largest[1] <= largest[2]
    assert len(batches) == 3  # one for each length
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-6)


def test_it_is_asked_between_batches_whether_to_stop(pool):
    class Stop(Exception):
        pass

    polls = []

    def poll():
        polls.append(1)
        if len(polls) == 3:
            raise Stop

    mesh = mesh_of("fsdp")
    sweeper, rows, ids = Sweeper(mesh, rows=8, poll=poll), sweep.source(pool, mesh), np.arange(pool.num_rows)
    with pytest.raises(Stop):
        sweeper.run(tokens_and_length, jnp.int32(1), rows, ids, "rows")
    result = sweeper.run(tokens_and_length, jnp.int32(1), rows, ids, "rows")
    assert len(result["length"]) == pool.num_rows
    assert len(polls) > 3 + pool.num_rows // 8


def test_similarities_depend_on_nothing_but_their_row(opened):
    found = []
    for name, rows, buckets in (("one", 5, (48,)), ("all", 40, (64,))):
        mesh = mesh_of(name)
        with jax.set_mesh(mesh):
            evidence, _ = rds().score({}, signals(opened, mesh, rows=rows, buckets=buckets), None)
            found.append(np.asarray(evidence.rows))
    np.testing.assert_allclose(*found, atol=1e-5)


def test_all_hosts_go_by_the_first_ones_memory_whatever_its_size(monkeypatch):
    """Between hosts JAX sends 32 bits of an integer."""
    monkeypatch.setattr(
        sweep.multihost_utils, "broadcast_one_to_all", lambda array: np.asarray(jnp.asarray(array.astype(np.int32)))
    )
    for memory in (5, 2**31, 2**32, 80 * 2**30 + 7):
        assert sweep._first_hosts(memory) == memory
    assert Sweeper(make_mesh({}, jax.devices()[:1])).device_memory == 4 * 2**30
