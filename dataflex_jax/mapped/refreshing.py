"""What mixers and weighters ask between two steps, asked for one model after the other."""

from collections.abc import Sequence

import jax

from dataflex_jax.mapped.members import Member
from dataflex_jax.mapped.states import member_state, stacked
from dataflex_jax.sharding import shardings
from dataflex_jax.training.assembly import Experiment
from dataflex_jax.training.between import Updates
from dataflex_jax.training.run_signals import RunSignals
from dataflex_jax.training.state import TrainState


class Refreshes:
    """The refreshes of S models.

    Args:
        experiment: what they share.
        members: the models.
        signals: of a run of `experiment`.
    """

    def __init__(self, experiment: Experiment, members: Sequence[Member], signals: RunSignals):
        self._learner, policies = experiment.learner, experiment.policies
        self._alone = member_state(experiment.learner)
        self._updates = []
        for member in members:
            config = experiment.config.copy_and_resolve_references()
            config.seed = member.seed
            self._updates.append(Updates(policies, None, signals._replace(config=config).of))

    def between(self, step: int, states: TrainState, samplers: Sequence) -> TrainState:
        """The states once `step` steps are done and before the next one is planned."""
        if not self._updates[0].refreshes(step):
            return states
        mixers, weighters = [], []
        for number, (updates, sampler) in enumerate(zip(self._updates, samplers, strict=True)):
            state, _ = updates.between(step, self._alone(states, number), sampler)
            mixers.append(state.mixer)
            weighters.append(state.weighters)
        refreshed = states._replace(mixer=stacked(mixers), weighters=stacked(weighters))
        return jax.tree.map(jax.device_put, refreshed, shardings(states))
