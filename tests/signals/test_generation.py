"""Responses to targets: what of a row is asked, that sampling is `generate`'s whatever the batch and the mesh, and that
the gradient of a reward is REINFORCE's: unbiased where every answer can be listed."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.data import loader
from dataflex_jax.data.batch import collated
from dataflex_jax.data.rows import Row
from dataflex_jax.data.targets import TargetSet
from dataflex_jax.errors import InputError
from dataflex_jax.models.generation.generate import generate
from dataflex_jax.policies import Exchange, Generations, Losses, Projection, Responses
from dataflex_jax.policies.common import influence, reinforce
from dataflex_jax.policies.selectors.nice import nice
from dataflex_jax.sharding import make_mesh
from dataflex_jax.signals import generation
from dataflex_jax.signals.registry import Subject
from dataflex_jax.signals.row_sets import ModelSignals, SweptRows
from dataflex_jax.signals.rows import map_named
from dataflex_jax.signals.sweep import Sweeper, source
from tests.helpers.array_rows import ArrayRows, pool_of
from tests.helpers.fake_signals import request
from tests.helpers.gradient_model import MODEL, build, materialised

STOP = 5
SAMPLED = Generations(samples=3, max_new_tokens=6, temperature=0.9, top_k=20, top_p=0.9)


class Letters:
    """A codec whose tokens are letters and whose text ends with "*"."""

    stop_ids = (STOP,)

    def encode_prompts(self, texts):
        raise AssertionError("nothing is encoded here")

    def decode(self, ids):
        return "".join("*" if i == STOP else chr(96 + i) for i in ids)


def row_of(prompt, *rest):
    """A row of a prompt, and of (tokens, whether they count) in turn."""
    tokens, counts = list(prompt), [False] * len(prompt)
    for part, counted in rest:
        tokens += part
        counts += [counted] * len(part)
    return Row(np.array(tokens, np.int32), np.array(counts[1:]))


TARGETS = ArrayRows(
    [
        row_of([1, 2, 3], ([4, STOP], True)),
        row_of([6], ([7, 8], True), ([9, 10], False), ([11, 12, STOP], True), ([13], False)),
        row_of([3, 1, 4, 1, 6, 9, 2], ([6, 6], True)),
        row_of([1, 2, 3], ([4, STOP], True)),
    ]
)
PROMPTS = [[1, 2, 3], [6, 7, 8, 9, 10], [3, 1, 4, 1, 6, 9, 2], [1, 2, 3]]


def signals_of(model, targets=TARGETS, *, mesh=None, rows=2, candidates=None):
    mesh = make_mesh({}, jax.devices()[:1]) if mesh is None else mesh
    pool = pool_of(tasks=targets)
    count = targets.num_rows
    target_set = TargetSet(pool, np.arange(count), np.arange(count) % 2, ("even", "odd")[: max(1, min(count, 2))])
    candidates = source(pool if candidates is None else pool_of(books=candidates), mesh)
    sweeper = Sweeper(mesh, rows=rows)
    return ModelSignals(
        model and Subject(model), sweeper, candidates, (target_set, source(pool, mesh)), codec=Letters()
    )


def tokens_of(responses):
    return [exchange.text for exchange in responses.exchanges]


@pytest.fixture(scope="module")
def responses():
    return signals_of(build(MODEL)).respond(SAMPLED, jax.random.key(3))


def test_a_task_is_the_last_response_and_all_before_it():
    tasks = signals_of(build(MODEL)).tasks()
    assert [task.prompt for task in tasks] == [Letters().decode(prompt) for prompt in PROMPTS]
    assert [task.reference for task in tasks] == ["d", "kl", "ff", "d"]
    assert tasks[1].where == "row 1 of 'tasks'"


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (row_of([1, 2, 3]), "has no response"),
        (row_of([1], ([2, 3], True)), "has no prompt"),
    ],
)
def test_a_target_without_a_prompt_or_a_response_is_named(row, fault):
    if fault == "has no prompt":
        row = row._replace(mask=np.ones_like(row.mask))
    signals = signals_of(build(MODEL), ArrayRows([TARGETS.rows[0], row]))
    with pytest.raises(InputError, match=rf"^the target row 1 of 'tasks' {fault}"):
        signals.tasks()
    with pytest.raises(InputError, match=rf"^the target row 1 of 'tasks' {fault}"):
        signals.respond(SAMPLED, jax.random.key(0))


def test_without_a_model_there_are_no_responses():
    signals = signals_of(None)
    assert len(signals.tasks()) == 4
    for ask in (
        lambda: signals.respond(SAMPLED, jax.random.key(0)),
        lambda: signals.judge("a/judge", [Exchange(signals.tasks()[0], "a", "a")]),
    ):
        with pytest.raises(InputError, match="there is no model to ask"):
            ask()


def test_responses_are_generates_own(responses):
    """One at a time, with seeds of the key, the target and the sample alone."""
    key = jax.random.key(3)
    for number, exchange in enumerate(responses.exchanges):
        target, sample = divmod(number, SAMPLED.samples)
        seed = jax.random.bits(jax.random.fold_in(jax.random.fold_in(key, target), sample), dtype=jnp.uint32)
        made = generate(
            build(MODEL),
            np.array([(PROMPTS[target] + [0] * 8)[:8]]),
            np.array([len(PROMPTS[target])]),
            max_new_tokens=6,
            seeds_B=np.array([seed]),
            temperature=0.9,
            top_k=20,
            top_p=0.9,
            stop_tokens=[STOP],
        )
        length = int(made.lengths[0])
        said = made.tokens[0, :length].tolist()
        assert responses.lengths[target, sample] == length
        assert exchange.text == Letters().decode(PROMPTS[target] + said)
        assert exchange.response == Letters().decode([token for token in said if token != STOP])
        assert exchange.task.reference == ["d", "kl", "ff", "d"][target]


def test_samples_differ_and_so_do_equal_prompts(responses):
    said = np.array(tokens_of(responses)).reshape(4, 3)
    assert len(set(said[0])) > 1
    assert list(said[0]) != list(said[3])


def test_rows_of_responses_count_the_response_alone(responses):
    assert (responses.rows.num_rows, responses.rows.group_names) == (12, ("even", "odd"))
    np.testing.assert_array_equal(responses.rows.groups, np.repeat([0, 1, 0, 1], 3))
    rows = []
    for number, exchange in enumerate(responses.exchanges):
        text = [STOP if letter == "*" else ord(letter) - 96 for letter in exchange.text]
        length = responses.lengths.ravel()[number]
        rows.append(Row(np.array(text, np.int32), np.arange(1, len(text)) >= len(text) - length))
    batch = jax.tree.map(jnp.asarray, collated(rows, 16, [0] * len(rows)))
    losses = jax.jit(build(MODEL).token_losses)(batch).losses
    expected = (batch.mask * losses).sum(axis=1) / responses.lengths.ravel()
    np.testing.assert_allclose(responses.rows.sweep(Losses()), expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 5, None])
def test_responses_do_not_depend_on_the_batch(responses, rows):
    assert tokens_of(signals_of(build(MODEL), rows=rows).respond(SAMPLED, jax.random.key(3))) == tokens_of(responses)


def test_responses_are_the_same_on_eight_devices(responses):
    mesh = make_mesh({"data": 2, "fsdp": 4})
    with jax.set_mesh(mesh):
        assert tokens_of(signals_of(build(MODEL), mesh=mesh).respond(SAMPLED, jax.random.key(3))) == tokens_of(
            responses
        )


@pytest.mark.slow
@pytest.mark.parametrize("projection", ["exact", "sketch"])
def test_scores_are_the_same_on_eight_devices(projection):
    options = dict(mc_samples=3, max_new_tokens=6, gradient_type="sgd", baseline="mean", proj_dim=64)
    selector = nice(reward=f"{__name__}:letters", projection=projection, **options)
    model, scores = build(MODEL), []  # on no mesh
    for mesh in (make_mesh({}, jax.devices()[:1]), make_mesh({"data": 2, "fsdp": 4})):
        with jax.set_mesh(mesh):
            evidence, _ = selector.score({}, signals_of(model, mesh=mesh), request(seed=3))
            scores.append(np.asarray(evidence.rows))
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-5)


def letters(prompt, response, reference):
    """How many different letters were said."""
    return len(set(response)) / 6


# A policy whose answers can all be listed: a vocabulary of 7, two tokens at most.
TINY = dataclasses.replace(MODEL, vocab_size=7, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
ANSWERS = [[STOP], *([a, b] for a, b in itertools.product(range(7), range(7)) if a != STOP)]
ASKED = ArrayRows([row_of([1, 2, 3], ([4, STOP], True))])


def graded(prompt, response, reference):
    """A reward that is not the same for any two answers, and negative for some."""
    return np.sin(sum(ord(letter) * (place + 1) for place, letter in enumerate(response)))


@jax.jit
def listed(model):
    """(log p of every answer [A], float32; its reward [A])."""
    prompt = PROMPTS[0]
    rows = [Row(np.array(prompt + a, np.int32), np.arange(1, 3 + len(a)) >= 3) for a in ANSWERS]
    batch = jax.tree.map(jnp.asarray, collated(rows, 4, [0] * len(rows)))
    log_p = -(batch.mask * model.token_losses(batch).losses).sum(axis=1)
    spoken = [Letters().decode([token for token in answer if token != STOP]) for answer in ANSWERS]
    return log_p, jnp.array([graded("", text, "") for text in spoken], jnp.float32)


@jax.jit
def expected_reward(model):
    log_p, rewards = listed(model)
    return jnp.sum(jnp.exp(log_p) * rewards)


def flat(tree):
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def gradients_of(signals, responses, rewards, baseline="none"):
    """What stands for each target's gradient of the loss, [M, P]."""
    factors = reinforce.factors(rewards, responses.lengths, baseline)
    targets = reinforce.reinforced(signals, responses, factors, np.array([0])).targets
    wanted = influence.Influence(Projection("none"), None, parameters="all").of_targets()
    return np.asarray(targets.sweep(wanted), np.float64) * np.abs(factors).max()


def test_the_answers_are_all_there_are():
    log_p, _ = listed(build(TINY))
    np.testing.assert_allclose(jnp.exp(log_p).sum(), 1, rtol=1e-5)


def test_the_expected_estimate_is_the_gradient_of_the_expected_reward():
    """Each answer once, with its probability: the mean over all samples that there can be."""
    model = build(TINY)
    signals = signals_of(model, ASKED, rows=8)
    log_p, rewards = map(np.asarray, listed(model))
    (question,) = generation.questions(pool_of(tasks=ASKED), [0], Letters())
    padded, lengths = np.array([[*a, 0][:2] for a in ANSWERS]), np.array([*map(len, ANSWERS)])
    _, answers = generation.answered([question] * len(ANSWERS), padded, lengths, Letters())
    mesh = make_mesh({}, jax.devices()[:1])
    places = np.arange(len(ANSWERS))
    groups = (np.zeros_like(places), ("even",))
    rows = SweptRows(Subject(model), Sweeper(mesh, rows=48), source(answers.pool(), mesh), places, *groups, "answers")
    all_of_them = Responses(rows, lengths[None], [])
    estimate = gradients_of(signals, all_of_them, (np.exp(log_p) * rewards)[None])[0]
    gradient = flat(jax.grad(lambda params: expected_reward(model.with_params(params)))(model.params))
    np.testing.assert_allclose(estimate, -gradient, atol=2e-6 * np.abs(gradient).max() + 1e-7)


@pytest.mark.parametrize("baseline", ["none", pytest.param("mean", marks=pytest.mark.slow)])
def test_sampled_estimates_are_unbiased(baseline):
    """Within four standard errors in every direction that is looked at, and close on the whole."""
    model, samples, count = build(TINY), 4, 300
    signals = signals_of(model, ArrayRows(ASKED.rows * count), rows=600)
    found = signals.respond(Generations(samples, 2, temperature=1.0), jax.random.key(1))
    rewards = np.array([graded("", exchange.response, "") for exchange in found.exchanges]).reshape(count, samples)
    factors = reinforce.factors(rewards, found.lengths, baseline)
    view = reinforce.reinforced(signals, found, factors, np.array([0, 1])).targets
    wanted = influence.Influence(Projection("none"), None, parameters="all").of_targets()
    estimates = np.asarray(view.sweep(wanted), np.float64) * np.abs(factors).max() / samples
    # The mean of S rewards has each of them in it, which takes one share of S off the gradient.
    estimates *= samples / (samples - 1) if baseline == "mean" else 1
    gradient = -flat(jax.grad(lambda params: expected_reward(model.with_params(params)))(model.params))
    error = estimates.mean(axis=0) - gradient
    errors = estimates.std(axis=0) / np.sqrt(count)
    random = np.random.default_rng(0).normal(size=(len(gradient), 16))
    along = np.concatenate([gradient[:, None], random], axis=1)
    spread = (estimates @ along).std(axis=0) / np.sqrt(count)
    assert (np.abs(error @ along) < 4 * spread).all()
    assert np.linalg.norm(error) < 2 * np.linalg.norm(errors)
    assert np.linalg.norm(errors) < np.linalg.norm(gradient), "else this test says nothing"


@pytest.mark.slow
def test_training_on_the_best_candidate_raises_the_expected_reward_and_on_the_worst_lowers_it():
    rng = np.random.default_rng(0)
    candidates = ArrayRows([row_of(rng.integers(0, 7, 3), (rng.integers(0, 7, 3).tolist(), True)) for _ in range(12)])
    model = build(TINY)
    signals = signals_of(model, ASKED, rows=12, candidates=candidates)
    options = dict(mc_samples=400, temperature=1.0, max_new_tokens=2, gradient_type="sgd", baseline="mean")
    evidence, _ = nice(reward=f"{__name__}:graded", **options).score({}, signals, request())
    scores = np.asarray(evidence.rows)
    batch = jax.tree.map(jnp.asarray, collated([candidates.row(i) for i in range(12)], 5, [0] * 12))
    gradients = materialised(model, batch)
    before, changes = float(expected_reward(model)), []
    for z in range(12):
        norm = np.sqrt(sum(float((leaf[z] ** 2).sum()) for leaf in gradients.values()))
        moved = map_named(lambda path, leaf, z=z, norm=norm: leaf - 1e-2 / norm * gradients[path][z], model.params)
        changes.append(float(expected_reward(model.with_params(moved))) - before)
    assert changes[scores.argmax()] > 0 > changes[scores.argmin()]
    assert np.corrcoef(scores, changes)[0, 1] > 0.95


def test_an_exchange_ends_before_the_stop_token():
    (question,) = generation.questions(pool_of(tasks=ASKED), [0], Letters())
    exchanges, rows = generation.answered([question], np.array([[7, STOP, 0]]), np.array([2]), Letters())
    assert exchanges == [Exchange(question.task, "g", "abcg*")]
    np.testing.assert_array_equal(rows.row(0).tokens, [1, 2, 3, 7, STOP])
    np.testing.assert_array_equal(rows.row(0).mask, [False, False, True, True])


@pytest.mark.slow
def test_sums_over_some_responses_of_a_target_have_batches_of_one_size(monkeypatch):
    """However many of them have a reward; a batch of two tells how much memory a row takes."""
    rows = signals_of(build(MODEL), rows=None).respond(SAMPLED, jax.random.key(3)).rows
    sizes, load = [], loader.Loader.load
    monkeypatch.setattr(loader.Loader, "load", lambda self, ids: sizes.append(len(ids)) or load(self, ids))
    for members in ([0], [0, 2], [0, 1, 2]):
        weights = np.zeros((rows.num_rows, 1))
        weights[members] = 1
        rows.gradient_sums(weights)
    assert sizes == [2, 3, 3, 3]
