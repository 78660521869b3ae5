"""Weighters in whole runs: when they start and refresh, what they log, that nothing jumps, which rows come to count."""

import functools

import jax
import numpy as np
import pytest

from dataflex_jax.data.batch import collated
from dataflex_jax.data.domains import open_domains
from dataflex_jax.models.hf.resolve import model_config
from dataflex_jax.models.model import Model
from dataflex_jax.training import loop
from dataflex_jax.training.setup import prepared
from tests.helpers import policy_runs, tiny

WARMUP = 3
STEPS = 5
FIGURES = ("example_weight_min", "example_weight_mean", "example_weight_max", "effective_sample_size")
RUNS = {
    "plain": {},
    "near uniform": {"weighter": "loss", "weighter__r": 1e6},
    "loss": {"weighter": "loss", "weighter__r": 1.0},
    "sharp": {"weighter": "loss", "weighter__r": 0.1},
    "joint_update_aware": {"weighter": "joint_update_aware"},
    "adapt": {"weighter": "adapt", "weighter__normalize": "mean", "weighter__refresh_interval": 1},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.write_domains(tmp_path_factory.mktemp("data") / "domains")


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    """A function of a name in RUNS to the run's lines, a list for each file."""

    @functools.cache
    def of(name):
        fields = {"train_step": STEPS, "warmup_step": WARMUP} | RUNS[name]
        folder = policy_runs.train(tmp_path_factory.mktemp("run"), root, **fields)
        return {
            file: tiny.records(folder, f"{file}.jsonl") if (folder / f"{file}.jsonl").exists() else []
            for file in ("metrics", "policy")
        }

    return of


def losses(lines):
    return np.array([line["loss"] for line in lines["metrics"]])


@pytest.mark.parametrize(
    "name",
    [
        "loss",
        "sharp",
        pytest.param("joint_update_aware", marks=pytest.mark.slow),
        pytest.param("adapt", marks=pytest.mark.slow),
    ],
)
def test_the_loss_does_not_jump_when_a_weighter_starts(run, name):
    """The peer's goes from 8.4 to 23.3."""
    ours, plain = losses(run(name)), losses(run("plain"))
    np.testing.assert_allclose(ours[:WARMUP], plain[:WARMUP], rtol=1e-5)
    assert abs(ours[WARMUP] / ours[WARMUP - 1] - 1) < 0.15
    # The same parameters and rows: all of the difference is the weights'.
    assert 1e-5 < abs(ours[WARMUP] / plain[WARMUP] - 1) < 0.1


def test_weights_near_one_give_the_mean(run):
    np.testing.assert_allclose(losses(run("near uniform")), losses(run("plain")), rtol=1e-5)


def test_every_line_has_the_weights(run):
    assert not any(figure in line for line in run("plain")["metrics"] for figure in FIGURES)
    for name in ("loss", "joint_update_aware", "adapt"):
        for line in run(name)["metrics"]:
            low, mean, high, size = (line[figure] for figure in FIGURES)
            assert mean == pytest.approx(1, abs=1e-5)
            if line["step"] <= WARMUP:
                assert (low, high, size) == (1, 1, 8)
            else:
                assert low < 1 < high
                assert 1 <= size < 8


def test_the_effective_sample_size_falls_with_the_temperature(run):
    sizes = [run(name)["metrics"][WARMUP]["effective_sample_size"] for name in ("near uniform", "loss", "sharp")]
    assert sizes[0] == pytest.approx(8)
    assert sizes[0] > sizes[1] > sizes[2]


def test_refreshes_are_in_the_log(run):
    lines = [(line["step"], line["policy"]) for line in run("adapt")["policy"]]
    assert lines == [(3, "adapt"), (4, "adapt")]
    assert [line["step"] for line in run("joint_update_aware")["policy"]] == [3]
    assert run("adapt")["policy"][0]["refreshed"] == run("joint_update_aware")["policy"][0]["refreshed"] > 0
    assert run("loss")["policy"] == []


def test_the_anchor_is_the_mean_of_the_target_sets_embeddings(root, tmp_path):
    config = policy_runs.config(root, weighter="adapt")
    with prepared(config, tmp_path) as (job, state, position):
        state, _ = job.updates.between(0, state, position.sampler)
        anchor, params = jax.device_get((state.weighters[0].anchor, state.params))
    domains, tokenizer = open_domains(config.data)
    model = Model.shape(model_config(config.model, tokenizer.vocab_size)).having(params)
    rows = [domain.valid.row(i) for domain in domains for i in range(domain.valid.num_rows)]
    batch = collated(rows, config.data.seq_len, [0] * len(rows))
    hidden = np.asarray(jax.jit(Model.hidden_states)(model, batch))
    embeddings = []
    for row, states in zip(rows, hidden, strict=True):
        places = np.arange(1, len(row.mask) + 1)
        mean = (places[:, None] * states[: len(places)]).sum(axis=0) / places.sum()
        embeddings.append(mean / np.linalg.norm(mean))
    np.testing.assert_allclose(anchor, np.mean(embeddings, axis=0), atol=1e-5)


def test_adapt_prefers_rows_like_the_targets(root, tmp_path):
    """Of three domains one is the target set's."""
    targets = {"targets__source": "local", "targets__root": str(root), "targets__domains": ("digits",)}
    fields = targets | {"weighter__tau": 0.1, "train_step": 20, "weighter__refresh_interval": 5}
    config = policy_runs.config(root, weighter="adapt", **fields)
    weights = {}
    with prepared(config, tmp_path) as (job, state, position):
        planned = position.sampler
        for step in range(20):
            state, _ = job.updates.between(step, state, planned)
            plan, planned = job.draws.sampler.plan(planned)
            state, _ = job.step(state, job.loader.load(job.draws.sequences.ids(plan), plan.drawn_with))
        for number, domain in enumerate(job.draws.pool.domains):
            ids = job.draws.pool.offsets[number] + np.arange(8)
            state, metrics = job.step(state, job.loader.load(ids, plan.drawn_with))
            weights[domain.name] = [float(metrics[figure]) for figure in FIGURES[:3]]
    for other in ("vowels", "code"):
        assert weights["digits"][0] > weights[other][2], weights  # the least against the greatest


def test_steps_with_a_weighter_move_nothing_between_host_and_device(root, tmp_path):
    config = policy_runs.config(root, weighter="loss+joint_update_aware", train_step=4)
    calls = []
    with prepared(config, tmp_path) as (job, state, position):

        def guarded(state, batch):
            # The first call compiles, which moves constants.
            with jax.transfer_guard("disallow" if calls else "allow"):
                calls.append(job.step(state, batch))
            return calls[-1]

        loop.run(job._replace(step=guarded), state, position, tmp_path)
    assert len(calls) == 4
