"""The reference model of the policies that compare with one."""

from dataflex_jax.policies import options
from dataflex_jax.policies.base import Reference

LOSSES = ("model", "cached")


def reference_model(reference: str | None, reference_losses: str) -> Reference:
    """The hyperparameters `reference` and `reference_losses` as one thing.

    Raises:
        ValueError: no reference, or a way to its losses that there is not.
    """
    options.one_of("reference_losses", reference_losses, LOSSES)
    options.require("reference", reference, bool(reference), "a run folder or a Hugging Face model")
    return Reference(reference, reference_losses)
