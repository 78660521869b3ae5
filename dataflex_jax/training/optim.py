"""The optimizer: AdamW with clipping and a learning-rate schedule, from optax."""

import jax
import optax
from ml_collections import ConfigDict

from dataflex_jax.models import layout

WSD_DECAY = 0.1  # share of the run over which "wsd" decays


def learning_rate(optim: ConfigDict, train_step: int | None) -> optax.Schedule:
    """Linear warm-up from 0 over `warmup_ratio * train_step` steps, then `optim.schedule`.

    The first update uses the schedule at 0, as in Hugging Face's trainer.

    Args:
        optim: `config.optim`.
        train_step: steps of the run; None where they are not known yet, as before the data of epochs are read, and
            nothing is trained.
    """
    peak, train_step = optim.learning_rate, train_step or 1
    warmup = round(optim.warmup_ratio * train_step)
    rest = max(train_step - warmup, 1)
    decay = max(round(WSD_DECAY * train_step), 1)
    after = {
        "linear": lambda: optax.linear_schedule(peak, 0.0, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest),
        "wsd": lambda: optax.linear_schedule(peak, 0.0, decay, transition_begin=max(rest - decay, 0)),
        "constant": lambda: optax.constant_schedule(peak),
    }[optim.schedule]()
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def adamw(optim: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW; weight decay on matrices only, clipping by global norm first where `clip_norm` > 0."""
    clip = optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm > 0 else optax.identity()
    return optax.chain(
        clip,
        optax.adamw(
            schedule,
            b1=optim.b1,
            b2=optim.b2,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            mask=lambda params: jax.tree_util.tree_map_with_path(lambda path, _: layout.row(path).matrix, params),
        ),
    )
