"""What a policy returns is refused by name where no run could work with it, as soon as it is traced."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.policies import TARGETS, Choice, Evidence, Mixer, Online, Order, Selector, Weighter, registry
from dataflex_jax.policies.base import ScoreSource
from dataflex_jax.policies.contract import (
    check_evidence,
    check_fields,
    check_ids,
    check_signal,
    checked_mixer,
    checked_order,
    checked_selector,
    checked_weighter,
    distribution_fault,
)
from dataflex_jax.policies.mixers.odm import odm
from dataflex_jax.policies.schedule import Schedule, Scheduled
from tests.helpers import fake_signals, observations

NATURAL = jnp.asarray([0.5, 0.3, 0.2])


class State(NamedTuple):
    weights: jax.Array
    n: object


def scheduled(policy):
    return Scheduled("mine", policy, Schedule(0, 1, -1))


def mixer(**functions):
    made = Mixer(
        init=lambda natural: State(natural, 0),
        update=lambda state, seen: state,
        sampling_weights=lambda state: state.weights,
    )
    return checked_mixer(scheduled(made._replace(**functions)), 3).policy


def refused(function, *arguments):
    with pytest.raises(InputError) as caught:
        jax.eval_shape(function, *arguments)
    return str(caught.value)


def test_a_right_one_is_what_it_was():
    plain, checked = odm(), checked_mixer(scheduled(odm()), 3).policy
    seen = observations.of_domains(1, [3, 2, 1], [1, 1, 0])
    state = checked.update(checked.init(NATURAL), seen)
    for ours, theirs in zip(state, plain.update(plain.init(NATURAL), seen), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(checked.sampling_weights(state), state.weights)
    assert checked.loss_weights is None


@pytest.mark.parametrize(
    ("update", "returned"),
    [
        (lambda state, seen: state._replace(n=state.n + 0.5), "State(weights=float32[3], n=float32[])"),
        (lambda state, seen: state._replace(weights=state.weights[:2]), "State(weights=float32[2], n=int32[])"),
        (lambda state, seen: (state.weights, state.n), "(float32[3], int32[])"),
        (lambda state, seen: state._replace(n="one"), "State(weights=float32[3], n=a str)"),
        (lambda state, seen: None, "None"),
    ],
)
def test_a_state_that_changes_its_kind_is_named(update, returned):
    policy = mixer(update=update)
    message = refused(lambda state: policy.update(state, None), policy.init(NATURAL))
    assert message.startswith(f"mixer 'mine': update returned {returned}; expected ")
    if "n=float32[]" in returned:
        assert message.endswith("a state like the one before, n being int32[], not float32[]")
    policy = mixer(refresh=update, on_resume=lambda old, fresh: update(old, None))
    assert "refresh returned" in refused(lambda state: policy.refresh(state, None), policy.init(NATURAL))
    assert "on_resume returned" in refused(lambda s: policy.on_resume(s, policy.init(NATURAL)), policy.init(NATURAL))


@pytest.mark.parametrize("name", ["sampling_weights", "loss_weights", "average"])
@pytest.mark.parametrize(
    ("weights", "returned"),
    [(jnp.ones(2), "float32[2]"), (jnp.ones((3, 1)), "float32[3,1]"), (0.5, "float32[]"), ("even", "a str")],
)
def test_weights_are_one_number_a_domain(name, weights, returned):
    policy = mixer(**{name: lambda state: weights})
    message = refused(lambda state: getattr(policy, name)(state) and 0, policy.init(NATURAL))
    assert message == f"mixer 'mine': {name} returned {returned}; expected one number for each of 3 domains"


def test_a_state_and_a_log_are_what_a_run_can_keep():
    assert "init returned a str; expected arrays and 32-bit numbers only" in refused(
        lambda: mixer(init=lambda _: "x").init(0)
    )
    policy = mixer(log=lambda state: state.weights)
    with pytest.raises(InputError, match=r"^mixer 'mine': log returned float32\[3\]; expected names to numbers$"):
        policy.log(State(np.ones(3, np.float32), 0))


@pytest.mark.parametrize(
    ("weights", "returned"),
    [
        (lambda seen: seen.losses[:2], "float32[2]"),
        (lambda seen: jnp.ones((4, 4)), "float32[4,4]"),
        (lambda seen: 1.0, "float32[]"),
        (lambda seen: (seen.losses, seen.losses), "(float32[4], float32[4])"),
    ],
)
def test_a_weighter_weighs_rows_or_tokens(weights, returned):
    policy = checked_weighter(scheduled(Weighter(lambda width: (), lambda state, seen: weights(seen)))).policy
    seen = observations.of_rows(np.arange(4), mask=np.ones((4, 7)))
    message = refused(lambda: policy.weigh((), seen))
    assert message == (
        f"weighter 'mine': weigh returned {returned}; expected a weight of each row, [4], or of each token, [4,7]"
    )


def test_a_weighter_embeds_rows():
    made = Weighter(lambda width: (), lambda state, seen: seen.losses, embed=lambda hidden, inputs: hidden)
    message = refused(checked_weighter(scheduled(made)).policy.embed, jnp.ones((4, 7, 16)), jnp.ones((4, 7)))
    assert message == "weighter 'mine': embed returned float32[4,7,16]; expected a vector of each row, [4, E]"


def selector(**functions):
    made = Selector(
        score=lambda state, signals, request: (Evidence(np.zeros(5, np.float32)), state),
        choose=lambda evidence, request, num: Choice(jnp.arange(num), evidence.rows[:num], evidence.rows),
    )
    return checked_selector(scheduled(made._replace(**functions))).policy


@pytest.mark.parametrize("result", [np.zeros(5), (Evidence(np.zeros(5)), np.zeros(2)), (Evidence(np.zeros(5)),), None])
def test_a_selector_scores_and_has_a_state(result):
    policy = selector(score=lambda *_: result)
    with pytest.raises(InputError, match=r"^selector 'mine': score returned .*; expected a pair: Evidence, and a dict"):
        policy.score({}, None, fake_signals.request())


@pytest.mark.parametrize("rows", [np.zeros(4), (), (np.zeros(5), np.zeros(3)), "abcde", np.float32(1)])
def test_evidence_says_something_of_every_candidate(rows):
    with pytest.raises(InputError, match=r"^selector 'mine': score returned .* for each of 5 candidates$"):
        check_evidence("mine", Evidence(rows), 5)
    check_evidence("mine", Evidence({"loss": np.zeros(5), "gradients": jnp.zeros((5, 2))}), 5)


@pytest.mark.parametrize(
    "choice",
    [
        lambda rows, num: Choice(jnp.arange(num - 1), rows[:num], rows),
        lambda rows, num: Choice(jnp.arange(num) * 1.0, rows[:num], rows),
        lambda rows, num: Choice(jnp.arange(num), rows[:1], rows),
        lambda rows, num: Choice(jnp.arange(num), rows[:num], rows[:num]),
        lambda rows, num: (jnp.arange(num), rows[:num], rows),
    ],
)
def test_a_choice_has_as_many_ids_and_scores_as_were_asked_for(choice):
    policy = selector(choose=lambda evidence, request, num: choice(evidence.rows, num))
    with pytest.raises(InputError, match=r"^selector 'mine': choose returned ") as caught:
        jax.jit(policy.choose, static_argnums=2)(Evidence(jnp.zeros(5)), fake_signals.request(), 3)
    assert str(caught.value).endswith("expected a Choice of 3 ids, their 3 scores and the scores of all 5 candidates")


def test_scores_by_group_are_a_number_for_each_candidate_and_group():
    rows = fake_signals.FakeRows(losses=np.zeros(3), groups=[0, 1, 1], names=("a", "b"))
    signals = fake_signals.FakeSignals(candidates=rows, targets=rows)
    assert selector(by_group=lambda signals: np.zeros((3, 2))).by_group(signals).shape == (3, 2)
    wrong = selector(by_group=lambda signals: np.zeros(3))
    with pytest.raises(InputError, match=r"by_group returned .* for each of 3 candidates and 2 target groups$"):
        wrong.by_group(signals)


def test_ids_are_distinct_places_of_candidates():
    check_ids("mine", np.array([4, 0]), 5, replacement=False)
    check_ids("mine", np.array([4, 4]), 5, replacement=True)
    for ids, message in (
        ([0, 5], "choose returned the id 5; ids from 0 to 4 are expected"),
        ([-1, 2], "choose returned the id -1; ids from 0 to 4 are expected"),
        ([3, 1, 3], "choose returned the id 3 2 times; distinct ids are expected"),
    ):
        with pytest.raises(InputError, match=f"^selector 'mine': {message}"):
            check_ids("mine", np.array(ids), 5, replacement=False)


@pytest.mark.parametrize("result", [jnp.arange(3), jnp.arange(2) * 1.0, None])
def test_what_is_picked_in_a_step_are_as_many_places_as_are_kept(result):
    online = Online(lambda seen, num: result)
    policy = checked_selector(scheduled(Selector(None, None, online=online))).policy
    with pytest.raises(InputError, match=r"^selector 'mine': online.pick returned .*; expected the places of 2 rows"):
        policy.online.pick(None, 2)


@pytest.mark.parametrize("result", [[0, 1], [0, 1, 1], [1, 2, 3], [0.0, 1.0, 2.0], None])
def test_an_order_is_a_permutation(result):
    policy = checked_order(scheduled(Order(lambda scores, key: np.array(result)))).policy
    with pytest.raises(InputError, match=r"^order 'mine': arrange returned .*; expected a permutation of the numbers"):
        policy.arrange(np.zeros(3), jax.random.key(0))
    assert checked_order(scheduled(Order(lambda scores, key: [2, 0, 1]))).policy.arrange(np.zeros(3), None) == [2, 0, 1]


def test_what_is_a_distribution():
    assert distribution_fault(np.float32([0.1] * 10)) is None
    assert distribution_fault(np.array([1.0, 0.0])) is None
    assert distribution_fault(np.array([np.nan, 1.0])) == "not all finite"
    assert distribution_fault(np.array([1.5, -0.5])) == "-0.5 is negative"
    assert distribution_fault(np.array([1.0, 1.0])) == "the sum is 2, not 1"


def unfit(made):
    with pytest.raises(InputError) as caught:
        check_fields("it", made)
    return str(caught.value)


def test_a_function_of_the_wrong_number_of_arguments_or_none_is_named():
    made = Mixer(init=lambda natural: natural, update=lambda state, seen: state, sampling_weights=lambda state: state)
    check_fields("it", made)
    check_fields("it", made._replace(update=lambda *arguments: 0, log=jax.jit(lambda state, more=1: state)))
    assert unfit(made._replace(update=lambda state: 0)) == (
        "it: update is a function of (state); expected a function of 2 arguments"
    )
    assert unfit(made._replace(init=None)) == "it: init is None; expected a function of 1 argument"
    assert unfit(made._replace(log=3)) == "it: log is 3; expected a function of 1 argument, or None"
    assert unfit(Selector(None, lambda evidence, request, num: 0)).startswith("it: one of score and choose is None")


def test_what_chooses_inside_the_step_chooses_nothing_between_two():
    made = Selector(None, None, online=Online(lambda seen, num: seen))
    check_fields("it", made)
    assert unfit(made._replace(online=Online(lambda seen: seen))).startswith("it: online: pick is a function of (seen)")
    for field, value, wanted in (("oversample", 1, "an integer >= 2"), ("target_rows", -1, "an integer >= 0")):
        message = f"it: online: {field} is {value}; expected {wanted}"
        assert unfit(made._replace(online=made.online._replace(**{field: value}))) == message
    comparing = made._replace(online=made.online._replace(target_rows=3))
    assert unfit(comparing) == "it: online.target_rows is 3; needs must have TARGETS then"
    check_fields("it", comparing._replace(needs=frozenset({TARGETS})))
    both = made._replace(score=lambda state, signals, request: 0, choose=lambda evidence, request, num: 0)
    assert unfit(both).startswith("it: has both score and online")


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("refresh_interval", 0, "an integer >= 1"),
        ("refresh_interval", 2.5, "an integer"),
        ("refresh_interval", True, "an integer"),
        ("reference", "a/run", "a Reference, or None"),
        ("needs", "targets", "a set"),
        ("needs", TARGETS, "a set"),
        ("embeds_whole", "yes", "True or False"),
    ],
)
def test_a_field_of_the_wrong_type_is_named(field, value, wanted):
    made = Weighter(lambda width: (), lambda state, seen: seen.losses)._replace(**{field: value})
    assert unfit(made) == f"it: {field} is {value!r}; expected {wanted}"


def test_fields_with_a_few_values():
    made = Mixer(init=lambda natural: natural, update=lambda state, seen: state, sampling_weights=lambda state: state)
    assert unfit(made._replace(loss_mean="rows")) == "it: loss_mean is 'rows'; expected one of tokens, domains"
    order = Order(lambda scores, key: scores)
    assert unfit(order._replace(scores="loss")) == "it: scores is 'loss'; expected a ScoreSource"
    assert "expected a ScoreSource of loss, selector" in unfit(order._replace(scores=ScoreSource("losses")))


def test_a_factory_that_leaves_a_function_out_is_refused_when_the_policy_is_built(monkeypatch):
    registry.names("order")
    monkeypatch.setitem(registry._FACTORIES, "order", dict(registry._FACTORIES["order"]))
    registry.register_order("without")(lambda: Order(None))
    with pytest.raises(InputError, match=r"^order 'without': arrange is None; expected a function of 2 arguments$"):
        registry.build("order", registry.policy_config("order", "without"), Schedule(0, 1, -1))


def test_weights_are_real_numbers():
    policy = mixer(loss_weights=lambda state: state.weights + 0j)
    assert "loss_weights returned complex64[3]; expected" in refused(policy.loss_weights, policy.init(NATURAL))


@pytest.mark.parametrize("result", [lambda n: jnp.zeros(n + 1), lambda n: jnp.float32(0), lambda n: None, lambda n: ()])
def test_a_signal_says_something_of_every_row(result):
    with pytest.raises(InputError, match=r"^signal 'int': its function returned .* of a batch of 4 rows; expected"):
        check_signal(3, result(4), 4)
    check_signal(3, {"a": jnp.zeros(4), "b": jnp.zeros((4, 2))}, 4)


@pytest.mark.parametrize("leaf", ["text", object(), 2**40])
def test_a_state_that_no_checkpoint_holds_is_named(leaf):
    message = refused(lambda: mixer(init=lambda natural: {"a": leaf}).init(NATURAL))
    assert message.startswith("mixer 'mine': init returned {'a': a ")
    assert f"expected arrays and 32-bit numbers only, not a {type(leaf).__name__}" in message
    policy = selector(
        init=lambda signals: {"a": leaf},
        score=lambda state, signals, request: (Evidence(np.zeros(5, np.float32)), {"a": leaf}),
    )
    for call in (lambda: policy.init(None), lambda: policy.score({}, None, fake_signals.request())):
        with pytest.raises(InputError, match=r"^selector 'mine': .* expected arrays and 32-bit numbers only"):
            call()
    with pytest.raises(InputError, match=r"^selector 'mine': .* expected as shared arrays and 32-bit numbers only"):
        check_evidence("mine", Evidence(np.zeros(5), leaf), 5)
    with pytest.raises(InputError, match=r"^mixer 'mine': log returned .* expected names to numbers$"):
        mixer(log=lambda state: {"a": leaf}).log(State(np.ones(3, np.float32), 0))


@pytest.mark.parametrize("weights", [jnp.zeros(3), jnp.asarray([1, -1, 1.0]), jnp.asarray([1, jnp.nan, 1])])
def test_an_average_that_no_run_can_sample_with_is_named(weights):
    message = refused(lambda: mixer(average=lambda state: weights).average(None))
    assert message.startswith("mixer 'mine': average returned float32[3]; expected finite numbers >= 0, not all 0")
    np.testing.assert_array_equal(mixer(average=lambda state: NATURAL).average(None), NATURAL)
