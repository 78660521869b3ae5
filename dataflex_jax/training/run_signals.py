"""The signals of a run: its data, its target set and its model as they are between two steps."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import optax
from ml_collections import ConfigDict

from dataflex_jax.data.targets import TargetSet
from dataflex_jax.models.generation.generate import Codec
from dataflex_jax.models.model import Model
from dataflex_jax.policies.signals import FixedEmbeddings
from dataflex_jax.signals.domain_gradients import domain_gradients
from dataflex_jax.signals.moments import AdamState
from dataflex_jax.signals.registry import Subject
from dataflex_jax.signals.row_sets import ModelSignals, ReadTexts
from dataflex_jax.signals.sweep import Source, Sweeper
from dataflex_jax.training.state import TrainState


class RunSignals(NamedTuple):
    """Makes the signals of a state's model.

    Attributes:
        config: of the run.
        model: without the trained parameters.
        learning_rate: the schedule.
        sweeper: runs the sweeps.
        candidates: the training rows.
        targets: the target set, and its rows; None where no policy needs it.
        held_out: the same of the held-out rows.
        fixed: embeddings that stay as they are, of candidates and targets.
        read: the texts of rows.
        codec: text to tokens and back.
    """

    config: ConfigDict
    model: Model
    learning_rate: optax.Schedule
    sweeper: Sweeper
    candidates: Source
    targets: tuple[TargetSet, Source] | None
    held_out: tuple[TargetSet, Source] | None
    fixed: Mapping[FixedEmbeddings, tuple[np.ndarray, np.ndarray]]
    read: ReadTexts
    codec: Codec

    def of(self, state: TrainState, step: int) -> ModelSignals:
        """The signals of the model that `state` holds once `step` steps are done."""
        optim, data = self.config.optim, self.config.data
        model = self.model.with_params(state.params)
        subject = Subject(model, AdamState(state.opt_state, optim.b1, optim.b2, optim.eps))

        def gradients():
            return domain_gradients(
                model,
                self.candidates,
                self.targets,
                rows=data.batch_size // data.grad_accumulation,
                random=np.random.Generator(np.random.Philox(key=[self.config.seed, step])),
                learning_rate=self.learning_rate(step),
            )

        asked = (self.candidates, self.targets, gradients, self.held_out, self.fixed, self.read, self.codec)
        return ModelSignals(subject, self.sweeper, *asked)
