"""The checks of hyperparameters, and groups of them that several factories share."""

import dataclasses
import inspect
import math
import re

import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.policies import options, registry
from dataflex_jax.policies.common.influence import InfluenceOptions
from dataflex_jax.policies.common.pattern import ScoreOptions
from dataflex_jax.policies.proportions import Proportions
from dataflex_jax.policies.schedule import Schedule


@pytest.mark.parametrize(
    ("check", "arguments", "accepted", "message"),
    [
        (options.one_of, (("a", "b"),), "b", "one of a, b"),
        (options.at_least, (2,), 2, ">= 2"),
        (options.positive, (), 0.1, "> 0"),
        (options.between, (0, 1), 1, r"in \[0, 1\]"),
    ],
)
def test_each_check_names_option_value_and_what_is_accepted(check, arguments, accepted, message):
    check("x", accepted, *arguments)
    refused = "c" if check is options.one_of else -0.5
    with pytest.raises(ValueError, match=f"^x = {refused!r}: must be {message}$"):
        check("x", refused, *arguments)


@pytest.mark.parametrize(
    ("annotation", "right", "wrong", "words"),
    [
        (int, [0, -5, 2**31 - 1], [True, 1.0, "1", 2**31, None, math.nan], "a 32-bit integer"),
        (float, [0, 0.5, -1e38], [True, "1", math.nan, math.inf, 1e39, 10**400, None, 1j], "a finite 32-bit number"),
        (bool, [True, False], [0, 1, "True", None], "True or False"),
        (str, ["", "a"], [b"a", 1, None], "a string"),
        (float | None, [None, 1], [False, ""], "a finite 32-bit number or None"),
        (tuple, [(), ("a",), [1]], ["ab", None, {1}], "a tuple"),
        (tuple[float, float], [(0, 1.0), [0, 1]], [("a", "b"), (1,), (1, 2, 3)], "a tuple (a finite 32-bit number, "),
        (tuple[int, ...], [(), (1, 2)], [(1, "a"), (1.0,), 1], "a tuple of 32-bit integers"),
        (Proportions, ["uniform", None, (1, 2), (("a", 1),)], [("a", 1), 0.5, (("a", "b"),)], "a tuple of finite "),
        (dict, [{}, 1], [], ""),
    ],
)
def test_a_value_must_be_as_the_annotation_says(annotation, right, wrong, words):
    for value in right:
        options.of_type("x", value, annotation)
    for value in wrong:
        with pytest.raises(ValueError, match=f"^x = .*: must be {re.escape(words)}"):
            options.of_type("x", value, annotation)


def test_the_ends_of_an_interval_may_be_open():
    for value in (0, 1):
        options.between("x", value, 0, 1)
    with pytest.raises(ValueError, match=r"^x = 0: must be in \(0, 1\]$"):
        options.between("x", 0, 0, 1, open_low=True)
    with pytest.raises(ValueError, match=r"^x = 1: must be in \[0, 1\)$"):
        options.between("x", 1, 0, 1, open_high=True)


@pytest.mark.parametrize(
    ("check", "bounds"), [(options.positive, ()), (options.at_least, (0,)), (options.between, (0, 1))]
)
def test_nan_is_refused(check, bounds):
    with pytest.raises(ValueError, match=r"^x = nan: must be"):
        check("x", math.nan, *bounds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    low: float = 0.5
    high: float = 1.5

    def __post_init__(self):
        options.positive("low", self.low)


def test_a_factory_takes_its_own_options_and_the_groups():
    @options.including(Group)
    def factory(shared, *, own: int = 3):
        """What it is."""
        return shared, own

    assert list(inspect.signature(factory).parameters) == ["own", "low", "high"]
    assert inspect.signature(factory).parameters["high"].default == 1.5
    assert factory.__doc__ == "What it is."
    assert factory() == (Group(), 3)
    assert factory(own=4, high=2.0) == (Group(high=2.0), 4)
    with pytest.raises(ValueError, match=r"^low = 0: must be > 0$"):
        factory(low=0)
    with pytest.raises(TypeError, match="'lower'"):
        factory(lower=0)


def test_what_a_factory_leaves_out_of_a_group_keeps_its_default():
    factory = options.including(Group, without=("high",))(lambda shared: shared)
    assert list(inspect.signature(factory).parameters) == ["low"]
    assert factory(low=1.0) == Group(low=1.0)
    with pytest.raises(TypeError, match="'high'"):
        factory(high=2.0)


@pytest.mark.parametrize(
    ("kind", "name", "own", "group", "without"),
    [
        ("order", "folding", ("L",), ScoreOptions, ()),
        ("order", "sorting", (), ScoreOptions, ()),
        ("selector", "less", (), InfluenceOptions, ()),
        ("selector", "icons", (), InfluenceOptions, ("target_agg", "group_agg")),
    ],
)
def test_a_section_has_a_policys_own_options_and_those_it_shares(kind, name, own, group, without):
    defaults = {field.name: field.default for field in dataclasses.fields(group) if field.name not in without}
    section = registry.policy_config(kind, name)
    assert {field: section[field] for field in defaults} == defaults
    section.update({"misspelt": 1})
    accepted = ", ".join((*own, *defaults))
    with pytest.raises(
        InputError, match=rf"misspelt: {kind} '{name}' has no such hyperparameter; accepted: {accepted}, "
    ):
        registry.build(kind, section, Schedule(0, 1, -1))
