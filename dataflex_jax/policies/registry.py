"""Policies by name: registration, plugins, and building one from its section of the configuration.

A user's own policy lives in the user's package and registers itself with the same decorators:

    from dataflex_jax.policies import Mixer, register_mixer

    @register_mixer("my_mixer")
    def my_mixer(*, temperature: float = 1.0) -> Mixer: ...

`config.plugins = ("my_package.my_mixer",)` imports it; an installed package may instead declare an entry point of group
`dataflex_jax.policies` that names the module.
"""

import functools
import importlib
import importlib.metadata
import inspect
import pkgutil
import re
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import ml_collections
from ml_collections import config_dict

from dataflex_jax.errors import InputError, shown
from dataflex_jax.policies import mixers, options, orders, selectors, weighters
from dataflex_jax.policies.base import Mixer, Order, Selector, Weighter
from dataflex_jax.policies.contract import check_fields
from dataflex_jax.policies.schedule import Schedule, Scheduled
from dataflex_jax.policies.user_code import user_code

_BUILTIN = {"mixer": mixers, "selector": selectors, "order": orders, "weighter": weighters}
KINDS = tuple(_BUILTIN)
_PROTOCOLS = {"mixer": Mixer, "selector": Selector, "order": Order, "weighter": Weighter}
_FACTORIES: dict[str, dict[str, Callable[..., Any]]] = {kind: {} for kind in KINDS}
_SCHEDULE_FIELDS = Schedule._fields
_ENTRY_POINTS = "dataflex_jax.policies"


class _RunField(NamedTuple):
    """A field of all policies of a kind that is the run's business, not the policy's."""

    annotation: Any
    default: Any
    check: Callable[[str, Any], None] = lambda name, value: None


def _check_keep(name: str, value: float | None) -> None:
    if value is not None:
        options.between(name, value, 0, 1, open_low=True)


_RUN_FIELDS = {
    "selector": {
        "keep": _RunField(float | None, None, _check_keep),
        "save_all_scores": _RunField(bool, True),
        "save_examples": _RunField(bool, True),
    },
}


def _register(kind: str, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(factory: Callable[..., Any]) -> Callable[..., Any]:
        known = _FACTORIES[kind].get(name)
        if known is not None and known.__module__ != factory.__module__:
            raise InputError(f"{kind} {name!r} of {factory.__module__} is already registered by {known.__module__}")
        for parameter in inspect.signature(factory).parameters.values():
            if parameter.kind is not parameter.KEYWORD_ONLY or parameter.default is parameter.empty:
                raise InputError(
                    f"{kind} {name!r}: parameter {parameter.name!r} must be keyword-only and have a default"
                )
            if parameter.name in ("name", *_SCHEDULE_FIELDS, *_RUN_FIELDS.get(kind, {})):
                raise InputError(f"{kind} {name!r}: the parameter name {parameter.name!r} is every {kind}'s already")
        _FACTORIES[kind][name] = factory
        return factory

    return add


register_mixer = functools.partial(_register, "mixer")
register_selector = functools.partial(_register, "selector")
register_order = functools.partial(_register, "order")
register_weighter = functools.partial(_register, "weighter")


@functools.cache
def _load_installed() -> None:
    for package in _BUILTIN.values():
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
    for entry_point in importlib.metadata.entry_points(group=_ENTRY_POINTS):
        entry_point.load()


def is_module_name(value: Any) -> bool:
    """Whether it can be the name of a module, with dots between those of its packages."""
    return isinstance(value, str) and re.fullmatch(r"[\w-]+(\.[\w-]+)*", value) is not None


def load_plugins(modules: Iterable[str]) -> None:
    """Imports the modules that register policies, signals, sources, evaluators or model families of the user's own.

    Raises:
        InputError: what is no module's name, or a module that cannot be found, by name.
    """
    _load_installed()
    for module in modules:
        if not is_module_name(module):
            raise InputError("a module's name is accepted, such as my_package.my_mixer", option="plugins", value=module)
        with user_code(f"config.plugins: importing {module!r}"):
            try:
                importlib.import_module(module)
            except ModuleNotFoundError as error:
                raise InputError(f"cannot import {module!r}: {error}", option="plugins") from error


def names(kind: str) -> tuple[str, ...]:
    """The registered policies of a kind, sorted."""
    _load_installed()
    return tuple(sorted(_FACTORIES[kind]))


def _factory(kind: str, name: str) -> Callable[..., Any]:
    _load_installed()
    if not isinstance(name, str) or name not in _FACTORIES[kind]:
        known = ", ".join(names(kind))
        raise InputError(f"unknown {kind} {shown(name)}; known: {known} (config.plugins adds your own)")
    return _FACTORIES[kind][name]


def _default(annotation: Any, default: Any) -> Any:
    if default is not None:
        return default
    accepted = [t for t in typing.get_args(annotation) if t is not types.NoneType]
    return config_dict.placeholder((typing.get_origin(accepted[0]) or accepted[0]) if len(accepted) == 1 else object)


def policy_config(kind: str, name: str) -> ml_collections.ConfigDict:
    """A policy's section of the configuration: its name, hyperparameters at their defaults, and schedule overrides.

    Raises:
        InputError: an unknown name, with the known ones.
    """
    section = ml_collections.ConfigDict({"name": name})
    for parameter in inspect.signature(_factory(kind, name)).parameters.values():
        section[parameter.name] = _default(parameter.annotation, parameter.default)
    for name, field in _RUN_FIELDS.get(kind, {}).items():
        section[name] = _default(field.annotation, field.default)
    for field in _SCHEDULE_FIELDS:
        section[field] = config_dict.placeholder(int)
    return section


def build(
    kind: str, section: ml_collections.ConfigDict, schedule: Schedule, option: str | None = None
) -> Scheduled[Any]:
    """Builds a policy with its schedule (the global `schedule` with the section's overrides).

    Args:
        kind: the kind of policy.
        section: its part of the configuration.
        schedule: of policies that do not override it.
        option: the section's dotted name without "config."; None: the kind.

    Raises:
        InputError: an unknown name or hyperparameter (with the accepted ones), a value the policy refuses, or a factory
            that makes no policy.
    """
    name, option = section.get("name"), option or kind
    factory = _factory(kind, name)
    accepted = inspect.signature(factory).parameters
    run_fields = _RUN_FIELDS.get(kind, {})
    overrides, hyperparameters = {}, {}
    for field, value in section.items():
        if field in _SCHEDULE_FIELDS:
            overrides.update({} if value is None else {field: value})
        elif field in accepted:
            checked(option, _check_type, accepted[field], value)
            hyperparameters[field] = value
        elif field in run_fields:
            checked(option, options.of_type, field, value, run_fields[field].annotation)
            checked(option, run_fields[field].check, field, value)
        elif field != "name":
            raise InputError(
                f"{kind} {name!r} has no such hyperparameter; accepted: "
                f"{', '.join((*accepted, *run_fields, *_SCHEDULE_FIELDS))} (to change the {kind}, choose it by "
                f"variant: --config=configs/base.py:{kind}={name})",
                option=f"{option}.{field}",
            )
    schedule = schedule._replace(**overrides)
    checked(option, _check_schedule, schedule)
    with user_code(f"{kind} {name!r}: its factory"):
        policy = checked(option, factory, **hyperparameters)
    if not isinstance(policy, _PROTOCOLS[kind]):
        expected = _PROTOCOLS[kind].__name__
        raise InputError(f"{kind} {name!r}: its factory returned a {type(policy).__name__}; a {expected} is expected")
    check_fields(f"{kind} {name!r}", policy)
    return Scheduled(name, policy, schedule)


def checked(option: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What `call` returns, such as a policy's factory or `init`, whose arguments come from a section.

    Raises:
        InputError: in place of a ValueError whose message begins as "alpha = 2: ..."; names the section.
        ValueError: any other one, a fault of `call`.
    """
    try:
        return call(*args, **kwargs)
    except ValueError as error:
        if options.is_refusal(error):
            raise InputError(f"config.{option}.{error}") from error
        raise


def _check_type(parameter: inspect.Parameter, value: Any) -> None:
    """Refuses what is neither as the parameter's annotation says nor its default, which need not be."""
    if type(value) is not type(parameter.default) or value != parameter.default:
        options.of_type(parameter.name, value, parameter.annotation)


def _check_schedule(schedule: Schedule) -> None:
    for name, value in schedule._asdict().items():
        options.of_type(name, value, int)
    options.at_least("warmup_step", schedule.warmup_step, 0)
    options.at_least("update_step", schedule.update_step, 1)
    times = schedule.update_times
    options.require("update_times", times, times >= -1, ">= 0, or -1 for no limit")
