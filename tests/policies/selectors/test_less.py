"""LESS against a float64 transcription of its formulas on random gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.policies import (
    Evidence,
    GradientNorms,
    Gradients,
    Influences,
    Preconditioner,
    Projection,
    registry,
)
from dataflex_jax.policies.common import influence
from dataflex_jax.policies.schedule import Schedule
from dataflex_jax.policies.selectors.less import less
from tests.helpers.fake_signals import FakeRows, FakeSignals, projection_matrix, request
from tests.helpers.influences import GROUPS, SIZE, signals, transcribed


@pytest.mark.parametrize("target_agg", ["mean_of_cos", "cos_of_mean"])
@pytest.mark.parametrize("group_agg", ["max", "mean"])
@pytest.mark.parametrize("gradient_type", ["adam", "sgd"])
@pytest.mark.parametrize("projection", ["none", "sketch", "exact", "auto"])
def test_equals_the_transcription(projection, gradient_type, group_agg, target_agg):
    source = signals()
    options = dict(projection=projection, gradient_type=gradient_type, group_agg=group_agg, target_agg=target_agg)
    selector = less(**options, proj_dim=16, projection_seed=5)
    evidence, state = selector.score({}, source, request())
    method = "sketch" if projection == "sketch" else "none"
    matrix = projection_matrix(Projection(method, 16, 5), SIZE).astype(np.float64)
    rows = source.candidates.preconditioned if gradient_type == "adam" else source.candidates.gradients
    influences = transcribed(rows @ matrix, source.targets.gradients @ matrix, GROUPS, target_agg)
    expected = influences.max(axis=1) if group_agg == "max" else influences.mean(axis=1)
    assert state == {}
    np.testing.assert_allclose(evidence.rows, expected, atol=2e-6)
    np.testing.assert_allclose(selector.by_group(source), influences, atol=2e-6)
    choice = jax.jit(selector.choose, static_argnums=2)(evidence, request(), 9)
    np.testing.assert_array_equal(choice.ids, np.argsort(-expected, kind="stable")[:9])
    np.testing.assert_array_equal(choice.scores, evidence.rows[choice.ids])
    np.testing.assert_array_equal(choice.all_scores, evidence.rows)


@pytest.mark.parametrize("group_agg", ["max", "mean"])
def test_checkpoints_are_summed_with_their_weights_before_the_groups_are_aggregated(group_agg):
    sources = [signals(seed) for seed in (1, 2, 3)]
    weights = [0.1, 2.0, 0.7]
    sources[0].checkpoints = tuple(zip(weights, sources, strict=True))
    evidence, _ = less(projection="none", group_agg=group_agg).score({}, sources[0], request())
    total = sum(
        weight * transcribed(s.candidates.preconditioned, s.targets.gradients, GROUPS, "mean_of_cos")
        for weight, s in zip(weights, sources, strict=True)
    )
    np.testing.assert_allclose(evidence.rows, total.max(1) if group_agg == "max" else total.mean(1), atol=5e-6)


def test_one_checkpoint_has_its_weight():
    source = signals()
    (plain, _), selector = less().score({}, source, request()), less()
    source.checkpoints = ((0.25, source),)
    np.testing.assert_allclose(selector.score({}, source, request())[0].rows, 0.25 * plain.rows, rtol=1e-6)


def test_candidates_are_preconditioned_and_targets_are_not():
    source = signals()
    options = dict(eps_mode="inside", bias_correction=True)
    less(**options, projection="sketch", proj_dim=16).score({}, source, request())
    projection = Projection("sketch", 16, 0)
    assert source.targets.asked == [Gradients(projection)]
    (asked,) = source.candidates.asked
    assert (asked.projection, asked.adam) == (projection, Preconditioner("inside", True))

    exact = signals()
    less(**options).score({}, exact, request())
    assert exact.targets.asked == [GradientNorms("all")]
    (asked,) = exact.candidates.asked
    assert isinstance(asked, Influences)
    assert asked.adam == Preconditioner("inside", True)


@pytest.mark.parametrize(("room", "sweeps"), [(0, 3), (1, 3), (2, 2), (3, 1)])
@pytest.mark.parametrize(("target_agg", "group_agg"), [("mean_of_cos", "max"), ("cos_of_mean", "mean")])
def test_groups_come_in_blocks_where_their_directions_do_not_fit(target_agg, group_agg, room, sweeps):
    source, selector = signals(), less(projection="exact", target_agg=target_agg, group_agg=group_agg)
    expected, _ = selector.score({}, source, request())
    source.room = room
    source.candidates.asked.clear()
    scores, _ = selector.score({}, source, request())
    assert len(source.candidates.asked) == sweeps
    np.testing.assert_allclose(scores.rows, expected.rows, rtol=1e-6)


@pytest.mark.parametrize(("parameters", "exact", "projected"), [("auto", "all", "blocks"), ("all", "all", "all")])
def test_auto_projects_where_the_directions_do_not_fit_and_says_which(caplog, parameters, exact, projected):
    influence._say.cache_clear()
    source = signals()
    with caplog.at_level("INFO"):
        less(parameters=parameters, proj_dim=16).score({}, source, request())
        source.room = 2
        less(parameters=parameters, proj_dim=16).score({}, source, request())
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == f"Influences are exact (projection exact, parameters {exact}, 3 target groups)."
    assert said[1].startswith(f"Influences are of projected gradients (projection sketch, parameters {projected}): ")
    assert "of 3 target groups 2 fit" in said[1]
    asked = [*source.targets.asked, *source.candidates.asked]
    assert [getattr(each, "parameters", exact) for each in asked] == [exact, projected, exact, projected]


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e30])
@pytest.mark.parametrize("projection", ["none", "exact"])
@pytest.mark.parametrize("target_agg", ["mean_of_cos", "cos_of_mean"])
def test_scores_do_not_depend_on_the_scale_of_gradients(scale, target_agg, projection):
    selector = less(projection=projection, gradient_type="sgd", target_agg=target_agg)
    expected, _ = selector.score({}, signals(), request())
    scores, _ = selector.score({}, signals(scale=scale), request())
    np.testing.assert_allclose(scores.rows, expected.rows, atol=2e-6)


@pytest.mark.parametrize("target_agg", ["mean_of_cos", "cos_of_mean"])
@pytest.mark.parametrize("projection", ["none", "exact"])
def test_gradients_without_a_direction_have_no_score_and_no_say(projection, target_agg):
    source, clean = signals(), signals()
    source.candidates.preconditioned[2] = 0
    source.candidates.preconditioned[3, 1] = np.nan
    source.candidates.preconditioned[4, 0] = np.inf
    source.targets.gradients[0, 0] = np.nan
    source.targets.gradients[3] = np.inf
    source.targets.gradients[2] = 0
    keep = [i for i in range(len(GROUPS)) if i not in (0, 2, 3)]
    clean.targets = FakeRows(gradients=clean.targets.gradients[keep], groups=np.array(GROUPS)[keep])
    selector = less(projection=projection, target_agg=target_agg)
    scores, _ = selector.score({}, source, request())
    expected = np.array(selector.score({}, clean, request())[0].rows)
    expected[[2, 3, 4]] = np.nan
    np.testing.assert_allclose(scores.rows, expected, atol=1e-6)
    assert not {2, 3, 4} & set(np.asarray(selector.choose(scores, request(), 20).ids))


@pytest.mark.parametrize("fault", [np.nan, np.inf, 0.0])
@pytest.mark.parametrize("target_agg", ["mean_of_cos", "cos_of_mean"])
@pytest.mark.parametrize("projection", ["sketch", "exact"])
def test_a_group_without_any_direction_is_refused_by_name(fault, target_agg, projection):
    source = signals()
    source.targets.gradients[np.array(GROUPS) == 1] = fault
    with pytest.raises(InputError, match=r"^the target set has no gradient to go by in group 'botany': "):
        less(target_agg=target_agg, projection=projection).score({}, source, request())


@pytest.mark.parametrize("target_agg", ["mean_of_cos", "cos_of_mean"])
def test_a_group_whose_gradients_cancel_is_refused_by_name(target_agg):
    source = FakeSignals(
        FakeRows(preconditioned=np.ones((2, 2))),
        FakeRows(gradients=[[1, 0], [2, 1], [-2, -1]], groups=[0, 1, 1], names=("one", "two")),
    )
    with pytest.raises(InputError, match=r"^the target set has no gradient to go by in group 'two': "):
        less(projection="exact", target_agg=target_agg).score({}, source, request())


@pytest.mark.parametrize("parameters", ["blocks", "all"])
def test_both_sides_are_gradients_of_the_same_parameters(parameters):
    source = signals()
    less(projection="none", parameters=parameters).score({}, source, request())
    asked = [*source.candidates.asked, *source.targets.asked]
    assert [signal.parameters for signal in asked] == [parameters] * 2


def test_no_target_set_is_refused():
    source = FakeSignals(FakeRows(preconditioned=np.ones((4, 3))))
    with pytest.raises(InputError, match=r"^a selector by influence needs a target set"):
        less().score({}, source, request())


def test_ties_are_taken_in_incoming_order():
    ids = less().choose(Evidence(jnp.asarray([1.0, 3, 2, 3, 2, 3])), request(), 4).ids
    np.testing.assert_array_equal(ids, [1, 3, 5, 2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"proj_dim": 0}, "proj_dim = 0: "),
        (
            {"projection": "dense"},
            "projection = 'dense': must be one of auto, exact, sketch, rademacher, kronecker, none",
        ),
        ({"projection": "kronecker"}, "projection = 'kronecker': .* gradient_type = 'sgd'"),
        ({"gradient_type": "rms"}, "gradient_type = 'rms': "),
        ({"eps_mode": "both"}, "eps_mode = 'both': "),
        ({"target_agg": "sum"}, "target_agg = 'sum': "),
        ({"group_agg": "min"}, "group_agg = 'min': "),
        ({"parameters": "head"}, "parameters = 'head': must be one of auto, blocks, all"),
        (
            {"projection": "kronecker", "gradient_type": "sgd", "parameters": "all"},
            "projection = 'kronecker': is of linear layers; needs parameters = 'blocks'",
        ),
    ],
)
def test_impossible_hyperparameters_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        less(**options)
    section = registry.policy_config("selector", "less")
    section.update(options)
    with pytest.raises(InputError, match=rf"^config\.selector\.{message}"):
        registry.build("selector", section, Schedule(0, 1, -1))
