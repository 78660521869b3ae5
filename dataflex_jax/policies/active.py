"""The policies of a run, built from its configuration."""

from collections.abc import Hashable, Iterable, Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree
from ml_collections import ConfigDict

from dataflex_jax.errors import InputError
from dataflex_jax.policies import registry
from dataflex_jax.policies.base import Mixer, Order, RecordNumbers, Reference, Selector, Weighter
from dataflex_jax.policies.contract import checked_mixer, checked_order, checked_selector, checked_weighter
from dataflex_jax.policies.proportions import only
from dataflex_jax.policies.schedule import Schedule, Scheduled
from dataflex_jax.policies.signals import EXAMPLES, TEXTS, FixedEmbeddings


class ActivePolicies(NamedTuple):
    """The policies of a run.

    Attributes:
        mixer: the mixer; the static one where none is named.
        selector: the selector, where it chooses anything between two steps, or None.
        online: the selector, where it chooses inside the step, or None.
        order: the order, or None.
        weighters: the weighters.
        by_domain: whether rows are drawn domain by domain; otherwise a selector or an order has the whole pool.
        mixes: whether a mixer is named.
        keep: the share of the candidates that a selector leaves to draw from; None: it chooses those that come.
        save_all_scores: whether selections keep the scores of all candidates.
    """

    mixer: Scheduled[Mixer]
    selector: Scheduled[Selector] | None
    online: Scheduled[Selector] | None
    order: Scheduled[Order] | None
    weighters: tuple[Scheduled[Weighter], ...]
    by_domain: bool
    mixes: bool
    keep: float | None
    save_all_scores: bool

    def needs(self, what: Hashable) -> bool:
        """Whether one of them needs it."""
        return any(what in policy.needs for policy in self._with_needs())

    def fixed_embeddings(self) -> tuple[FixedEmbeddings, ...]:
        """The embeddings that are to be there before the first step."""
        wanted = (need for policy in self._with_needs() for need in policy.needs if isinstance(need, FixedEmbeddings))
        return tuple(dict.fromkeys(wanted))

    def _with_needs(self) -> Iterator[Mixer | Weighter | Selector]:
        yield self.mixer.policy
        yield from (weighter.policy for weighter in self.weighters)
        yield from (selector.policy for selector in (self.selector, self.online) if selector is not None)

    def names(self) -> dict[str, str | None]:
        """Field of the configuration -> name."""
        return {
            "mixer.name": self.mixer.name if self.mixes else None,
            "selector.name": next((each.name for each in (self.selector, self.online) if each is not None), None),
            "order.name": self.order and self.order.name,
            "weighter.name": "+".join(weighter.name for weighter in self.weighters) or None,
        }

    def weighing(self) -> str:
        """Those that weight the loss, in words."""
        mixers = () if self.mixer.policy.loss_weights is None else (f"mixer {self.mixer.name!r}",)
        return ", ".join((*mixers, *(f"weighter {weighter.name!r}" for weighter in self.weighters)))

    def drawing(self, proportions: Float[Array, " K"]) -> "ActivePolicies":
        """These policies at work on K domains, of which a mixer never draws those at proportion 0.

        Args:
            proportions: the run's, a distribution.
        """
        mixer = checked_mixer(self.mixer, len(proportions))
        drawn = np.asarray(proportions) > 0
        if not drawn.all():
            mixer = mixer._replace(policy=drawing_only(mixer.policy, drawn))
        return self._replace(mixer=mixer)

    def from_whole_pool(self) -> "ActivePolicies":
        """These policies where rows are drawn from the pool as a whole: no mixer decides, and the static one stands in.

        It has nothing to publish to the sampler then.
        """
        schedule = self.mixer.schedule._replace(update_times=0)
        return self._replace(mixer=self.mixer._replace(schedule=schedule), by_domain=False)

    def records(self) -> RecordNumbers | None:
        """What they want of the data's records.

        Raises:
            InputError: they want different numbers.
        """
        wanted = {weighter.policy.records for weighter in self.weighters if weighter.policy.records is not None}
        if len(wanted) > 1:
            named = " and ".join(f"{numbers.field!r} of {numbers.of}" for numbers in sorted(wanted))
            raise InputError(f"config.weighter: the weighters want different numbers, {named}; name one of them")
        return wanted.pop() if wanted else None

    def reference(self) -> Reference | None:
        """The reference model that they compare with.

        Raises:
            InputError: they want different ones.
        """
        weighters = (f"weighter {number}" for number in range(len(self.weighters)))
        wanted = set(self._references(weighters).values())
        if len(wanted) > 1:
            named = " and ".join(f"{r.path!r} ({r.losses})" for r in sorted(wanted))
            raise InputError(
                f"config: the policies want different reference models, {named}; give all of them the same"
            )
        return next(iter(wanted), None)

    def reference_option(self, weighter_sections: Iterable[str]) -> str | None:
        """The option that names the reference model, of the first policy that wants one; None: none does.

        Args:
            weighter_sections: of the weighters, by dotted name without "config.".
        """
        return next((f"{section}.reference" for section in self._references(weighter_sections)), None)

    def _references(self, weighter_sections: Iterable[str]) -> dict[str, Reference]:
        """What is wanted, by the section that wants it."""
        wanted = {"mixer": self.mixer.policy.reference}
        if self.online is not None:
            wanted["selector"] = self.online.policy.online.reference
        for section, weighter in zip(weighter_sections, self.weighters, strict=True):
            wanted[section] = weighter.policy.reference
        return {section: reference for section, reference in wanted.items() if reference is not None}


def active_policies(config: ConfigDict) -> ActivePolicies:
    """Builds what `config.mixer`, `.selector`, `.order` and `.weighter` name; a run calls `drawing` of them.

    Raises:
        InputError: an unknown policy, a value it refuses, or policies that do not go together.
    """
    schedule = Schedule(config.warmup_step, config.update_step, config.update_times)
    mixer = registry.build("mixer", config.mixer or registry.policy_config("mixer", "static"), schedule)
    selector = online = order = None
    if config.selector:
        chosen = checked_selector(registry.build("selector", config.selector, schedule))
        selector = None if chosen.policy.score is None else chosen
        online = None if chosen.policy.online is None else chosen
        _check_keep(config.selector, selector)
    if config.order:
        order = registry.build("order", config.order, schedule)
        _check_order(config.order, order.policy, selector)
        order = checked_order(order)
    weighters = tuple(
        checked_weighter(registry.build("weighter", section, schedule, option))
        for option, section in weighter_sections(config).items()
    )
    by_domain = config.mixer is not None or not (selector or order)
    if not by_domain and config.data.proportions is not None:
        raise InputError(
            "without a mixer a selector or an order has the pool as a whole; leave it None, or name a mixer too, "
            "such as mixer=static",
            option="data.proportions",
        )
    keep = config.selector.get("keep") if config.selector else None
    save_all_scores = bool(config.selector and config.selector.save_all_scores)
    policies = ActivePolicies(
        mixer, selector, online, order, weighters, by_domain, bool(config.mixer), keep, save_all_scores
    )
    policies.reference()
    if config.data.packing:
        _check_packed(policies)
    return policies if by_domain else policies.from_whole_pool()


def weighter_sections(config: ConfigDict) -> dict[str, ConfigDict]:
    """The section of each weighter, by its dotted name without "config."."""
    if not config.weighter:
        return {}
    if "name" in config.weighter:
        return {"weighter": config.weighter}
    return {f"weighter.{name}": section for name, section in config.weighter.items()}


def drawing_only(mixer: Mixer, drawn: Bool[Array, " K"] | Bool[np.ndarray, " K"]) -> Mixer:
    """The mixer with its weights of the other domains at 0 throughout, and those of the drawn ones in proportion."""

    def masked(weights_of):
        return weights_of and (lambda state: only(weights_of(state), drawn))

    def loss_weights(state: PyTree) -> Float[Array, " K"]:
        return jnp.where(drawn, mixer.loss_weights(state), 0.0)

    return mixer._replace(
        sampling_weights=masked(mixer.sampling_weights),
        average=masked(mixer.average),
        loss_weights=mixer.loss_weights and loss_weights,
    )


def _check_packed(policies: ActivePolicies) -> None:
    """Refuses what looks at single examples; all else takes a packed row as it takes an example."""
    named = [("mixer", policies.mixer), ("selector", policies.selector), ("selector", policies.online)]
    named += [("weighter", weighter) for weighter in policies.weighters]
    culprits = [f"{kind} {each.name!r} looks at" for kind, each in named if each and _of_single_examples(each.policy)]
    if policies.order is not None and policies.order.policy.scores.kind == "field":
        culprits.append(f"order {policies.order.name!r} goes by {str(policies.order.policy.scores)!r} of")
    if culprits:
        accepted = "set it to False, or take what goes by the losses or gradients of rows, such as selector=less"
        raise InputError(f"{culprits[0]} single examples; {accepted}", option="data.packing", value=True)


def _of_single_examples(policy: Mixer | Weighter | Selector) -> bool:
    fixed = any(isinstance(need, FixedEmbeddings) for need in policy.needs)
    return fixed or bool(policy.needs & {EXAMPLES, TEXTS}) or getattr(policy, "records", None) is not None


def _check_keep(section: ConfigDict, selector: Scheduled[Selector] | None) -> None:
    keep, reason = section.get("keep"), None
    if selector is None:
        reason = f"selector {section.name!r} has no choice of its own to keep; leave it None"
    elif selector.policy.replacement:
        reason = "a candidate is kept once; set config.selector.replacement = False, or leave it None"
    if keep is not None and reason is not None:
        raise InputError(reason, option="selector.keep", value=keep)


def _check_order(section: ConfigDict, order: Order, selector: Scheduled[Selector] | None) -> None:
    if order.scores.kind == "selector" and selector is None:
        raise InputError("needs a config.selector that scores", option="order.scores", value="selector")
    given = [field for field in Schedule._fields if section.get(field) is not None]
    if given and (selector or not order.dynamic):
        when = "each of the selector's choices" if selector else "all rows, before the first step"
        raise InputError(f"not used, the order arranges {when}; leave it None", option=f"order.{given[0]}")
