"""NICE against a float64 transcription of its formulas on random gradients of responses."""

import jax
import numpy as np
import pytest

from dataflex_jax.errors import InputError, TrainingError
from dataflex_jax.policies import Exchange, Generations, Preconditioner, Projection, Responses, Task, registry
from dataflex_jax.policies.common import reinforce
from dataflex_jax.policies.schedule import Schedule
from dataflex_jax.policies.selectors.nice import nice
from tests.helpers.fake_signals import FakeRows, FakeSignals, projection_matrix, request
from tests.helpers.influences import GROUPS, NAMES, SIZE, transcribed

SAMPLES = 3


class Answering(FakeSignals):
    """A model whose responses are numbers, which the reward "tests...:value" reads."""

    def __init__(self, seed=0, rewards=None, scale=1.0):
        rng = np.random.default_rng(seed)
        n, m = 19, len(GROUPS)
        super().__init__(
            FakeRows(gradients=rng.normal(size=(n, SIZE)), preconditioned=rng.normal(size=(n, SIZE))),
            FakeRows(gradients=np.full((m, SIZE), np.nan), groups=GROUPS, names=NAMES),
        )
        self.rewards = rng.normal(size=(m, SAMPLES)) if rewards is None else np.asarray(rewards, float)
        self.lengths = rng.integers(1, 20, (m, SAMPLES))
        self.answers = FakeRows(
            gradients=scale * rng.normal(size=(m * SAMPLES, SIZE)), groups=np.repeat(GROUPS, SAMPLES), names=NAMES
        )
        self.asked = []

    def tasks(self):
        return [Task(i, f"record {i} of 'a'", "?", "!") for i in range(self.targets.num_rows)]

    def respond(self, generations, key):
        self.asked.append((generations, jax.random.key_data(key).tolist()))
        tasks = np.repeat(np.arange(self.targets.num_rows), SAMPLES)
        said = [str(reward) for reward in self.rewards.ravel()]
        exchanges = [Exchange(self.tasks()[i], text, text) for i, text in zip(tasks, said, strict=True)]
        return Responses(self.answers, self.lengths, exchanges)

    def judge(self, judge, exchanges):
        assert judge == "a/judge"
        return np.array([0.5 if each.response == "!" else float(each.response) for each in exchanges])

    def gradients(self, baseline="none"):
        """Of each target, float64."""
        rewards = self.rewards - (self.rewards.mean(axis=1, keepdims=True) if baseline == "mean" else 0)
        per_response = self.answers.gradients.astype(np.float64).reshape(len(GROUPS), SAMPLES, SIZE)
        return np.einsum("ms,ms,msp->mp", rewards, self.lengths, per_response)


def value(prompt, response, reference):
    """The reward that is the response."""
    return float(response)


def chosen(**options):
    return nice(**{"reward": f"{__name__}:value", "mc_samples": SAMPLES} | options)


@pytest.mark.parametrize("baseline", ["none", "mean"])
@pytest.mark.parametrize("target_agg", ["mean_of_cos", "cos_of_mean"])
@pytest.mark.parametrize(("gradient_type", "group_agg"), [("adam", "max"), ("sgd", "mean")])
@pytest.mark.parametrize("projection", ["none", "sketch", "exact", "auto"])
def test_equals_the_transcription(projection, gradient_type, group_agg, target_agg, baseline):
    source = Answering()
    options = dict(projection=projection, gradient_type=gradient_type, group_agg=group_agg, target_agg=target_agg)
    selector = chosen(**options, baseline=baseline, proj_dim=16, projection_seed=5)
    evidence, state = selector.score({}, source, request())
    method = "sketch" if projection == "sketch" else "none"
    matrix = projection_matrix(Projection(method, 16, 5), SIZE).astype(np.float64)
    rows = source.candidates.preconditioned if gradient_type == "adam" else source.candidates.gradients
    influences = transcribed(rows @ matrix, source.gradients(baseline) @ matrix, GROUPS, target_agg)
    expected = influences.max(axis=1) if group_agg == "max" else influences.mean(axis=1)
    assert state == {}
    np.testing.assert_allclose(evidence.rows, expected, atol=3e-6)
    choice = jax.jit(selector.choose, static_argnums=2)(evidence, request(), 7)
    np.testing.assert_array_equal(choice.ids, np.argsort(-expected, kind="stable")[:7])


@pytest.mark.parametrize("room", [0, 1, 4])
def test_targets_are_measured_in_blocks_that_fit(room):
    expected, _ = chosen(projection="exact").score({}, Answering(), request())
    source = Answering()
    source.room = room
    found, _ = chosen(projection="exact").score({}, source, request())
    np.testing.assert_allclose(found.rows, expected.rows, rtol=1e-5)


def test_responses_are_asked_for_with_the_updates_key():
    source, key = Answering(), jax.random.key(7)
    selector = chosen(temperature=1, max_new_tokens=9, top_k=5, top_p=1)
    selector.score({}, source, request()._replace(key=key))
    generations = Generations(SAMPLES, 9, 1.0, 5, 1.0)
    assert source.asked == [(generations, jax.random.key_data(key).tolist())]
    assert source.candidates.asked[0].adam == Preconditioner()


@pytest.mark.parametrize("scales", [(1e-23, 1), (1e10, 1), (1, 1e-30), (1, 1e30)])
@pytest.mark.parametrize("projection", ["none", "exact"])
def test_scores_do_not_depend_on_the_scale_of_gradients_or_rewards(scales, projection):
    options = {"projection": projection, "gradient_type": "sgd"}
    expected, _ = chosen(**options).score({}, Answering(), request())
    source = Answering(scale=scales[0])
    source.rewards *= scales[1]
    found, _ = chosen(**options).score({}, source, request())
    np.testing.assert_allclose(found.rows, expected.rows, atol=3e-6)


@pytest.mark.parametrize(("baseline", "silent"), [("none", 0.0), ("mean", 0.7)])
@pytest.mark.parametrize("projection", ["sketch", "exact"])
@pytest.mark.parametrize("group_agg", ["max", "mean"])
def test_what_is_rewarded_alike_has_no_say(projection, group_agg, baseline, silent):
    source = Answering()
    groups = np.array(GROUPS)
    source.rewards[groups == 1] = silent
    source.rewards[np.flatnonzero(groups == 0)[0]] = silent
    options = dict(projection=projection, proj_dim=16, group_agg=group_agg, baseline=baseline)
    found, _ = chosen(**options).score({}, source, request())
    alive = (groups != 1) & (np.arange(len(groups)) != np.flatnonzero(groups == 0)[0])
    method = "sketch" if projection == "sketch" else "none"
    matrix = projection_matrix(Projection(method, 16), SIZE).astype(np.float64)
    candidates, targets = source.candidates.preconditioned @ matrix, source.gradients(baseline)[alive] @ matrix
    influences = transcribed(candidates, targets, groups[alive] // 2, "mean_of_cos")
    expected = influences.max(axis=1) if group_agg == "max" else influences.mean(axis=1)
    np.testing.assert_allclose(found.rows, expected, atol=3e-6)


@pytest.mark.parametrize(("baseline", "same"), [("none", 0.0), ("mean", 0.1)])
def test_rewards_that_say_nothing_end_the_run_in_one_line(baseline, same):
    source = Answering(rewards=np.full((len(GROUPS), SAMPLES), same))
    with pytest.raises(TrainingError, match=r"^selector 'nice': the rewards of each target's responses are all 0 or"):
        chosen(baseline=baseline).score({}, source, request())


@pytest.mark.parametrize("group_agg", ["max", "mean"])
def test_checkpoints_answer_for_themselves_and_are_summed(group_agg):
    sources, weights = [Answering(seed) for seed in (1, 2, 3)], [0.1, 2.0, 0.7]
    groups = np.array(GROUPS)
    for source in sources:
        source.rewards[groups == 2] = 0  # in all of them, so that it has no say
    sources[1].rewards[groups == 0] = 0
    sources[0].checkpoints = tuple(zip(weights, sources, strict=True))
    found, _ = chosen(projection="exact", group_agg=group_agg).score({}, sources[0], request())
    total = np.zeros((19, 2))
    for weight, source in zip(weights, sources, strict=True):
        for group in (0, 1) if source is not sources[1] else (1,):
            members = source.gradients()[groups == group]
            of_group = transcribed(source.candidates.preconditioned, members, [0] * len(members), "mean_of_cos")
            total[:, group] += weight * of_group[:, 0]
    np.testing.assert_allclose(found.rows, total.max(1) if group_agg == "max" else total.mean(1), atol=1e-5)


def test_a_model_may_judge():
    source = Answering()
    expected, _ = chosen().score({}, source, request())
    judged = chosen(reward="hf:a/judge")
    assert judged.init(source) == {}
    np.testing.assert_allclose(judged.score({}, source, request())[0].rows, expected.rows, rtol=1e-6)


def test_tasks_are_looked_at_before_the_first_step():
    source = Answering()
    source.tasks = lambda: [Task(0, "record 0 of 'a'", "?", "")]
    with pytest.raises(InputError, match=r"^reward 'exact_match': the reference of record 0 of 'a' is empty"):
        nice().init(source)
    with pytest.raises(InputError, match="needs a target set"):
        nice().init(FakeSignals(source.candidates))


def test_equal_rewards_leave_exactly_nothing_of_a_baseline():
    found = reinforce.factors(np.full((1, 3), 0.1), np.array([[5, 7, 9]]), "mean")
    np.testing.assert_array_equal(found, np.zeros((1, 3)))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("mc_samples", 0),
        ("baseline", "median"),
        ("temperature", 0.0),
        ("max_new_tokens", 0),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("reward", "bleu"),
        ("pattern", "x"),
        ("projection", "dense"),
    ],
)
def test_impossible_hyperparameters_are_refused_by_name(option, value):
    section = registry.policy_config("selector", "nice")
    with section.ignore_type():
        section[option] = value
    with pytest.raises(InputError, match=rf"^config\.selector\.{option} = "):
        registry.build("selector", section, Schedule(0, 1, -1))


def test_one_response_leaves_nothing_of_its_own_mean():
    with pytest.raises(ValueError, match=r"^baseline = 'mean': .* needs mc_samples >= 2"):
        nice(baseline="mean", mc_samples=1)
