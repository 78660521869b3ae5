"""The policies of a run: when they are at work, what they are called and need, and what does not go together."""

import pytest

from dataflex_jax.configs import base
from dataflex_jax.errors import InputError
from dataflex_jax.policies import TARGETS, GradientNorms, Reference
from dataflex_jax.policies.active import active_policies, weighter_sections
from dataflex_jax.policies.schedule import Schedule

RHO1 = {"weighter.reference": "runs/a"}
NO_SCORES = "order.scores = 'selector': needs a config.selector that scores"
DOREMI = {"mixer.reference": "runs/a"}


def policies(choices="", fields=()):
    """Those of the base configuration with the choices and {dotted name: value}."""
    config = base.get_config(choices)
    config.update_from_flattened_dict(dict(fields))
    return active_policies(config)


def test_nothing_named_is_the_static_mixer_alone():
    plain = policies("", {"warmup_step": 3, "update_step": 2, "update_times": 5})
    assert (plain.mixer.name, plain.mixer.schedule) == ("static", Schedule(3, 2, 5))
    assert (plain.selector, plain.order, plain.weighters) == (None, None, ())
    assert plain.by_domain
    assert not plain.mixes
    assert plain.names() == dict.fromkeys(["mixer.name", "selector.name", "order.name", "weighter.name"])


def test_each_policy_has_its_name_and_its_schedule():
    several = policies(
        "mixer=odm,selector=loss,order=sorting,weighter=loss+adapt",
        {"update_step": 4, "mixer.update_step": 2, "selector.warmup_step": 3, "weighter.adapt.update_times": 1},
    )
    assert several.names() == {
        "mixer.name": "odm",
        "selector.name": "loss",
        "order.name": "sorting",
        "weighter.name": "adapt+loss",
    }
    at_work = [several.mixer, several.selector, several.order, *several.weighters]
    assert [policy.schedule for policy in at_work] == [
        Schedule(0, 2, -1),
        Schedule(3, 4, -1),
        Schedule(0, 4, -1),
        Schedule(0, 4, 1),
        Schedule(0, 4, -1),
    ]
    assert several.mixes


def test_a_selector_that_never_chooses_is_none():
    full = policies("selector=full")
    assert full.selector is None
    assert full.names()["selector.name"] is None
    assert full.by_domain


@pytest.mark.parametrize(
    ("choices", "by_domain"),
    [
        ("selector=random", False),
        ("order=shuffle", False),
        ("selector=full,order=shuffle", False),
        ("mixer=odm,selector=random", True),
        ("mixer=static,order=shuffle", True),
        ("weighter=loss", True),
    ],
)
def test_without_a_mixer_a_selector_or_an_order_has_the_whole_pool_and_nothing_is_published(choices, by_domain):
    chosen = policies(choices, {"warmup_step": 1})
    assert chosen.by_domain == by_domain
    assert chosen.mixer.schedule == Schedule(1, 1, -1 if by_domain else 0)
    proportions = {"data.proportions": (1, 2)}
    if by_domain:
        policies(choices, proportions)
    else:
        with pytest.raises(InputError, match=r"^config\.data\.proportions: without a mixer a selector or an order"):
            policies(choices, proportions)


def test_a_selector_inside_the_step_leaves_the_draws_as_they_are():
    chosen = policies("selector=greats", {"data.proportions": (1, 2), "selector.warmup_step": 3})
    assert (chosen.selector, chosen.by_domain) == (None, True)
    assert (chosen.online.name, chosen.online.schedule) == ("greats", Schedule(3, 1, -1))
    assert chosen.names()["selector.name"] == "greats"
    assert chosen.needs(TARGETS)


@pytest.mark.parametrize(("choices", "keep"), [("", None), ("selector=less", None), ("selector=less", 0.25)])
def test_what_a_selector_keeps(choices, keep):
    assert policies(choices, {"selector.keep": keep} if keep else {}).keep == keep


def test_all_scores_are_kept_unless_a_selector_says_otherwise():
    assert not policies().save_all_scores
    assert policies("selector=loss").save_all_scores
    assert not policies("selector=loss", {"selector.save_all_scores": False}).save_all_scores


@pytest.mark.parametrize(
    ("choices", "fields", "needed"),
    [
        ("mixer=odm,selector=loss,weighter=loss+joint_update_aware", {}, True),
        ("mixer=odm,selector=loss,weighter=loss", {}, False),
        ("mixer=doge", {}, False),
        ("mixer=doge", {"mixer.targets": "targets"}, True),
        ("selector=less", {}, True),
        ("order=sorting", {}, False),
        ("", {}, False),
    ],
)
def test_what_one_of_them_needs_is_needed(choices, fields, needed):
    chosen = policies(choices, fields)
    assert chosen.needs(TARGETS) == needed
    assert not chosen.needs(GradientNorms())
    mixer = chosen.mixer._replace(policy=chosen.mixer.policy._replace(needs=frozenset({GradientNorms()})))
    assert chosen._replace(mixer=mixer).needs(GradientNorms())


def test_the_reference_is_whose_policy_wants_one():
    assert policies("mixer=odm,weighter=loss").reference() is None
    assert policies("mixer=doremi", DOREMI).reference() == Reference("runs/a", "model")
    assert policies("weighter=rho1", RHO1).reference() == Reference("runs/a", "model")
    assert policies("mixer=doremi,weighter=rho1", DOREMI | RHO1).reference() == Reference("runs/a", "model")


@pytest.mark.parametrize(
    ("choices", "fields", "option"),
    [
        ("mixer=doremi,weighter=rho1", DOREMI | RHO1, "mixer.reference"),
        ("mixer=odm,weighter=rho1", RHO1, "weighter.reference"),
        ("weighter=loss+rho1", {"weighter.rho1.reference": "runs/a"}, "weighter.rho1.reference"),
        ("selector=rho_loss,weighter=rho1", RHO1 | {"selector.reference": "runs/a"}, "selector.reference"),
        ("mixer=odm,weighter=loss", {}, None),
    ],
)
def test_the_option_of_the_reference_is_that_of_the_first_policy_with_one(choices, fields, option):
    config = base.get_config(choices)
    config.update_from_flattened_dict(fields)
    assert active_policies(config).reference_option(weighter_sections(config)) == option


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"weighter.reference": "runs/b"}, r"'runs/a' \(model\) and 'runs/b' \(model\)"),
        ({"weighter.reference_losses": "cached"}, r"'runs/a' \(cached\) and 'runs/a' \(model\)"),
    ],
)
def test_two_references_are_refused(fields, named):
    message = f"^config: the policies want different reference models, {named}; give all of them the same$"
    with pytest.raises(InputError, match=message):
        policies("mixer=doremi,weighter=rho1", DOREMI | RHO1 | fields)


@pytest.mark.parametrize(
    ("choices", "fields", "message"),
    [
        ("order=sorting", {"order.scores": "selector"}, NO_SCORES),
        ("selector=full,order=sorting", {"order.scores": "selector"}, NO_SCORES),
        (
            "order=sorting",
            {"order.update_step": 2},
            "order.update_step: not used, the order arranges all rows, before the first step; leave it None",
        ),
        (
            "selector=loss,order=sorting",
            {"order.dynamic": True, "order.warmup_step": 0},
            "order.warmup_step: not used, the order arranges each of the selector's choices; leave it None",
        ),
        ("mixer=odm", {"mixer.alpha": 2.0}, "mixer.alpha = 2.0: must be in"),
        ("selector=greats,order=sorting", {"order.scores": "selector"}, NO_SCORES),
        ("selector=full", {"selector.keep": 0.5}, "selector.keep = 0.5: selector 'full' has no choice of its own"),
        ("selector=greats", {"selector.keep": 0.5}, "selector.keep = 0.5: selector 'greats' has no choice of its own"),
        ("selector=loss", {"selector.keep": 0.5, "selector.replacement": True}, "selector.keep = 0.5: a candidate is"),
        ("selector=loss", {"selector.update_times": -2}, "selector.update_times = -2: must be >= 0, or -1"),
        ("weighter=loss", {"weighter.r": 0.0}, "weighter.r = 0.0: must be > 0"),
        ("weighter=loss+adapt", {"weighter.adapt.tau": 0.0}, "weighter.adapt.tau = 0.0: must be > 0"),
    ],
)
def test_what_cannot_be_is_refused_by_name(choices, fields, message):
    with pytest.raises(InputError) as error:
        policies(choices, fields)
    assert str(error.value).startswith(f"config.{message}")


def test_a_dynamic_order_alone_has_a_schedule_of_its_own():
    order = policies("order=sorting", {"order.dynamic": True, "order.update_step": 5}).order
    assert order.schedule == Schedule(0, 5, -1)
    assert policies("selector=loss,order=sorting", {"order.scores": "selector"}).order.policy.scores.kind == "selector"
