"""How long a run is: `config.epochs`, passes over the training rows, as `config.train_step`, optimizer steps."""

import logging
import math
from fractions import Fraction

from ml_collections import ConfigDict

from dataflex_jax.errors import InputError
from dataflex_jax.policies.options import LARGEST_INT

logger = logging.getLogger(__name__)


def settle(config: ConfigDict, num_rows: int) -> None:
    """Puts the number of steps in the place of `config.epochs`, if that is set, and says so.

    Args:
        config: of a run; afterwards its `train_step` is a number and its `epochs` None.
        num_rows: rows of the pool.

    Raises:
        InputError: more steps than a run can count.
    """
    epochs, rows = config.epochs, config.data.batch_size
    if epochs is None:
        return
    steps = math.ceil(Fraction(str(epochs)) * num_rows / rows)
    if steps > LARGEST_INT:
        reason = f"of {num_rows} rows are {steps} steps of {rows} rows; a run has at most {LARGEST_INT}"
        raise InputError(reason, option="epochs", value=epochs)
    config.train_step, config.epochs = steps, None
    logger.info(
        "config.epochs = %g: %d steps of %d rows, for %d training rows; how often each domain's come is domain_epochs.",
        epochs,
        steps,
        rows,
        num_rows,
    )
