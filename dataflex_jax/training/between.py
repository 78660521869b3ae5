"""What happens between two steps: selections, and the refreshes of mixers and weighters."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dataflex_jax.data.sampler import SamplerState
from dataflex_jax.policies.active import ActivePolicies
from dataflex_jax.policies.base import DomainGradients, Signals
from dataflex_jax.selection.windows import Selection
from dataflex_jax.training.step import TrainState


class Updates:
    """Asks the policies, between two steps, what they decide there.

    Args:
        policies: of the run.
        selection: the selector and the order; None: neither.
        signals_of: the signals of a state's model.
        gradients: (state, step) -> DomainGradients, for mixers that want them.
    """

    def __init__(
        self,
        policies: ActivePolicies,
        selection: Selection | None,
        signals_of: Callable[[TrainState], Signals],
        gradients: Callable[[TrainState, int], DomainGradients],
    ):
        self._policies, self._selection = policies, selection
        self._signals_of, self._gradients = signals_of, gradients
        refresh = policies.mixer.refresh
        self._refresh_mixer = jax.jit(refresh) if refresh else None

    def between(self, step: int, state: TrainState, planned: SamplerState) -> tuple[TrainState, list[dict[str, Any]]]:
        """Once `step` steps are done and before the next one is planned.

        Returns:
            The state for the next step, and lines for policy.jsonl.
        """
        records = []
        due = [scheduled.refreshes(step) for scheduled in self._policies.weighters]
        if any(due):
            signals = self._signals_of(state)
            weighters = tuple(
                scheduled.weighter.refresh(old, signals) if now else old
                for scheduled, old, now in zip(self._policies.weighters, state.weighters, due, strict=True)
            )
            state = state._replace(weighters=jax.tree.map(_from_host, weighters, state.weighters))
            records += [
                {"step": step, "policy": scheduled.name, "refreshed": signals.num_targets}
                for scheduled, now in zip(self._policies.weighters, due, strict=True)
                if now
            ]
        if self._selection is not None:
            # Last of what a request to stop can interrupt: once made, its state must not be saved without its line.
            record = self._selection.between(step, state, planned)
            records += [record] if record else []
        if self._refresh_mixer is not None and self._policies.schedule.is_update(step + 1):
            wanted = "domain_gradients" in self._policies.mixer.needs
            gradients = self._gradients(state, step) if wanted else None
            mixer = self._refresh_mixer(state.mixer, gradients)
            state = state._replace(
                mixer=jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), mixer, state.mixer)
            )
        return state, records


def _from_host(new: Any, old: jax.Array) -> jax.Array:
    """What every host has computed, as one array over all of them."""
    if new is old:
        return old
    values = np.asarray(new, old.dtype)
    return jax.make_array_from_callback(values.shape, old.sharding, values.__getitem__)
