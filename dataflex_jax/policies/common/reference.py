"""The reference model of the policies that compare with one."""

from dataflex_jax.policies.base import Reference

LOSSES = ("model", "cached")


def reference_model(reference: str | None, reference_losses: str) -> Reference:
    """The hyperparameters `reference` and `reference_losses` as one thing.

    Raises:
        ValueError: no reference, or a way to its losses that there is not.
    """
    if reference_losses not in LOSSES:
        raise ValueError(f"reference_losses = {reference_losses!r}: must be one of {', '.join(LOSSES)}")
    if not reference:
        raise ValueError(f"reference = {reference}: must be the run folder of the reference model")
    return Reference(reference, reference_losses)
