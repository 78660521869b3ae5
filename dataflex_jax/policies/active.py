"""The policies of a run, built from its configuration."""

from typing import NamedTuple

from ml_collections import ConfigDict

from dataflex_jax import config as configuration
from dataflex_jax.errors import InputError
from dataflex_jax.policies import registry
from dataflex_jax.policies.base import Mixer, Reference
from dataflex_jax.policies.schedule import Schedule
from dataflex_jax.selection.choosing import Selecting
from dataflex_jax.selection.windows import Ordering
from dataflex_jax.training import objective
from dataflex_jax.training.objective import ScheduledWeighter


class ActivePolicies(NamedTuple):
    """The policies of a run.

    Attributes:
        mixer: the mixer; the static one where none is named.
        schedule: when the mixer's weights are published.
        selecting: the selector, or None.
        ordering: the order, or None.
        weighters: the weighters.
        reference: the model that some of them compare with, or None.
        by_domain: whether rows are drawn domain by domain; otherwise a selector or an order has the whole pool.
    """

    mixer: Mixer
    schedule: Schedule
    selecting: Selecting | None
    ordering: Ordering | None
    weighters: tuple[ScheduledWeighter, ...]
    reference: Reference | None
    by_domain: bool

    @property
    def want_targets(self) -> bool:
        """Whether a target set is needed."""
        policies = (self.mixer, *(w.weighter for w in self.weighters), self.selecting and self.selecting.selector)
        return any(policy is not None and "targets" in policy.needs for policy in policies)

    def names(self) -> dict[str, str | None]:
        """Field of the configuration -> name."""
        return {
            "selector.name": self.selecting and self.selecting.name,
            "order.name": self.ordering and self.ordering.name,
            "weighter.name": "+".join(weighter.name for weighter in self.weighters) or None,
        }


def active_policies(config: ConfigDict) -> ActivePolicies:
    """Builds what `config.mixer`, `.selector`, `.order` and `.weighter` name.

    Raises:
        InputError: an unknown policy, or a value it refuses.
    """
    schedule = configuration.schedule(config)
    mixer, mixer_schedule = registry.build("mixer", configuration.mixer_section(config), schedule)
    selecting = ordering = None
    if config.selector:
        selector, selector_schedule = registry.build("selector", config.selector, schedule)
        if selector.score is not None:
            keep = config.selector.save_all_scores
            selecting = Selecting(config.selector.name, selector, selector_schedule, keep)
    if config.order:
        ordering = Ordering(config.order.name, *registry.build("order", config.order, schedule))
        if ordering.order.scores.kind == "selector" and selecting is None:
            raise InputError('config.order.scores = "selector": needs a config.selector that scores')
        given = [field for field in Schedule._fields if config.order.get(field) is not None]
        if given and (selecting or not ordering.order.dynamic):
            when = "each of the selector's choices" if selecting else "all rows, before the first step"
            raise InputError(f"config.order.{given[0]}: not used, the order arranges {when}; leave it None")
    weighters = tuple(
        ScheduledWeighter(section.name, *registry.build("weighter", section, schedule, option))
        for option, section in configuration.weighter_sections(config).items()
    )
    by_domain = config.mixer is not None or not (selecting or ordering)
    if not by_domain:
        if config.data.proportions is not None:
            raise InputError(
                "config.data.proportions: without a mixer a selector or an order has the pool as a whole; leave it "
                "None, or name a mixer too, such as mixer=static"
            )
        # The static mixer that stands in has nothing to publish to a sampler that draws from the pool as a whole.
        mixer_schedule = mixer_schedule._replace(update_times=0)
    reference = objective.reference(mixer, weighters)
    return ActivePolicies(mixer, mixer_schedule, selecting, ordering, weighters, reference, by_domain)
