"""DataFlex's fields: what decides on the data, when, and for how many steps."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from dataflex_jax.errors import InputError
from dataflex_jax.moving.components import MISSING, MIXERS, SELECTORS, WEIGHTERS, Component
from dataflex_jax.moving.draft import Draft, Given
from dataflex_jax.moving.orders import order
from dataflex_jax.moving.yaml_files import Lines, read_yaml

_KINDS = {  # by train_type: the kind of policy
    "dynamic_select": "selector",
    "dynamic_mix": "mixer",
    "dynamic_weight": "weighter",
    "dynamic_reorder": "order",
    "dynamic_lego": "pipeline",
}
_BUCKETS = {  # by kind: the sections of components.yaml, the later ones older names
    "selector": ("selectors",),
    "mixer": ("mixers",),
    "weighter": ("weighters",),
    "order": ("reorders", "reorderers"),
    "pipeline": ("pipelines",),
}
_FAMILIES = {"selector": "selector", "mixer": "mixer", "weighter": "weighter", "reorder": "order"}
_COMPONENTS = {"selector": SELECTORS, "mixer": MIXERS, "weighter": WEIGHTERS}
_RULES = ("mixture", "stratified", "uniform")


class Schedule(NamedTuple):
    """DataFlex's schedule as it is given, with its defaults."""

    warmup_step: int
    update_step: int
    update_times: int
    train_step: int

    @property
    def stage(self) -> int:
        """Steps of a warm-up with its updates."""
        return self.warmup_step + self.update_step * self.update_times


class Policies:
    """What `train_type` and its fields become.

    Args:
        given: the file.
        draft: the recipe.
        domains: the names of the training data's.
    """

    def __init__(self, given: Given, draft: Draft, domains: Sequence[str]):
        self._given, self._draft, self._domains = given, draft, domains
        self.comparing: list[str] = []

    def decide(self) -> int | None:
        """Adds the policies; returns how many steps the schedule takes, None where the epochs decide."""
        given = self._given
        kind = given.one_of("train_type", {"static": None, **_KINDS}, "static")
        schedule = Schedule(
            max(given.integer("warmup_step", 0), 0),
            given.integer("update_step", 0),
            given.integer("update_times", 1),
            given.integer("train_step", 0),
        )
        self._proportions(kind)
        static_mix = given.flag("static_mix")
        name, path = given.text("component_name"), given.text("components_cfg_file")
        if kind is None:
            return None
        if kind == "mixer" and static_mix:
            self._draft.add("mixer", "static", {})
            return self._steps(kind, schedule, fixed=True)
        if name is None:
            given.refuse("component_name", "the name of a component is expected")
        if kind != "weighter" and schedule.update_step < 1:
            given.refuse("update_step", "the steps between two updates are expected, 1 or more")
        parameters = self._parameters(kind, name, path)
        self._schedule(kind, schedule)
        if kind == "pipeline":
            self._pipeline(Given(parameters))
        else:
            self._add(kind, name, parameters)
        return self._steps(kind, schedule, fixed=False)

    def _proportions(self, kind: str | None) -> None:
        given, rule, numbers = self._given, "mixture", self._given.numbers("init_mixture_proportions")
        if given.has("mixture_sample_rule"):
            rule = given.one_of("mixture_sample_rule", {each: each for each in _RULES})
        given.raw("mixture_sample_rule")
        if kind not in ("mixer", "pipeline"):
            return
        if rule != "mixture" and not given.flag("static_mix") and given.text("component_name") != "static":
            given.refuse("mixture_sample_rule", "with it no mixer's proportions are ever used; accepted: mixture")
        if numbers is not None and len(numbers) != len(self._domains):
            given.refuse("init_mixture_proportions", f"one for each of the {len(self._domains)} datasets is expected")
        if rule == "mixture" and kind == "mixer":
            self._draft.set(data__proportions=numbers or "uniform")
        elif rule == "mixture":
            self._draft.set(data__proportions=numbers)
        elif rule == "uniform":
            self._draft.set(data__proportions="uniform")

    def _schedule(self, kind: str, schedule: Schedule) -> None:
        times = schedule.update_times if schedule.update_times > 0 else -1
        if kind == "mixer" and schedule.train_step > 0 and times > 0:
            times = -1
            self._draft.note(self._given.place("update_times"), "of no effect beside train_step, as there")
        if kind == "weighter":
            self._draft.set(warmup_step=schedule.warmup_step)
        elif kind == "pipeline":
            self._draft.set(update_step=schedule.update_step)
        else:
            self._draft.set(warmup_step=schedule.warmup_step, update_step=schedule.update_step, update_times=times)

    def _steps(self, kind: str, schedule: Schedule, *, fixed: bool) -> int | None:
        given, stage = self._given, schedule.stage
        if schedule.train_step > 0:
            if kind in ("selector", "order") and schedule.update_times > 0 and stage < schedule.train_step:
                reason = f"the {stage} steps would be repeated, warm-up and all, up to train_step; -1 is accepted"
                given.refuse("update_times", reason)
            if kind == "weighter":
                self._draft.note(given.place("train_step"), "of effect here, where the run has as many steps")
            if given.has("num_train_epochs"):
                given.raw("num_train_epochs")
                self._draft.note(given.place("num_train_epochs"), "train_step is in its place", matters=False)
            return schedule.train_step
        if kind == "weighter" or fixed or schedule.update_times <= 0:
            return None
        epochs = given.number("num_train_epochs", 3.0)
        if kind == "mixer" and given.has("num_train_epochs"):
            reason = f"the {stage} steps of the schedule are in its place, as there"
            self._draft.note(given.place("num_train_epochs"), reason)
        if kind == "mixer" or math.isclose(epochs, 1.0):
            return stage
        reason = f"the {stage} steps of the schedule would be repeated so often, warm-up and all; give train_step"
        given.refuse("num_train_epochs", reason)

    def _parameters(self, kind: str, name: str, path: str | None) -> Lines:
        """A component's parameters, from the file of components.

        Raises:
            InputError: there is no such file or component.
        """
        given, missing = self._given, MISSING.get(kind, {})
        if name in missing:
            given.refuse("component_name", missing[name])
        found = read_yaml(self._draft.located(path or "configs/components.yaml"))
        bucket = next((found[each] for each in _BUCKETS[kind] if isinstance(found.get(each), Lines)), {})
        if name not in bucket:
            known = ", ".join(bucket) or "none"
            given.refuse("component_name", f"not among the {_BUCKETS[kind][0]} of {found.path}; these are: {known}")
        component = bucket[name]
        parameters = component.get("params") if isinstance(component, Lines) else None
        if parameters is None:
            return Lines(found.path)
        if not isinstance(parameters, Lines):
            raise InputError(f"{component.place('params')}: a mapping of names to values is expected")
        return parameters

    def _add(self, kind: str, name: str, parameters: Lines, **schedule: float) -> None:
        given = Given(parameters)
        if kind == "order":
            policy, fields, notes = order(given, name)
            if (every := given.integer("reorder_every", 1)) > 1 and fields["dynamic"]:
                fields["update_step"] = every * schedule.get("update_step", self._draft.fields["update_step"])
            _refuse_left(given, name)
            for parameter, reason in notes.items():
                self._draft.note(given.place(parameter), reason)
        elif name == "static":
            policy, fields = "static", self._static(given)
        else:
            component = _COMPONENTS[kind].get(name)
            if component is None:
                self._given.refuse("component_name", f"no counterpart; there are {', '.join(_COMPONENTS[kind])}")
            warmup = schedule.get("warmup_step", self._draft.fields.get("warmup_step", 0))
            policy, fields = component.policy, self._fields(component, given, name, warmup)
        self._draft.add(kind, policy, schedule | fields)

    def _fields(self, component: Component, given: Given, name: str, warmup: float) -> dict[str, Any]:
        own = given.integer("warmup_steps", 0) if name == "odm" else 0
        fields = component.hyperparameters(given, name)
        if component.compares and fields.get("objective") not in ("diverse_only", "uniform"):
            self.comparing.append(name)
        if component.note:
            self._draft.note(self._given.place("component_name"), f"{name}: {component.note}")
        if name == "odm":
            self._check_domains(given, "initial_proportions", fields["initial_proportions"])
            if own > warmup:
                reason = "the mixer's own warm-up, the longer of two; config.mixer.warmup_step"
                self._draft.note(given.place("warmup_steps"), reason)
                fields["warmup_step"] = own
        if name == "doremi":
            if fields["reference"] is None:
                given.refuse("reference_model_path", "the folder of the reference model is expected")
            fields["reference"] = self._draft.located(fields["reference"])
        return fields

    def _static(self, given: Given) -> dict[str, Any]:
        """Of the static mixer: its proportions, and before the first update those that the run begins with."""
        numbers = given.numbers("proportions")
        _refuse_left(given, "static")
        self._check_domains(given, "proportions", numbers)
        first, then = self._draft.fields.get("data.proportions"), numbers or "uniform"
        warmup = max(self._given.integer("warmup_step", 0), 0)
        if _normalised(first, len(self._domains)) == _normalised(then, len(self._domains)) or warmup == 0:
            return {"proportions": then}
        self._draft.note(given.place("proportions"), "from warmup_step on; before, init_mixture_proportions")
        return {"stages": ((0, first or "natural"), (warmup, then))}

    def _check_domains(self, given: Given, parameter: str, numbers: Sequence[float] | None) -> None:
        if numbers is not None and len(numbers) != len(self._domains):
            given.refuse(parameter, f"one for each of the {len(self._domains)} datasets is expected")

    def _pipeline(self, given: Given) -> None:
        for parameter in ("cache_dir", "score_batch_size", "score_num_workers", "save_plans", "seed"):
            given.raw(parameter)
        stages = given.raw("stages", [])
        _refuse_left(given, "a pipeline")
        if not isinstance(stages, list) or not stages or not all(isinstance(stage, Lines) for stage in stages):
            given.refuse("stages", "a list of {family, component} is expected")
        path = self._given.text("components_cfg_file")
        for fields in stages:
            self._stage(Given(fields), path)
        for fields in self._draft.policies.get("order", {}).values():
            if "selector" in self._draft.policies or not fields["dynamic"]:
                when = "each of the selector's choices" if fields["dynamic"] else "all rows, before the first step"
                self._draft.note(given.place("stages"), f"the order arranges {when}, whatever its own stage says")
                for name in Schedule._fields:
                    fields.pop(name, None)

    def _stage(self, given: Given, path: str | None) -> None:
        if not given.flag("enabled", True):
            return
        kind, name = given.one_of("family", _FAMILIES), given.text("component")
        if name is None:
            given.refuse("component", "the name of a component is expected")
        filters = given.one_of("mode", {"filter": True, "draw": False}, "filter")
        share = given.number("keep_ratio", 0.5)
        if kind in self._draft.policies and kind != "weighter":
            given.refuse("family", f"a second one; here a run has one {kind}")
        warmup, every = given.integer("warmup_step", 0), given.integer("every", 1)
        _refuse_left(given, "a stage")
        schedule = {"warmup_step": warmup}
        if kind != "weighter":
            schedule |= {"update_step": every, "update_times": -1}
        if kind == "selector" and filters:
            schedule |= {"keep": float(share)}
            self._draft.note(given.place("mode"), "with a mixer so much of each domain is kept, not of all together")
        self._add(kind, name, self._parameters(kind, name, path), **schedule)


def _refuse_left(given: Given, what: str) -> None:
    if left := given.left():
        given.refuse(left[0], f"no parameter of {what}")


def _normalised(proportions: Any, count: int) -> tuple[float, ...] | None:
    if proportions == "uniform":
        proportions = (1.0,) * count
    if proportions is None or not sum(proportions):
        return None
    return tuple(round(number / sum(proportions), 9) for number in proportions)
