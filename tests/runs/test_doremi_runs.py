"""DoReMi's proxy in whole runs: its trajectory and its loss recomputed from what it logged, and the cached losses."""

import json

import jax
import numpy as np
import pytest

from dataflex_jax.data.domains import open_domains
from dataflex_jax.data.loader import Loader
from dataflex_jax.data.pool import Pool
from dataflex_jax.policies.base import Reference
from dataflex_jax.preemption import StopRequested
from dataflex_jax.sharding import make_mesh
from dataflex_jax.signals.sweep import Sweeper, source
from dataflex_jax.training import loss_store
from dataflex_jax.training import reference as references
from dataflex_jax.training.domain_weights import read_weights
from tests.helpers import policy_runs, tiny

NAMES = sorted(tiny.DOMAINS)
NATURAL = (5.0, 1.0, 2.0)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.write_domains(tmp_path_factory.mktemp("data") / "domains")


@pytest.fixture(scope="module")
def reference(root, tmp_path_factory):
    return policy_runs.train(tmp_path_factory.mktemp("reference"), root, train_step=12)


@pytest.fixture(scope="module")
def proxy(root, reference, tmp_path_factory):
    """A function of the mixer's options to the run folder of a proxy."""
    folders = {}

    def of(**options):
        key = tuple(sorted(options.items()))
        if key not in folders:
            fields = {f"mixer__{name}": value for name, value in options.items()}
            fields |= {"warmup_step": 2, "data__proportions": NATURAL, "mixer__reference": str(reference)}
            folders[key] = policy_runs.train(tmp_path_factory.mktemp("proxy"), root, "doremi", **fields)
        return folders[key]

    return of


def policy_of(folder):
    return tiny.records(folder, "policy.jsonl")


def by_name(values):
    return np.array([np.nan if values[name] is None else values[name] for name in NAMES], np.float64)


def alphas(folder):
    return np.array([by_name(line["state"]["alpha"]) for line in policy_of(folder)])


OFFICIAL = {"sampling": "natural", "eta": 2.0}
PAPER = {"sampling": "natural", "eta": 2.0, "loss_norm": "paper"}
CACHED = OFFICIAL | {"reference_losses": "cached"}


@pytest.mark.parametrize("options", [OFFICIAL, pytest.param(PAPER, marks=pytest.mark.slow), CACHED])
def test_the_logged_trajectory_is_the_algorithms(proxy, options):
    """Recomputed in NumPy from the logged excess losses alone."""
    lam, alpha, moved = np.full(3, np.nan), np.full(3, 1 / 3), []
    for line in policy_of(proxy(**options)):
        excess = by_name(line["observed"]["excess"])
        lam = np.where(np.isnan(excess), lam, excess)
        if line["step"] > 2:
            raised = alpha * np.exp(2.0 * np.where(np.isnan(lam), np.nanmean(lam), lam))
            alpha = (1 - 1e-3) * raised / raised.sum() + 1e-3 / 3
            moved.append(alpha)
        np.testing.assert_allclose(by_name(line["state"]["alpha"]), alpha, atol=1e-5)
        np.testing.assert_allclose(by_name(line["sampling_weights"]), np.array(NATURAL) / 8, rtol=1e-6)
    written = json.loads((proxy(**options) / "domain_weights.json").read_text())["domains"]
    np.testing.assert_allclose(by_name(written), np.mean(moved, axis=0), atol=1e-5)
    assert np.ptp(alpha) > 0.02


@pytest.mark.parametrize("options", [OFFICIAL, PAPER])
def test_the_loss_is_weighted_by_what_the_mixer_makes_of_the_batch(proxy, options):
    """The authors' order: alpha moves with a batch's losses, then weighs the same batch. All rows are 16 tokens."""
    metrics = tiny.records(proxy(**options), "metrics.jsonl")
    for line, of_step in zip(policy_of(proxy(**options)), metrics, strict=True):
        loss, rows, alpha = (
            by_name(values)
            for values in (line["observed"]["domain_loss"], line["observed"]["domain_rows"], line["state"]["alpha"])
        )
        if options is PAPER:
            expected = np.nansum(alpha * loss)
        else:
            weights = alpha / (np.array(NATURAL) / 8) * rows
            expected = np.nansum(weights * loss) / weights.sum()
        np.testing.assert_allclose(of_step["loss"], expected, rtol=1e-5)
        assert of_step["domain_excess"] == line["observed"]["excess"]


@pytest.mark.slow
def test_the_step_size_reaches_the_loss(proxy):
    """In the peer it changes nothing that is trained."""
    small, large = (tiny.records(proxy(eta=eta), "metrics.jsonl") for eta in (0.1, 50.0))
    assert small[1]["loss"] == large[1]["loss"]  # the warm-up
    assert abs(small[2]["loss"] - large[2]["loss"]) > 1e-3
    assert np.ptp(alphas(proxy(eta=50.0))[-1]) > 10 * np.ptp(alphas(proxy(eta=0.1))[-1])


def test_cached_losses_give_the_same_run(proxy):
    np.testing.assert_allclose(alphas(proxy(**CACHED)), alphas(proxy(**OFFICIAL)), atol=1e-4)
    ours, theirs = (tiny.records(proxy(**options), "metrics.jsonl") for options in (CACHED, OFFICIAL))
    np.testing.assert_allclose([line["loss"] for line in ours], [line["loss"] for line in theirs], rtol=1e-4)


class Opened:
    """What a run opens to cache the reference's losses, with a cache folder of its own."""

    def __init__(self, root, run_folder, cache, **fields):
        config = policy_runs.config(root, data__cache_dir=str(cache), **fields)
        self.data = config.data
        self.domains, tokenizer = open_domains(config.data)
        self.pool, self.mesh = Pool(self.domains), make_mesh(config.mesh)
        self.rows = source(self.pool, self.mesh)
        with jax.set_mesh(self.mesh):
            wanted = Reference(str(run_folder), "cached")
            self.model = references.open_reference(wanted, self.domains, tokenizer, self.mesh, "mixer.reference")

    def cached(self, poll=lambda: None):
        """The losses by row, computing what is missing; `poll` is called before each batch of 8 rows."""
        with jax.set_mesh(self.mesh):
            sweeper = Sweeper(self.mesh, rows=8, poll=poll)
            cache = references.Cache(self.data.cache_dir, self.data.verify)
            return references.cached_losses(self.model, self.domains, self.rows, sweeper, cache)

    def computed(self, ids):
        """The losses of some rows by the model itself."""
        with jax.set_mesh(self.mesh):
            batch = Loader(self.pool, self.mesh).load(ids)
            return jax.device_get(jax.jit(lambda model: model.token_losses(batch).losses)(self.model))


def test_an_interrupted_cache_goes_on_where_it_was(root, reference, tmp_path, monkeypatch):
    monkeypatch.setattr(loss_store, "_CHUNK", 16)
    opened, polls = Opened(root, reference, tmp_path / "cache"), []

    def stop_at_the_fourth():
        polls.append(None)
        if len(polls) == 4:
            raise StopRequested

    with pytest.raises(StopRequested):
        opened.cached(stop_at_the_fourth)
    progress = [json.loads(path.read_text())["rows"] for path in (tmp_path / "cache").rglob("progress.json")]
    assert progress == [16]
    rows = np.diff(opened.pool.offsets)
    assert rows.max() > 32
    polls.clear()
    losses = opened.cached(lambda: polls.append(None))
    batches = sum(-(-min(16, size - first) // 8) for size in rows for first in range(0, size, 16))
    assert len(polls) == batches - 2
    for first in (0, opened.pool.offsets[1] - 3, opened.pool.num_rows - 8):
        ids = np.arange(first, first + 8)
        np.testing.assert_allclose([losses(i) for i in ids], opened.computed(ids), atol=1e-3)
    polls.clear()
    opened.cached(lambda: polls.append(None))
    assert not polls


def test_the_cache_is_of_this_reference_and_these_data(root, reference, tmp_path):
    def stores():
        return {path.parent.name for path in (tmp_path / "cache").rglob("progress.json")}

    Opened(root, reference, tmp_path / "cache").cached()
    first = stores()
    assert len(first) == 3
    Opened(root, reference / "checkpoints" / "8", tmp_path / "cache").cached()
    second = stores() - first
    assert len(second) == 3
    Opened(root, reference, tmp_path / "cache", data__seq_len=8).cached()
    assert len(stores() - first - second) == 3


@pytest.mark.slow
def test_another_run_samples_with_the_weights(root, proxy, tmp_path):
    weights = proxy(**OFFICIAL) / "domain_weights.json"
    for field, mixer in (("mixer__proportions", "static"), ("data__proportions", None)):
        folder = policy_runs.train(tmp_path / field, root, mixer, train_step=1, **{field: str(weights)})
        if mixer:
            drawn = policy_of(folder)[0]["observed"]["drawn_with"]
            np.testing.assert_allclose(by_name(drawn), read_weights(weights, NAMES), rtol=1e-6)
        # Systematic draws: the rows are the proportions but for rounding.
        rows = np.array(by_name(tiny.records(folder, "metrics.jsonl")[0]["domain_epochs"]))
        assert rows.argmax() == np.argmax(read_weights(weights, NAMES))
