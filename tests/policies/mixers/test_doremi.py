"""DoReMi against a float64 transcription, the spec's check values and the peer's recorded weights; the weights file."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.policies import registry
from dataflex_jax.policies.base import Reference
from dataflex_jax.policies.mixers.doremi import average, doremi
from dataflex_jax.training.domain_weights import read_weights, write_weights
from tests.helpers.observations import of_tokens, recorded


def mixer_of(**options):
    return doremi(reference="runs/reference", **options)


def transcription(steps, num_domains, eta, c, warmup, alpha, lam):
    """One token at a time; yields (alpha, lam) after each step. `lam` starts with None where nothing is assumed."""
    alpha, lam = list(alpha), list(lam)
    for step, (proxy, reference, mask, domains) in enumerate(steps, 1):
        total, number = [0.0] * num_domains, [0] * num_domains
        for row, domain in enumerate(domains):
            for token in np.flatnonzero(mask[row]):
                total[domain] += max(proxy[row, token] - reference[row, token], 0.0)
                number[domain] += 1
        lam = [t / n if n else last for t, n, last in zip(total, number, lam, strict=True)]
        if step > warmup:
            known = [x for x in lam if x is not None]
            assumed = np.array([np.mean(known) if x is None else x for x in lam])
            raised = np.array(alpha) * np.exp(eta * assumed)
            alpha = (1 - c) * raised / raised.sum() + c / num_domains
        yield np.array(alpha), lam


def random_steps(seed, steps=12, rows=6, tokens=5, num_domains=4):
    rng = np.random.default_rng(seed)
    for step in range(steps):
        proxy, reference = rng.uniform(0, 6, (2, rows, tokens))
        domains = rng.integers(0, num_domains - (step < 3), rows)
        yield proxy, reference, (rng.random((rows, tokens)) < 0.8).astype(float), domains


@pytest.mark.parametrize("initial_excess", [None, 8.3])
@pytest.mark.parametrize(("eta", "c", "warmup"), [(1.0, 1e-3, 0), (0.3, 0.2, 5), (2.0, 0.0, 2)])
def test_equals_the_transcription(initial_excess, eta, c, warmup):
    """The last domain is not seen in the first three steps."""
    steps = list(random_steps(0))
    mixer = mixer_of(eta=eta, c=c, initial_excess=initial_excess)
    state = mixer.init(jnp.asarray([0.4, 0.3, 0.2, 0.1]))
    update = jax.jit(mixer.update)
    alphas = []
    expected = transcription(steps, 4, eta, c, warmup, [0.25] * 4, [initial_excess] * 4)
    for step, (alpha, lam) in enumerate(expected, 1):
        state = update(state, of_tokens(step, *steps[step - 1], 4, warmup))
        np.testing.assert_allclose(state.alpha, alpha, rtol=2e-4, atol=1e-7)
        np.testing.assert_allclose(state.lam, [x or 0.0 for x in lam], rtol=1e-5)
        np.testing.assert_allclose(mixer.loss_weights(state), 4 * alpha, rtol=2e-4, atol=1e-7)
        np.testing.assert_allclose(mixer.sampling_weights(state), 0.25)
        alphas += [alpha] if step > warmup else []
    np.testing.assert_allclose(average(state), np.mean(alphas, axis=0), rtol=2e-4)
    assert int(state.count) == len(steps) - warmup


def observed_excess(step, lam):
    """One row a domain, of one token whose excess is lam."""
    lam = np.asarray(lam)[:, None]
    return of_tokens(step, 1 + lam, np.ones_like(lam), np.ones_like(lam), np.arange(len(lam)), len(lam))


def test_check_values():
    mixer = mixer_of()
    state = mixer.update(mixer.init(jnp.ones(3) / 3), observed_excess(1, [0.5, 0.2, 0]))
    np.testing.assert_allclose(state.alpha, [0.42591984, 0.31561557, 0.2584646], atol=2e-7)
    state = mixer.update(state, observed_excess(2, [0.1, 0.4, 0.3]))
    np.testing.assert_allclose(state.alpha, [0.36473662, 0.3648364, 0.27042698], atol=2e-7)


def test_the_excess_is_clipped_token_by_token():
    observation = of_tokens(1, np.array([[2.0, 1, 3]]), np.array([[1.5, 1.5, 2]]), np.ones((1, 3)), [0], 2)
    state = mixer_of().update(mixer_of().init(jnp.ones(2) / 2), observation)
    np.testing.assert_allclose(state.lam, [0.5, 0.0])


def test_a_domain_that_was_not_in_the_batch_keeps_its_excess():
    mixer = mixer_of()
    state = mixer.update(mixer.init(jnp.ones(2) / 2), observed_excess(1, [0.5, 0.2]))
    after = mixer.update(state, of_tokens(2, np.full((1, 1), 3.0), np.zeros((1, 1)), np.ones((1, 1)), [0], 2))
    np.testing.assert_allclose(after.lam, [3.0, 0.2], rtol=1e-6)


def test_a_domain_never_seen_moves_neither_up_nor_down_against_the_mean():
    mixer = mixer_of(c=0.0)
    observation = of_tokens(1, np.full((2, 1), 7.0), np.zeros((2, 1)), np.ones((2, 1)), [0, 1], 3)
    state = mixer.update(mixer.init(jnp.ones(3) / 3), observation)
    np.testing.assert_allclose(state.alpha, 1 / 3, rtol=1e-6)


@pytest.mark.parametrize(
    ("sampling", "q"),
    [
        (None, [0.25] * 4),
        ("uniform", [0.25] * 4),
        ("natural", [0.4, 0.3, 0.2, 0.1]),
        ((1, 1, 1, 5), [1 / 8] * 3 + [5 / 8]),
    ],
)
@pytest.mark.parametrize("initial", ["uniform", "sampling"])
def test_the_loss_weighs_a_token_with_alpha_over_q_and_a_domain_with_alpha(sampling, q, initial):
    natural = jnp.asarray([0.4, 0.3, 0.2, 0.1])
    official = mixer_of(sampling=sampling, initial=initial)
    paper = mixer_of(sampling=sampling, initial=initial, loss_norm="paper")
    alpha = np.array(q if initial == "sampling" else [0.25] * 4)
    np.testing.assert_allclose(official.sampling_weights(official.init(natural)), q, rtol=1e-6)
    np.testing.assert_allclose(official.loss_weights(official.init(natural)), alpha / q, rtol=1e-6)
    np.testing.assert_allclose(paper.loss_weights(paper.init(natural)), alpha, rtol=1e-6)
    assert (official.loss_mean, paper.loss_mean) == ("tokens", "domains")


@pytest.mark.parametrize("average_includes_initial", [False, True])
def test_the_average_counts_the_first_alpha_only_where_asked(average_includes_initial):
    mixer = mixer_of(average_includes_initial=average_includes_initial)
    state = mixer.init(jnp.ones(3) / 3)
    np.testing.assert_allclose(average(state), 1 / 3, rtol=1e-6)
    alphas = [np.full(3, 1 / 3)] if average_includes_initial else []
    for step, lam in enumerate(([0.5, 0.2, 0], [0.1, 0.4, 0.3]), 1):
        state = mixer.update(state, observed_excess(step, lam))
        alphas.append(state.alpha)
    np.testing.assert_allclose(average(state), np.mean(alphas, axis=0), rtol=1e-6)


def test_a_resumed_run_averages_on_unless_it_samples_otherwise():
    mixer = mixer_of()
    old = mixer.update(mixer.init(jnp.ones(3) / 3), observed_excess(1, [0.5, 0.2, 0]))
    same = mixer.on_resume(old, mixer.init(jnp.asarray([0.6, 0.3, 0.1])))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), same, old)
    otherwise = mixer.on_resume(old, mixer_of(sampling=(2, 1, 1)).init(jnp.ones(3) / 3))
    np.testing.assert_allclose(otherwise.alpha, old.alpha, rtol=1e-6)
    np.testing.assert_allclose(otherwise.sampling, [0.5, 0.25, 0.25])
    assert int(otherwise.count) == 0
    assert not np.asarray(otherwise.alpha_sum).any()


def test_the_peers_recorded_weights():
    """Step by step from the peer's own weights: for a domain that is not in the batch it takes an excess of 0, not the
    last one."""
    numbers = recorded("doremi_core.npz")
    labels, domains = numbers["labels"], numbers["domain_ids"]

    def token_losses(logits):
        shifted = logits[:, :-1] - logits[:, :-1].max(-1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        return -np.take_along_axis(log_p, np.maximum(targets, 0)[..., None], -1)[..., 0]

    mixer = mixer_of(eta=float(numbers["eta"]), c=float(numbers["eps"]))
    state = mixer.init(jnp.ones(4) / 4)
    for t, expected in enumerate(numbers["weights"]):
        targets = labels[t][:, 1:]
        proxy, reference = (token_losses(numbers[f"{who}_logits"][t].astype(np.float64)) for who in ("proxy", "ref"))
        state = mixer.update(state, of_tokens(t + 1, proxy, reference, (targets >= 0) * 1.0, domains[t], 4))
        seen = numbers["has_data"][t]
        np.testing.assert_allclose(np.asarray(state.lam)[seen], numbers["scores"][t][seen], rtol=1e-5)
        if seen.all():
            np.testing.assert_allclose(state.alpha, expected, atol=1e-6)
        state = state._replace(alpha=jnp.asarray(expected, jnp.float32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "^reference = None: must be a run folder"),
        ({"reference": "a", "eta": 0.0}, "^eta = 0.0: must be > 0"),
        ({"reference": "a", "c": 1.1}, "^c = 1.1: must be in"),
        ({"reference": "a", "initial": "natural"}, "^initial = 'natural': must be one of uniform, sampling"),
        ({"reference": "a", "initial_excess": -1.0}, "^initial_excess = -1.0: must be >= 0"),
        ({"reference": "a", "loss_norm": "authors"}, "^loss_norm = 'authors': must be one of official, paper"),
        ({"reference": "a", "reference_losses": "disk"}, "^reference_losses = 'disk': must be one of model, cached"),
    ],
)
def test_impossible_hyperparameters_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        doremi(**options)


def test_a_domain_that_is_never_sampled_is_refused():
    with pytest.raises(
        InputError,
        match=r"^config.mixer.sampling = \(1, 0\): must be > 0 for every domain",
    ):
        registry.checked("mixer", mixer_of(sampling=(1, 0)).init, jnp.ones(2) / 2)
    assert mixer_of(reference_losses="cached").reference == Reference("runs/reference", "cached")


def test_a_weights_file_is_read_back_in_the_order_of_the_domains(tmp_path):
    path = tmp_path / "run" / "weights.json"
    write_weights(path, ("web", "böcker"), np.array([3, 1]), step=7)
    assert read_weights(path, ("böcker", "web")) == (0.25, 0.75)
    assert json.loads(path.read_text("utf-8"))["step"] == 7
    assert "böcker" in path.read_text("utf-8")
    assert [file.name for file in path.parent.iterdir()] == ["weights.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"domains": {"web": 1, "code": 2}}, r"domains: no books; unexpected code \(the domains of this run are web, "),
        ({"domains": {"web": 1, "books": 2, "code": 3}}, "domains: unexpected code "),
        ({"domains": {"web": 1, "books": "2"}}, "domains.books = '2': must be a number"),
        ({"domains": {"web": 0, "books": -1}}, "every entry must be a finite number >= 0"),
        ({"domains": {"web": 0, "books": 0}}, "at least one entry must be > 0"),
        ({"weights": {}}, 'must hold {"domains"'),
        ([1, 2], "one object is expected"),
    ],
)
def test_a_weights_file_of_other_domains_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "weights.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message) as error:
        read_weights(path, ("web", "books"))
    assert str(error.value).startswith(str(path))


def test_a_weights_file_that_is_not_there_or_not_json_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"none.json: cannot be read .No such file"):
        read_weights(tmp_path / "none.json", ("web",))
    (tmp_path / "half.json").write_text('{"domains": {"we')
    with pytest.raises(InputError, match=r"half.json: not valid JSON"):
        read_weights(tmp_path / "half.json", ("web",))
