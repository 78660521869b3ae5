"""What happens between two steps: selections, and the refreshes of mixers and weighters."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dataflex_jax.data.sampler import SamplerState
from dataflex_jax.policies.active import ActivePolicies
from dataflex_jax.selection.windows import Selection
from dataflex_jax.signals.row_sets import ModelSignals
from dataflex_jax.training.state import TrainState


class Updates:
    """Asks the policies, between two steps, what they decide there.

    Attributes:
        selection: the selector and the order; None: neither.

    Args:
        policies: of the run.
        selection: as above.
        signals_of: (state, steps done) -> the signals of the state's model, fresh ones.
    """

    def __init__(
        self,
        policies: ActivePolicies,
        selection: Selection | None,
        signals_of: Callable[[TrainState, int], ModelSignals],
    ):
        self.selection = selection
        self._policies, self._signals_of = policies, signals_of

    def refreshes(self, step: int) -> bool:
        """Whether a mixer or a weighter is refreshed once `step` steps are done."""
        return self._mixer_is_due(step) or any(self._due_weighters(step))

    def between(self, step: int, state: TrainState, planned: SamplerState) -> tuple[TrainState, list[dict[str, Any]]]:
        """Once `step` steps are done and before the next one is planned.

        Returns:
            The state for the next step, and lines for policy.jsonl.
        """
        state, records = self._refreshed_weighters(step, state)
        if self.selection is not None:
            # Last of what a request to stop can interrupt: once made, its state must not be saved without its line.
            record = self.selection.between(step, planned, state.key, lambda: self._signals_of(state, step))
            records += [record] if record else []
        mixer = self._policies.mixer
        if self._mixer_is_due(step):
            signals = self._signals_of(state, step)
            refreshed = mixer.policy.refresh(state.mixer, signals)
            if signals.compared is not None:
                compared = jax.device_get(jax.device_put(signals.compared, state.step.sharding))
                records.append({"step": step, "policy": mixer.name, "domain_gradients": compared._asdict()})
            placed = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), refreshed, state.mixer)
            state = state._replace(mixer=placed)
        return state, records

    def _refreshed_weighters(self, step: int, state: TrainState) -> tuple[TrainState, list[dict[str, Any]]]:
        weighters = self._policies.weighters
        due = self._due_weighters(step)
        if not any(due):
            return state, []
        signals = self._signals_of(state, step)
        refreshed = tuple(
            weighter.policy.refresh(old, signals) if now else old
            for weighter, old, now in zip(weighters, state.weighters, due, strict=True)
        )
        seen = signals.targets.num_rows if signals.targets else 0
        records = [
            {"step": step, "policy": weighter.name, "refreshed": seen}
            for weighter, now in zip(weighters, due, strict=True)
            if now
        ]
        return state._replace(weighters=jax.tree.map(_from_host, refreshed, state.weighters)), records

    def _mixer_is_due(self, step: int) -> bool:
        mixer = self._policies.mixer
        return mixer.policy.refresh is not None and mixer.schedule.is_update(step + 1)

    def _due_weighters(self, step: int) -> list[bool]:
        return [
            weighter.policy.refresh is not None and weighter.schedule.every(weighter.policy.refresh_interval, step)
            for weighter in self._policies.weighters
        ]


def _from_host(new: Any, old: jax.Array) -> jax.Array:
    """What every host has computed, as one array over all of them."""
    if new is old:
        return old
    values = np.asarray(new, old.dtype)
    return jax.make_array_from_callback(values.shape, old.sharding, values.__getitem__)
